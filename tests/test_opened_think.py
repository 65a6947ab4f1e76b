"""A chat template that opens <think> itself: the response then need not, wherever it is judged."""

from __future__ import annotations

import dataclasses
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from papo_fast import evaluate, launch, trainer
from papo_fast.config import DataConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.presets import get_preset
from papo_fast.report.examples import is_lucky
from papo_fast.run.files import read_run
from papo_fast.samples import Completion
from support.family_checkpoints import CHAT_TEMPLATE, write_checkpoint
from support.small_runs import png, small

OPENED = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
ANSWER = "3+4</think> \\boxed{7}"
"""Right, read right, and of the right form, if the prompt ended with <think>."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("opened") / "model", "qwen2_5_vl")
    (path / "chat_template.jinja").write_text(OPENED)
    return path


@pytest.fixture
def config(model, tmp_path):
    rows = [
        {"problem": "What?", "answer": answer, "images": [png(i)], "reading": "3+4",
         "kind": "vision_dependent"}
        for i, answer in enumerate(["7", "7", "8", "8"])
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    found = small(get_preset("papo-g-3b"), model, tmp_path / "data.parquet", tmp_path / "runs")
    rollout = dataclasses.replace(found.rollout, group_size=2)
    return dataclasses.replace(
        found, rollout=rollout, train=dataclasses.replace(found.train, steps=1)
    )


class Says:
    """An engine whose every response is `ANSWER`."""

    def __init__(self, tokenizer):
        ids = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        self.completion = Completion(ids, [-1.0] * len(ids), finished=True)

    def generate(self, prompts, n, *, advance, **_):
        advance(len(prompts))
        return [[self.completion] * n for _ in prompts]

    def load_weights(self, policy):
        pass

    sleep = close = lambda self: None


def test_the_end_of_the_prompt_is_known_at_the_door(model, checkpoints):
    assert PromptEncoder(model, DataConfig()).prompt_end.endswith("<think>")
    for path in checkpoints.values():
        assert PromptEncoder(path, DataConfig()).prompt_end.endswith("<|im_start|>assistant")


def test_training_evaluation_and_report_read_on_from_the_opened_tag(config, monkeypatch):
    monkeypatch.setattr(trainer, "make_engine", lambda c, p, encoder, f: Says(encoder.tokenizer))
    folder = launch.train(config, Console(file=io.StringIO()))
    [row] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert row["format"] == 1 and row["accuracy"] == 0.5
    assert row["reward"] == pytest.approx(0.9 * 0.5 + 0.1)
    run = read_run(folder)
    # the wrong half has read the picture right
    assert run.summary["perception_errors_after"] == 0
    assert run.summary["reasoning_errors_after"] == 0.5
    right = [example for example in run.examples if example["accuracy"] == 1]
    assert right and not any(is_lucky(example) for example in right)
    # as in a run of a template that leaves the tag to the model, where nothing was read
    assert is_lucky({**right[0], "prompt_end": "<|im_start|>assistant"})


def test_the_evaluation_of_a_checkpoint_reads_on_from_the_opened_tag(config, monkeypatch):
    monkeypatch.setattr(evaluate, "make_engine", lambda c, p, encoder, f: Says(encoder.tokenizer))
    summary = launch.evaluate(config, Console(file=io.StringIO()))
    assert summary["reasoning_errors_after"] == 0.5 and summary["perception_errors_after"] == 0


def test_rewards_in_other_trainers_can_ask_the_processor(model, checkpoints):
    from papo_fast.integrations.processor import load_processor, prompt_end

    assert prompt_end(load_processor(model)).endswith("<think>")
    plain = prompt_end(load_processor(checkpoints["qwen2_5_vl"]))
    assert plain.endswith("<|im_start|>assistant")
