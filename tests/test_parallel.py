"""Several gloo processes against one: the same parameters from the same global batch."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from papo_fast.config import ObjectiveConfig, ParallelConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.parallel import backend
from support import SUPPORT
from support.family_checkpoints import write_checkpoint
from support.ranks import DATA, fixed_groups, launch
from support.small_runs import every_term, png

pytestmark = pytest.mark.xdist_group("ranks")  # what they share is made in one process


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    path = write_checkpoint(folder / "model", "qwen3_vl")
    encoder = PromptEncoder(path, DATA)
    preset = every_term()
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, path=str(path), dtype="float32"),
        rollout=dataclasses.replace(preset.rollout, prompts=6, group_size=3),
        train=dataclasses.replace(preset.train, lr=3e-4, max_tokens=300, update_prompts=2),
    )

    def groups_of(goal):
        """Where the objective has none of PAPO's terms, text in the first view sees no picture."""
        groups = fixed_groups(encoder)
        for group in groups * (goal.kl_prcp_coef == 0):
            clean = group.prompt.encoded.pixel_values
            group.aug_pixels = None
            group.second_pixels = None if clean is None else clean.flip(0)
        return groups

    @functools.cache
    def run(ranks, name, resume=None, weights="", goal=config.objective, **parallel):
        of_layouts = (
            ranks > 1 and not weights
        )  # tests of other objectives look at the weights alone
        goal = dataclasses.replace(goal, token_weights=weights)
        layout = ParallelConfig(**parallel)
        job = {
            "config": dataclasses.replace(config, objective=goal, parallel=layout),
            "bans": encoder.banned_token_ids,
            "groups": groups_of(goal),
            "checkpoint": of_layouts,
            "nan": of_layouts,
            "resume": resume and str(folder / resume),
        }
        torch.save(job, folder / f"{name}.pt")
        worker = str(SUPPORT / "parallel_worker.py")
        launch(ranks, [worker, str(folder / f"{name}.pt"), str(folder / name)])
        rows = torch.load(folder / name / "rows.pt", weights_only=True)
        told = [json.loads(f.read_text()) for f in sorted((folder / name).glob("rank*.json"))]
        return load_file(folder / name / "model.safetensors"), rows, told

    start = load_file(path / "model.safetensors")
    return start, run(1, "one"), run


LAYOUTS = pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, {}), (2, {"offload": True}), (4, {"replicas": 2})],
    ids=["two ranks", "offloaded", "HSDP on four"],
)


@LAYOUTS
def test_ranks_give_the_parameters_of_one_process(job, ranks, parallel):
    start, (one, rows_of_one, _), run = job
    several, rows, _ = run(ranks, f"{ranks}-{'-'.join(parallel)}", **parallel)
    assert several.keys() == one.keys() == start.keys()
    moved = max((one[n] - start[n]).abs().max().item() for n in one)
    worst = max((several[n] - one[n]).abs().max().item() for n in one)
    print(f"parameters moved by up to {moved:.1e}; {ranks} ranks differ by up to {worst:.1e}")
    assert moved > 5e-4
    assert worst < 1e-5
    for a, b in zip(rows, rows_of_one, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_ranks_weigh_tokens_as_one_process_does(job):
    """Shares and ranges are of an update's tokens over all ranks, not of those of a rank."""
    _, (unweighted, *_), run = job
    one, rows_of_one, _ = run(1, "one-weighted", weights="vppo,cgpo")
    two, rows, _ = run(2, "two-weighted", weights="vppo,cgpo")
    assert max((one[n] - unweighted[n]).abs().max().item() for n in one) > 1e-5
    assert max((two[n] - one[n]).abs().max().item() for n in one) < 1e-5
    for a, b in zip(rows, rows_of_one, strict=True):
        assert 0 < a["tokens_left_out"] < 1
        assert a["tokens_left_out"] == pytest.approx(b["tokens_left_out"], abs=1e-9)
        assert a["token_weight"] == pytest.approx(b["token_weight"], rel=1e-5)


@pytest.mark.parametrize(
    "robustness",
    [pytest.param(0.0, marks=pytest.mark.exhaustive), 0.5],
    ids=["one view", "two views"],
)
def test_ranks_run_views_without_pictures_as_one_process_does(job, robustness):
    """A stream in which no rank has a picture, and one beside it that has."""
    _, (usual, *_), run = job
    goal = ObjectiveConfig(kl_coef=0, kl_prcp_coef=0, aug="frozen", dependency_of="current")
    goal = dataclasses.replace(goal, dvrp_robustness=robustness)
    one, rows_of_one, _ = run(1, f"one-view-{robustness}", weights="pgpo", goal=goal)
    two, rows, _ = run(2, f"two-view-{robustness}", weights="pgpo", goal=goal)
    assert max((one[n] - usual[n]).abs().max().item() for n in one) > 1e-5
    assert max((two[n] - one[n]).abs().max().item() for n in one) < 1e-5
    for a, b in zip(rows, rows_of_one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and ("dvrp" in a) == (robustness > 0)


def test_one_process_goes_on_where_two_stopped(job):
    _, _, run = job
    two, rows, _ = run(2, "2-")
    one, rows_of_one, _ = run(1, "one-after-2", resume="2-")
    (row,) = rows_of_one  # the third update; the first two are in the checkpoint
    print(f"loss {row['loss']:.6f}, on two ranks {rows[2]['loss']:.6f}")
    assert row["loss"] == pytest.approx(rows[2]["loss"], rel=1e-5)
    worst = max((one[n] - two[n]).abs().max().item() for n in two)
    print(f"parameters differ by up to {worst:.1e}")
    assert worst < 1e-5


@LAYOUTS
def test_nan_on_one_rank_makes_every_rank_skip_and_stop_alike(job, ranks, parallel):
    _, _, run = job
    _, _, found = run(ranks, f"{ranks}-{'-'.join(parallel)}", **parallel)
    seen = [f["batches_with_nan"] > 0 for f in found]
    assert len(seen) == ranks and sum(seen) == 1
    alike = {str({k: v for k, v in f.items() if k != "batches_with_nan"}) for f in found}
    assert len(alike) == 1, alike
    result = found[0]
    assert [math.isnan(norm) for norm in result["norms"]] == [True, False, True, True]
    assert result["moved"] == [False, True, False, False]
    assert result["bad_updates"] == 4
    assert "in 3 updates in a row (train.max_bad_updates)" in result["stopped"]


def test_two_ranks_run_the_whole_loop_and_one_goes_on_with_their_weights(tmp_path):
    rows = [
        {"problem": "What?", "answer": str(i), "images": [png(i)] if i % 2 else []}
        for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    model = write_checkpoint(tmp_path / "model", "qwen2_5_vl")

    def command(out, steps, every=1):
        options = {
            "model.path": model,
            "model.dtype": "float32",
            "data.train": tmp_path / "data.parquet",
            "data.test": tmp_path / "data.parquet",
            "data.min-pixels": 56 * 56,
            "data.max-pixels": 112 * 112,
            "rollout.prompts": 4,
            "rollout.group-size": 2,
            "rollout.max-new-tokens": 5,
            "train.update-prompts": 2,
            "train.steps": steps,
            "train.lr": 1e-4,
            "train.checkpoint-every": every,
            "eval.samples": 1,
            "reward.workers": 1,
            "device": "cpu",
            "out": out,
        }
        flat = [text for k, v in options.items() for text in (f"--{k}", str(v))]
        return ["-m", "papo_fast", "train", "papo-g-7b", *flat, "--resume"]

    def metrics(out):
        path = tmp_path / out / "papo-g-7b-seed0" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    launch(2, command(tmp_path / "a", 2))
    assert [r["step"] for r in metrics("a")] == [1, 2]
    assert (tmp_path / "a" / "papo-g-7b-seed0" / "model" / "model.safetensors").stat().st_size
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    launch(1, command(tmp_path / "b", 2))  # nothing left to do but to load and to save
    two, one = (
        load_file(tmp_path / out / "papo-g-7b-seed0" / "model" / "model.safetensors")
        for out in ("a", "b")
    )
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=0, msg=name)
    assert metrics("b") == metrics("a")


MAIN_FIRST = """
import sys
from pathlib import Path
import torch
from papo_fast.cli import leave
from papo_fast.parallel import gather, gather_in_order, is_main, main_first, process_group, share_of

made = Path(sys.argv[1])
with process_group(torch.device("cpu")):
    with main_first():  # as the warm start, which evaluates on the way
        if is_main():
            made.write_text(str(gather_in_order(share_of("abc"), 3) + gather("alone")))
        assert made.read_text() == "[0, 1, 2, 'alone']"
    assert gather_in_order(share_of("abc"), 3) + gather("x") == [0, 1, 2, "x", "x"]
leave(0)
"""


def test_the_main_process_goes_first_without_waiting_for_the_others(tmp_path):
    script = tmp_path / "main_first.py"
    script.write_text(MAIN_FIRST)
    launch(2, [str(script), str(tmp_path / "made")])


GOODBYE = """
import atexit, os
from papo_fast.cli import leave

class Thread:  # stands in for one that does not survive the interpreter's teardown
    def __del__(self):
        os.abort()

keep = Thread()
atexit.register(print, "logs are closed", end="")
print("work is done", end=", ")
leave(3)
"""


@pytest.mark.parametrize(("ranks", "status"), [(1, -signal.SIGABRT), (2, 3)])
def test_a_rank_leaves_without_tearing_down_what_its_threads_use(ranks, status):
    environment = os.environ | {"WORLD_SIZE": str(ranks)}
    done = subprocess.run(
        [sys.executable, "-c", GOODBYE], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (status, "work is done, logs are closed")


def test_processes_on_gpus_can_reduce_what_is_offloaded():
    """NCCL alone cannot: the norm of offloaded gradients lies in the CPU's memory."""
    assert backend(torch.device("cpu")) == "gloo"
    by_device = dict(part.split(":") for part in backend(torch.device("cuda")).split(","))
    assert by_device == {"cpu": "gloo", "cuda": "nccl"}
