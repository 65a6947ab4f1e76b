"""Checkpoints that lose nothing: model, optimizer, random numbers, position in the data, step.

A checkpoint is written under another name and then renamed, so a folder called `step-N` is whole.
Weights and optimizer are torch's distributed format, which loads on another number of ranks.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from papo_fast.errors import InputError
from papo_fast.parallel import is_main, wait_for_all

_log = logging.getLogger(__name__)

PARTIAL = ".partial"
# a run of one process is no mistake
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


@dataclass(frozen=True)
class Saved:
    """One complete checkpoint."""

    path: Path
    step: int

    @property
    def score(self) -> float:
        return self.state()["score"]

    def state(self) -> dict[str, Any]:
        """What was saved beside weights and optimizer; plain values."""
        return torch.load(self.path / "state.pt", weights_only=True)


class CheckpointStore:
    """The checkpoints of one run: the last `keep` of them and the best are kept.

    Args:
        folder: holds `step-N` folders; made when the first one is written.
        keep: how many of the latest stay, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder)
        self.keep = keep

    def saved(self) -> list[Saved]:
        """Complete checkpoints, oldest first."""
        found = []
        for path in self.folder.glob("step-*"):
            match = re.fullmatch(r"step-(\d+)", path.name)
            if match:
                found.append(Saved(path, int(match[1])))
        return sorted(found, key=lambda s: s.step)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
    ) -> Path:
        """Write one and drop those that need not be kept.

        Args:
            state: plain values and tensors, which `Saved.state` gives back; its `score`
                decides which checkpoint is the best (higher is better).

        Raises:
            InputError: it cannot be written, for want of space or of permission; earlier
                checkpoints are left as they are.
        """
        final = self.folder / f"step-{step}"
        partial = self.folder / f"step-{step}{PARTIAL}"
        weights, moments = get_state_dict(model, optimizer, options=_options(model))
        try:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            wait_for_all()
            dcp.save(
                {"model": weights, "optimizer": moments},
                checkpoint_id=partial / "shards",
            )
            if is_main():
                torch.save(state, partial / "state.pt")
                _flush(partial)
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                _flush_folder(self.folder)
        except (OSError, RuntimeError, CheckpointException) as error:
            if is_main():
                shutil.rmtree(partial, ignore_errors=True)
            whole = self.saved()
            last = f"the last complete one is {whole[-1].path}" if whole else "there is none yet"
            raise InputError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {error}; "
                f"{last}. Make room there and run the same command with --resume"
            ) from error
        if is_main():
            self._drop_old()
        return final

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restore the latest one in place; its state, or None where there is none."""
        for leftover in self.folder.glob(f"*{PARTIAL}") if is_main() else ():
            _log.info("removing %s, which an interrupted run left unfinished", leftover)
            shutil.rmtree(leftover)
        if not (whole := self.saved()):
            return None
        latest = whole[-1]
        options = _options(model)
        weights, moments = get_state_dict(model, optimizer, options=options)
        dcp.load(
            {"model": weights, "optimizer": moments},
            checkpoint_id=latest.path / "shards",
        )
        set_state_dict(
            model,
            optimizer,
            model_state_dict=weights,
            optim_state_dict=moments,
            options=options,
        )
        _log.info("resumed from %s", latest.path)
        return latest.state()

    def _drop_old(self) -> None:
        whole = self.saved()
        best = max(whole, key=lambda s: (s.score, s.step))
        for old in whole[: -self.keep]:
            if old != best:
                # renamed first: a half-deleted folder must not pass for a checkpoint
                doomed = old.path.with_name(old.path.name + PARTIAL)
                old.path.rename(doomed)
                shutil.rmtree(doomed)


def export_model(policy: Any, encoder: Any, path: Path) -> None:
    """The policy and its encoder as a HuggingFace checkpoint, in the place of an older one.

    Every rank of a sharded policy takes part; the main one writes.
    """
    partial = path.with_name(path.name + PARTIAL)
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
    policy.save(partial)
    if is_main():
        encoder.save_pretrained(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)


def _options(model: nn.Module) -> StateDictOptions:
    """Frozen weights are left out: they are as they were loaded from the model's folder."""
    frozen = any(not p.requires_grad for p in model.parameters())
    # not strict: torch would miss the frozen ones. What was saved is asked for by name all the same
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _flush(folder: Path) -> None:
    """Have the operating system write the files' contents before their name says they are whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _flush_folder(path)


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class StopRequest:
    """Whether the process was asked to stop (SIGTERM, as clusters send it before they kill)."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, *_: object) -> None:
        if not self.requested:
            _log.warning("asked to stop (SIGTERM): finishing this step, then a checkpoint")
        self.requested = True


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Turns SIGTERM into a request that the loop can honour; only in the main thread."""
    request = StopRequest()
    try:
        before = signal.signal(signal.SIGTERM, request)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield request
        return
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
