"""Runs that are killed, stopped, out of space or changed under way, and what resuming gives."""

from __future__ import annotations

import dataclasses
import errno
import io
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from rich.console import Console

from papo_fast.errors import InputError
from papo_fast.launch import train
from papo_fast.run.checkpoint import CheckpointStore
from support.own_locks import own_progress_locks
from support.small_runs import every_term, run, small

FORK = multiprocessing.get_context("fork")


def resumable(config, **changes):
    changes = {"steps": 5, "checkpoint_every": 1} | changes
    return dataclasses.replace(
        config, name="run", resume=True, train=dataclasses.replace(config.train, **changes)
    )


@pytest.fixture
def config(checkpoints, questions, tmp_path):
    # a reference model, two updates a step, rows that repeat within the run
    config = small(every_term(), checkpoints["qwen2_5_vl"], questions, tmp_path / "a")
    return resumable(config)


def quiet_train(config):
    train(config, Console(file=io.StringIO()))


def train_in_fork(config):
    own_progress_locks()
    quiet_train(config)


@pytest.fixture
def child():
    """Starts a run in a process of its own; none outlives the test."""
    started = []

    def start(config):
        process = FORK.Process(target=train_in_fork, args=(config,))
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize(
    ("most", "steps"), [(3, 8), pytest.param(10, 20, marks=pytest.mark.exhaustive)]
)
def test_a_run_killed_at_random_moments_ends_with_the_same_metrics(
    config, child, tmp_path, most, steps
):
    config = resumable(config, steps=steps)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), resume=False)
    started = time.perf_counter()
    _, rows, summary = run(whole)
    duration = time.perf_counter() - started
    draw, kills, reached = random.Random(), 0, []
    while kills < most:
        process = child(config)
        process.join(draw.uniform(0.02, 0.3) * duration)
        if process.exitcode is not None:
            assert process.exitcode == 0
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        path = tmp_path / "a" / "run" / "metrics.jsonl"
        reached.append(len(path.read_text().splitlines()) if path.exists() else 0)
    print(f"killed {kills} times, after {reached} of {steps} steps")
    folder, resumed, resumed_summary = run(config)
    assert resumed == rows
    for name in ("accuracy_before", "accuracy_after", "steps", "reward_timeouts"):
        assert resumed_summary[name] == summary[name]
    ours, theirs = (
        torch.load(p / "checkpoints" / f"step-{steps}" / "state.pt", weights_only=True)["rng"]
        for p in (folder, tmp_path / "whole" / "run")
    )
    assert torch.equal(ours, theirs)
    assert not list(folder.rglob("*.partial"))


def test_a_run_killed_between_its_summary_and_its_report_draws_it_later(config, child, tmp_path):
    folder = tmp_path / "a" / "run"
    process = child(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)))
    while not (folder / "report.png.partial").exists():
        assert process.exitcode is None, "it ended before it could be killed"
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (folder / "summary.json").exists() and not (folder / "report.html").exists()
    quiet_train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)))
    assert (folder / "report.png").stat().st_size > 10_000
    assert (folder / "report.html").exists()
    assert not list(folder.rglob("*.partial"))
    drawn = (folder / "report.html").stat().st_mtime_ns
    quiet_train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)))
    assert (folder / "report.html").stat().st_mtime_ns == drawn  # a whole one stays


def test_sigterm_writes_a_checkpoint_and_exits_with_zero(config, child, tmp_path):
    config = resumable(config, steps=500, checkpoint_every=0)
    process = child(config)
    metrics = tmp_path / "a" / "run" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    [saved] = CheckpointStore(tmp_path / "a" / "run" / "checkpoints").saved()
    steps = len(metrics.read_text().splitlines())
    assert saved.step == steps < 500
    assert not (tmp_path / "a" / "run" / "summary.json").exists()


def test_a_full_disk_is_reported_and_leaves_the_last_checkpoint(config, tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp

    save, calls = dcp.save, []

    def full_at_the_third(state, *, checkpoint_id, **kwargs):
        calls.append(checkpoint_id)
        if len(calls) == 3:
            (checkpoint_id / "part").parent.mkdir(parents=True, exist_ok=True)
            (checkpoint_id / "part").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(state, checkpoint_id=checkpoint_id, **kwargs)

    monkeypatch.setattr(dcp, "save", full_at_the_third)
    with pytest.raises(InputError, match=r"step 3 .*No space left.*step-2.*--resume"):
        quiet_train(config)
    store = CheckpointStore(tmp_path / "a" / "run" / "checkpoints")
    assert [s.step for s in store.saved()] == [1, 2]
    assert not list(store.folder.glob("*.partial"))
    _, rows, _ = run(config)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5]


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.4)):
        with torch.no_grad():
            model.weight.fill_(step)
        store.save(step, model, optimizer, {"score": score, "step": step})
    assert [s.step for s in store.saved()] == [2, 4, 5]
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    assert store.load(model, optimizer)["step"] == 5
    assert torch.equal(model.weight, torch.full((2, 2), 5.0))


def test_a_run_is_not_resumed_with_other_settings(config):
    quiet_train(resumable(config, steps=1))
    changed = dataclasses.replace(
        config, seed=7, objective=dataclasses.replace(config.objective, kl_prcp_coef=0.5)
    )
    with pytest.raises(InputError, match=r"kl_prcp_coef was 0.02 and is 0.5; seed was 0 and is 7"):
        quiet_train(changed)
    with pytest.raises(InputError, match="pass one of them"):
        quiet_train(dataclasses.replace(config, overwrite=True))


def test_more_steps_can_be_added_to_a_finished_run(config, tmp_path):
    _, once, _ = run(dataclasses.replace(config, out=str(tmp_path / "once")))
    run(resumable(config, steps=2))
    _, rows, summary = run(config)
    assert rows == once and summary["steps"] == 5
