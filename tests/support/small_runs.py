"""Runs of a few steps on a tiny checkpoint; their questions and checkpoints are in conftest.py."""

from __future__ import annotations

import dataclasses
import io
import json
from contextlib import ExitStack
from unittest.mock import patch

import torch
from PIL import Image
from rich.console import Console

from papo_fast.config import EvalConfig, RewardConfig
from papo_fast.launch import train
from papo_fast.presets import get_preset
from papo_fast.run.checkpoint import CheckpointStore

SILENT = Console(quiet=True)
VOLATILE = ("seconds", "sync_seconds", "rollout_seconds", "experience_seconds", "update_seconds")


def png(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.manual_seed(seed))
    out = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(out, format="PNG")
    return out.getvalue()


def both_streams(config):
    """`config` with exact terms and gradients into both streams: what asks most of a run."""
    objective = dataclasses.replace(config.objective, parity="ours", aug="trained")
    return dataclasses.replace(config, objective=objective)


def every_term():
    """All terms of PAPO, of both streams."""
    return both_streams(get_preset("papo-g-7b"))


def small(config, path, data, out, **changes):
    """`config` shrunk to two steps of four prompts."""
    return dataclasses.replace(
        config,
        out=str(out),
        device="cpu",
        model=dataclasses.replace(config.model, path=str(path), dtype="float32"),
        data=dataclasses.replace(
            config.data,
            train=str(data),
            test=str(data),
            min_pixels=56 * 56,
            max_pixels=112 * 112,
        ),
        rollout=dataclasses.replace(
            config.rollout, prompts=4, group_size=3, max_new_tokens=6, filter_prompts=4
        ),
        train=dataclasses.replace(config.train, update_prompts=2, max_tokens=400, steps=2, lr=1e-3),
        eval=EvalConfig(samples=2),
        reward=RewardConfig(workers=1),
        **changes,
    )


def run(config, report=False):
    """Train; the run's folder, its rows of metrics without wall-clock times, and its summary.

    Its picture and page, a quarter of the time of so small a run, are made only where asked for.
    """
    with ExitStack() as stack:
        for module in ("trainer", "launch") if not report else ():
            stack.enter_context(patch(f"papo_fast.{module}.write_report", lambda folder: folder))
        folder = train(config, Console(file=io.StringIO()))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]
    return folder, rows, json.loads((folder / "summary.json").read_text())


def resumable(checkpoints, questions, folder):
    """A run of two steps of GRPO without an evaluation, which goes on where it was."""
    config = small(get_preset("grpo"), checkpoints["qwen2_5_vl"], questions, folder / "runs")
    return dataclasses.replace(
        config, name="run", resume=True, data=dataclasses.replace(config.data, test="")
    )


def with_train(config, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def steps_of(folder):
    return [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints_of(folder):
    return [saved.step for saved in CheckpointStore(folder / "checkpoints").saved()]
