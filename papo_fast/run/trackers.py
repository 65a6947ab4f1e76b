"""A run's metrics in wandb, tensorboard or trackio, beside `metrics.jsonl`; off by default."""

from __future__ import annotations

import importlib.util
import logging
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from papo_fast.errors import InputError
from papo_fast.run.metrics import Row

TRACKERS = ("wandb", "tensorboard", "trackio")
LEFT = ("wandb", "tensorboard", "tracker_id")
"""What they leave in a run's folder."""
PROJECT = "papo_fast"
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def installed_trackers() -> list[str]:
    """Those of `TRACKERS` that can be imported, in that order."""
    # a folder of that name, such as wandb makes, is no package: it has no origin
    specs = {name: importlib.util.find_spec(name) for name in TRACKERS}
    return [name for name, spec in specs.items() if spec is not None and spec.origin]


def check_tracker(name: str) -> None:
    """Raise `InputError` where the tracker that `track` names is not installed."""
    if name == "auto" and not installed_trackers():
        raise InputError(f"track is auto, but none of {', '.join(TRACKERS)} is installed")
    if name in TRACKERS and name not in installed_trackers():
        raise InputError(f"track is {name}, which is not installed: pip install {name}")


class Tracking:
    """What follows a run's steps; it does nothing with `none`.

    A tracker that fails is warned of once and left alone: it is not worth a run.

    Args:
        name: `none`, one of `TRACKERS`, or `auto` for the first that is installed.
        folder: the run's; its name is the run's name.
        settings: what the tracker shows of the configuration.
    """

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]):
        self.name = installed_trackers()[0] if name == "auto" else name
        self._tracker: Tracker | None = None
        if self.name != "none":
            self._do("start", lambda: _KINDS[self.name](folder, settings))

    def log(self, row: Row) -> None:
        """The numbers of a step's metrics."""
        numbers = {
            key: float(value)
            for key, value in row.items()
            if isinstance(value, int | float) and key != "step" and math.isfinite(value)
        }
        if self._tracker is not None:
            tracker = self._tracker
            self._do("log a step", lambda: tracker.log(numbers, row["step"]))

    def close(self) -> None:
        if self._tracker is not None:
            tracker = self._tracker
            self._do("close", tracker.close)

    def _do(self, what: str, action: Any) -> None:
        try:
            found = action()
        except Exception as error:  # whatever a library of others and a network may raise
            _log.warning("%s could not %s and is left alone: %s", self.name, what, error)
            self._tracker = None
        else:
            self._tracker = found or self._tracker


class _Wandb:
    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        # the same name after --resume continues the same curves
        self._run = wandb.init(
            project=PROJECT, name=folder.name, id=_id_of(folder), resume="allow",
            dir=str(folder), config=dict(settings),
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _Tensorboard:
    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder / "tensorboard"))
        self._writer.add_text("config", f"```\n{settings}\n```")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import trackio

        self._trackio = trackio
        # it knows runs by their name: of a run that begins again it would go on with the old one
        resume = "allow" if (folder / LEFT[-1]).is_file() else "never"
        _id_of(folder)
        trackio.init(project=PROJECT, name=folder.name, config=dict(settings), resume=resume)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


_KINDS = {"wandb": _Wandb, "tensorboard": _Tensorboard, "trackio": _Trackio}


def _id_of(folder: Path) -> str:
    """One for each run: a file in its folder keeps it, so that --overwrite begins a new one."""
    kept = folder / LEFT[-1]
    if not kept.is_file():
        kept.write_text(secrets.token_hex(8), encoding="utf-8")
    return kept.read_text(encoding="utf-8")
