"""Runs the Python blocks of a page, and makes what they take as given.

A block of README.md or docs/*.md may need what its reader has already, such as a model. The HTML
comment `<!-- given: model, processor -->` above it names functions of this file, whose results the
block finds under these names.

As a program: `python doc_givens.py FOLDER` does the jobs of FOLDER/jobs.json, each in a process and
in a folder FOLDER/NAME of its own with what it printed in output.txt, and writes their exit
statuses to FOLDER/statuses.json. A job is a list of blocks, or a script whose --help is wanted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import torch

PIXELS = dict(min_pixels=28 * 28, max_pixels=28 * 28 * 64)


def checkpoint() -> str:
    """What the pages call Qwen/Qwen2.5-VL-3B-Instruct: a folder, with under 1 M weights."""
    from papo_fast.digits.model import build_checkpoint

    folder = Path("Qwen/Qwen2.5-VL-3B-Instruct")
    if not folder.exists():
        build_checkpoint(folder, seed=0)
    return str(folder)


@cache
def model() -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(checkpoint(), dtype=torch.float32)


@cache
def processor() -> Any:
    from papo_fast.integrations.processor import load_processor

    return load_processor(checkpoint(), **PIXELS)


@cache
def dataset() -> Any:
    from papo_fast.config import DataConfig
    from papo_fast.digits.task import write_questions
    from papo_fast.integrations.conversations import conversations

    write_questions(Path("train.parquet"), 16, "train", 0)
    return conversations("train.parquet", DataConfig(prompt_suffix=""))


@cache
def inputs() -> dict[str, Any]:
    """A question with its picture and four tokens of a response, as transformers takes them."""
    row = dataset()[0]
    text = processor().apply_chat_template(row["prompt"], add_generation_prompt=True)
    made = dict(processor()(text=[text], images=[row["images"]], return_tensors="pt"))
    ids = torch.cat([made["input_ids"], torch.tensor([[20, 21, 22, 23]])], 1)
    types = (ids == model().config.image_token_id).long()
    return made | dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types)


def is_response() -> torch.Tensor:
    """(1, S) bool, True at the response's tokens."""
    ids = inputs()["input_ids"]
    return (torch.arange(ids.shape[1]) >= ids.shape[1] - 4)[None]


def reward() -> Any:
    return lambda completions, **columns: [float(len(c[0]["content"])) for c in completions]


def run_blocks(blocks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        names.update({name: globals()[name]() for name in block["given"]})
        # empty lines in front, so that a traceback names the page's own line
        text = "\n" * block["line"] + block["text"]
        exec(compile(text, block["page"], "exec"), names)


def print_help(script: str) -> None:
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, "--help"]
    runpy.run_path(script, run_name="__main__")


def run(job: dict[str, Any], folder: Path) -> int:
    """Do one job in a process and a folder of its own; returns its exit status."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.chdir(folder)
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1), os.dup2(output, 2)
            if "script" in job:
                print_help(job["script"])
            else:
                run_blocks(job["blocks"])
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(jobs: dict[str, dict[str, Any]], folder: Path) -> None:
    # once for all jobs; a job's process begins with what is imported here
    import papo_fast.launch

    if importlib.util.find_spec("trl"):
        import papo_fast.integrations.trl  # noqa: F401

    statuses = {name: run(job, folder / name) for name, job in jobs.items()}
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    main(json.loads((where / "jobs.json").read_text(encoding="utf-8")), where)
