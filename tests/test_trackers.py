"""Trackers get a run's metrics, and none of them ends a run.

None is installed where the tests run: modules of their names stand in, with the calls that the real
ones have (wandb 0.31, torch.utils.tensorboard of torch 2.13, trackio 0.43).
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from rich.console import Console

from papo_fast.errors import InputError
from papo_fast.launch import train
from papo_fast.presets import get_preset
from papo_fast.run import trackers
from papo_fast.run.trackers import Tracking, check_tracker, installed_trackers
from support.small_runs import small

ROW = {"step": 3, "reward": 0.5, "alarms": ["a"], "kl_prcp": float("nan"), "skipped_samples": 2}
LOGGED = {"reward": 0.5, "skipped_samples": 2.0}


def module(monkeypatch, name, **functions):
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, origin=f"{name}.py")
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def wandb(monkeypatch):
    """What has been called of it."""
    calls = []

    class Run:
        def log(self, metrics, *, step):
            calls.append(("log", metrics, step))

        def finish(self):
            calls.append(("finish",))

    def init(*, project, name, id, resume, dir, config):
        calls.append(("init", project, name, id, resume, config["seed"]))
        return Run()

    module(monkeypatch, "wandb", init=init)
    return calls


def test_wandb_gets_the_numbers_and_the_same_run_after_resuming(wandb, tmp_path):
    for _ in range(2):
        tracking = Tracking("auto", tmp_path, {"seed": 7})
        tracking.log(ROW)
        tracking.close()
    one, two = wandb[:3], wandb[3:]
    assert one == two and one[1:] == [("log", LOGGED, 3), ("finish",)]
    assert one[0][1:3] == ("papo_fast", tmp_path.name) and one[0][4:] == ("allow", 7)


def test_trackio_and_tensorboard(monkeypatch, tmp_path):
    calls = []
    module(
        monkeypatch,
        "trackio",
        init=lambda *, project, name, config, resume: calls.append((project, name, resume)),
        log=lambda metrics, step=None: calls.append((metrics, step)),
        finish=lambda: calls.append("finish"),
    )
    for resume in ("never", "allow"):  # the second one is the same run, resumed
        tracking = Tracking("trackio", tmp_path, {})
        tracking.log(ROW)
        tracking.close()
        assert calls == [("papo_fast", tmp_path.name, resume), (LOGGED, 3), "finish"]
        calls.clear()

    class SummaryWriter:
        def __init__(self, log_dir):
            calls.append(log_dir)

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        add_text = flush = close = lambda self, *_: None

    calls.clear()
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    tracking = Tracking("tensorboard", tmp_path, {})
    tracking.log(ROW)
    folder = str(tmp_path / "tensorboard")
    assert calls == [folder, ("reward", 0.5, 3), ("skipped_samples", 2.0, 3)]


@pytest.mark.parametrize("at", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once(at, wandb, tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    if at == "init":
        sys.modules["wandb"].init = fail
    tracking = Tracking("wandb", tmp_path, {"seed": 0})
    if at != "init":
        monkeypatch.setattr(tracking._tracker._run, at, fail, raising=False)
    tracking.log(ROW)
    tracking.log(ROW)
    tracking.close()
    warnings = [r.getMessage() for r in caplog.records if "left alone" in r.getMessage()]
    assert len(warnings) == 1 and "no network" in warnings[0]


def test_what_is_not_installed_is_refused_and_a_folder_is_not_a_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb").mkdir()  # as wandb makes beside a script
    monkeypatch.setattr(trackers, "TRACKERS", ("wandb", "papo_fast_no_tracker"))
    for name in ("wandb",):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if "wandb" in installed_trackers():
        pytest.skip("wandb is installed here")
    with pytest.raises(InputError, match="wandb, which is not installed"):
        check_tracker("wandb")
    with pytest.raises(InputError, match="none of wandb, papo_fast_no_tracker is installed"):
        check_tracker("auto")
    check_tracker("none")


def test_a_run_is_tracked(wandb, checkpoints, questions, tmp_path):
    config = small(get_preset("grpo"), checkpoints["qwen2_5_vl"], questions, tmp_path)
    data = dataclasses.replace(config.data, test="")
    config = dataclasses.replace(config, data=data, track="wandb", seed=4)
    folder = train(config, Console(file=io.StringIO()))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [call[0] for call in wandb] == ["init", "log", "log", "finish"]
    assert [call[1]["loss"] for call in wandb[1:3]] == [row["loss"] for row in rows]
    assert json.loads((folder / "config.json").read_text())["track"] == "wandb"
