"""Options that save memory on two gloo ranks: as on one process, or refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from papo_fast.data.encoder import PromptEncoder
from support import SUPPORT
from support.family_checkpoints import write_checkpoint
from support.parallel_worker import three_updates
from support.ranks import DATA, fixed_groups, launch
from support.small_runs import every_term

# name: (changes by section, libraries, largest difference of a weight)
OPTIONS = {
    "reference_and_activations": (
        {
            "model": {"reference_dtype": "bfloat16", "gradient_checkpointing": True},
            "parallel": {"offload_activations": True},
        },
        (),
        1e-5,
    ),
    # a moment near the middle of two codes may be rounded to either
    "adamw_8bit": ({"train": {"optimizer": "adamw_8bit"}}, ("bitsandbytes",), 5e-5),
    # its learning rate is the largest, and so are its differences
    "nf4": (
        {"model": {"lora_rank": 4, "quantize": "nf4"}, "train": {"lr": 1e-2}},
        ("bitsandbytes", "peft"),
        5e-5,
    ),
}
REFUSED = {
    "model.weights_dtype is bfloat16, but there are 2 processes": {
        "model": {"weights_dtype": "bfloat16", "dtype": "bfloat16"}
    },
    "parallel.offload_optimizer is for a single process, but there are 2": {
        "parallel": {"offload_optimizer": True}
    },
}


def changed(config, options):
    parts = {k: dataclasses.replace(getattr(config, k), **v) for k, v in options.items()}
    return dataclasses.replace(config, **parts)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks left, and the jobs."""
    folder = tmp_path_factory.mktemp("ranks")
    path = write_checkpoint(tmp_path_factory.mktemp("model"), "qwen2_5_vl")
    encoder = PromptEncoder(path, DATA)
    base = changed(
        every_term(),
        {
            "model": {"path": str(path), "dtype": "float32"},
            "rollout": {"prompts": 6, "group_size": 3},
            "train": {"lr": 3e-4, "max_tokens": 300, "update_prompts": 2},
        },
    )
    # that no file is there is what a run would say if it were not refused
    gone = changed(base, {"model": {"path": "gone"}, "data": {"train": "gone.parquet"}})
    gone = dataclasses.replace(gone, device="cpu", out=str(folder / "runs"))
    torch.save([changed(gone, options) for options in REFUSED.values()], folder / "refused")
    jobs = {}
    for name, (options, libraries, _) in OPTIONS.items():
        if all(map(importlib.util.find_spec, libraries)):
            jobs[name] = {
                "config": changed(base, options),
                "bans": encoder.banned_token_ids,
                "groups": fixed_groups(encoder),
                "checkpoint": True,
            }
            torch.save(jobs[name], folder / f"{name}.pt")
    launch(2, [str(SUPPORT / "options_worker.py"), str(folder)])
    return folder, jobs


def close(rows, others):
    for a, b in zip(rows, others, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_give_the_losses_and_weights_of_one_process(ranks, tmp_path, name):
    folder, jobs = ranks
    for library in OPTIONS[name][1]:
        pytest.importorskip(library)
    updater = three_updates(jobs[name] | {"checkpoint": False}, tmp_path / "one")
    two, one = (torch.load(f / "rows.pt") for f in (folder / name, tmp_path / "one"))
    close(two, one)
    assert len({round(row["loss"], 3) for row in two}) == 3
    weights, of_one = (
        load_file(f / "model.safetensors") for f in (folder / name, tmp_path / "one")
    )
    assert weights.keys() == of_one.keys()
    worst = max((weights[n] - of_one[n]).abs().max().item() for n in of_one)
    steps = 3 * updater.config.train.lr
    print(f"{name}: weights differ by up to {worst:.1e}; three updates move them by {steps:.0e}")
    assert worst < OPTIONS[name][2] < steps / 10
    # and one process goes on from the checkpoint of two
    three_updates(jobs[name] | {"resume": str(folder / name)}, tmp_path / "again")
    close(torch.load(tmp_path / "again" / "rows.pt"), two[2:])


def test_what_one_process_alone_can_do_is_refused_on_every_rank_before_anything_is_loaded(ranks):
    folder, _ = ranks
    for rank in range(2):
        said = json.loads((folder / f"refused.rank{rank}").read_text())
        assert len(said) == len(REFUSED)
        for message, expected in zip(said, REFUSED, strict=True):
            assert expected in message
    assert not (folder / "runs").exists()
