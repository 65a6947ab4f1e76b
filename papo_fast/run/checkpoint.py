"""Checkpoints that lose nothing: model, optimizer, random numbers, position in the data, step.

A checkpoint is written under another name and then renamed, so a folder called `step-N` was whole
when it got that name. Checksums tell whether it still is; one that is not is called
`step-N.damaged` from then on, and the one before is taken.
Weights and optimizer are torch's distributed format, which loads on another number of ranks.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
import shutil
import warnings
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
from papo_fast.parallel import gather, is_main, local, wait_for_all
from papo_fast.run.shards import SafePlanner, SafeReader, damage, write_manifest
from papo_fast.whole_files import PARTIAL

_log = logging.getLogger(__name__)

DAMAGED = ".damaged"
# a run of one process is no mistake
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


@dataclass(frozen=True)
class Saved:
    """One complete checkpoint."""

    path: Path
    step: int

    @property
    def score(self) -> float:
        """How good its steps were; a damaged one is never the best."""
        try:
            return self.state()["score"]
        except InputError:
            return -math.inf

    def state(self) -> dict[str, Any]:
        """What was saved beside weights and optimizer; plain values.

        Raises `InputError` where the file holds anything else, or cannot be read.
        """
        path = self.path / "state.pt"
        try:
            return torch.load(path, weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0]
            raise InputError(f"{path} cannot be read: {first}") from error


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
                write_manifest(partial)
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
        """Restore the latest one that is undamaged in place; its state, or None without any.

        Raises:
            InputError: all are damaged, or a file holds what no checkpoint does.
        """
        for leftover in self.folder.glob(f"*{PARTIAL}") if is_main() else ():
            _log.info("removing %s, which an interrupted run left unfinished", leftover)
            shutil.rmtree(leftover)
        if (latest := self._latest_undamaged()) is None:
            return None
        options = _options(model)
        weights, moments = get_state_dict(model, optimizer, options=options)
        _load(
            {"model": weights, "optimizer": moments},
            storage_reader=SafeReader(latest.path / "shards"),
            planner=SafePlanner(),
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

    def _latest_undamaged(self) -> Saved | None:
        found, put_aside = None, []
        for saved in reversed(self.saved()) if is_main() else ():
            if (what := damage(saved.path)) is None:
                found = saved
                break
            aside = saved.path.with_name(saved.path.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            saved.path.rename(aside)
            _log.warning("%s is damaged: %s; it is now %s", saved.path, what, aside.name)
            put_aside.append(str(aside))
        found, put_aside = gather((found, put_aside))[0]
        if found is None and put_aside:
            raise InputError(
                f"no checkpoint is left to resume from: {', '.join(put_aside)} are damaged. Put "
                "the files back, or start again with --overwrite"
            )
        return found

    def _drop_old(self) -> None:
        whole = self.saved()
        best = max(whole, key=lambda s: (s.score, s.step))
        for old in whole[: -self.keep]:
            if old != best:
                # renamed first: a half-deleted folder must not pass for a checkpoint
                doomed = old.path.with_name(old.path.name + PARTIAL)
                old.path.rename(doomed)
                shutil.rmtree(doomed)


def export_model(policy: Any, encoder: Any, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """The policy and its encoder as a HuggingFace checkpoint, in the place of an older one.

    Every rank of a sharded policy takes part; the main one writes.

    Args:
        dtype: of the weights that are written.
    """
    refuse_if_not_finite(list(policy.parameters()))
    partial = path.with_name(path.name + PARTIAL)
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
    policy.save(partial, dtype)
    if is_main():
        encoder.save_pretrained(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)


def refuse_if_not_finite(weights: list[torch.Tensor]) -> None:
    """Raise `InputError` on every rank where a weight of any of them is NaN or infinite."""
    ours = [local(w) for w in weights]
    ours = [w.detach() for w in ours if w.numel() and w.is_floating_point()]
    largest = torch._foreach_norm(ours, float("inf")) if ours else ()
    finite = not largest or bool(torch.stack([x.float() for x in largest]).isfinite().all())
    if not all(gather(finite)):
        raise InputError(
            "the weights are no longer finite after a finite gradient, so they are not kept: lower "
            "train.lr, or train in float32; --resume goes on from the checkpoint before, if there "
            "is one"
        )


def _load(state: dict[str, Any], **how: Any) -> None:
    try:
        dcp.load(state, **how)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        if isinstance(first, InputError):
            raise first from error
        raise InputError(f"a checkpoint cannot be read: {first}") from error


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
