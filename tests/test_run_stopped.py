"""What stops a run: a signal, an error, weights that are not finite; and what stays."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from papo_fast.errors import InputError
from papo_fast.launch import train
from papo_fast.run.stop import stop_on_signals
from papo_fast.update import Updater
from support.small_runs import (
    SILENT,
    checkpoints_of,
    resumable,
    run,
    with_train,
)


@pytest.fixture
def config(checkpoints, questions, tmp_path):
    return resumable(checkpoints, questions, tmp_path)


# One handler takes all signals: each place by one of them, and one place by all.
@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("evaluation", signal.SIGINT),
        ("step", signal.SIGINT),
        ("step", signal.SIGTERM),
        ("step", signal.SIGHUP),
        ("checkpoint", signal.SIGTERM),
        pytest.param("evaluation", signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param("checkpoint", signal.SIGINT, marks=pytest.mark.exhaustive),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_signal_keeps_the_last_step_wherever_it_comes(
    config, questions, monkeypatch, number, where
):
    every = 1 if where == "checkpoint" else 0
    config = with_train(config, steps=3, checkpoint_every=every)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=str(questions)))
    place = {
        "evaluation": "papo_fast.trainer.Trainer.evaluate",
        "step": "papo_fast.update.Updater.update",
        "checkpoint": "papo_fast.run.checkpoint.CheckpointStore.save",
    }[where]
    owner, _, name = place.rpartition(".")
    module, _, cls = owner.rpartition(".")
    original, calls = getattr(getattr(sys.modules[module], cls), name), []

    def interrupted(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, interrupted)
        folder = train(config, Console(quiet=True))
    done = {"evaluation": [], "step": [1], "checkpoint": [1]}[where]
    assert checkpoints_of(folder) == done and not (folder / "summary.json").exists()
    assert len(calls) == {"evaluation": 1, "step": 2, "checkpoint": 1}[where]
    _, rows, _ = run(config)
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_hangup_that_nohup_ignores_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_at_once_and_keeps_the_last_whole_step(config, monkeypatch):
    config = with_train(config, steps=3, checkpoint_every=0)
    original, calls = Updater.update, []

    def interrupted_twice(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # the first update of the second step
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Updater, "update", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        train(config, SILENT)
    assert checkpoints_of(Path(config.out) / "run") == [1]


class Unforeseen(Exception):
    pass


@pytest.mark.parametrize(
    ("at", "kept"), [(3, [1]), (4, [])], ids=["before an update", "between two updates"]
)
def test_any_error_keeps_the_last_step_while_its_weights_are_whole(config, monkeypatch, at, kept):
    config = with_train(config, checkpoint_every=0)
    _, whole, _ = run(dataclasses.replace(config, name="whole"))
    original, calls = Updater.update, []

    def fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:  # a step makes two updates
            raise Unforeseen
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "update", fails)
        with pytest.raises(Unforeseen):
            train(config, SILENT)
    assert len(calls) == at
    folder = Path(config.out) / "run"
    assert checkpoints_of(folder) == kept
    if kept:
        _, rows, _ = run(config)
        assert rows == whole


def test_weights_that_are_not_finite_are_never_kept(config, monkeypatch):
    config = with_train(config, steps=3, checkpoint_every=1)
    original, calls = torch.optim.AdamW.step, []

    def overflows(self, *args, **kwargs):
        calls.append(1)
        original(self, *args, **kwargs)
        if len(calls) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].view(-1)[-1] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflows)
    with pytest.raises(
        InputError, match=r"weights are no longer finite.*lower train\.lr"
    ) as caught:
        train(config, SILENT)
    assert "\n" not in str(caught.value)
    folder = Path(config.out) / "run"
    assert checkpoints_of(folder) == [1] and not (folder / "model").exists()
