"""What the tests of `papo-fast plan` share."""

import dataclasses
from pathlib import Path

from papo_fast.cli import main
from papo_fast.presets import get_preset
from support.small_runs import both_streams

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
# published numbers of parameters, in billions
PUBLISHED = {
    "qwen2_5_vl_3b": 3.75,
    "qwen2_5_vl_7b": 8.29,
    "qwen2_5_vl_32b": 33.45,
    "qwen2_5_vl_72b": 73.41,
    "qwen3_vl_2b": 2.13,
    "qwen3_vl_8b": 8.77,
}


def resolved_preset(name):
    config = get_preset(name)
    if name.startswith("papo"):
        config = both_streams(config)
    return dataclasses.replace(config, objective=config.objective.resolved())


def arguments(name, gpus, *more):
    path = ("--model.path", str(CONFIGS / f"{name}.json"))
    return ["plan", *more, *path, "--gpu", "h100", "--gpus", str(gpus)]


def said(capsys, argv):
    assert main(argv) == 0
    return " ".join(capsys.readouterr().out.split())
