"""What must be as it was for a run to go on: its settings and its metrics."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from papo_fast.config import Config
from papo_fast.errors import InputError
from papo_fast.run.files import CONFIG, METRICS, SUMMARY
from papo_fast.run.metrics import Row, json_line

# Settings that may differ between a run and its continuation: none of them changes a step.
_FREE = ("resume", "overwrite", "out", "name", "device", "preset", "track")
_FREE_IN_TRAIN = ("checkpoint_every", "keep_checkpoints", "max_tokens")
# Under a linear schedule the number of steps decides every step's learning rate.
_FREE_WHERE_LR_IS_CONSTANT = ("steps", "epochs")
_FREE_IN_ROLLOUT = (
    *("gpu_memory", "tensor_parallel"),
    *("server_urls", "server_timeout", "server_weights", "server_transfer", "server_token_file"),
)
# How long and how often a service is asked, and by how many.
_FREE_IN_REWARD = ("http_timeout", "http_retries", "http_parallel")
_FREE_IN_EVAL = ("examples",)
_FREE_IN_MODEL = ("save_dtype",)
# A bad row that stopped a run may be skipped from there on.
_FREE_IN_DATA = ("on_bad_sample",)


def check_settings(config: Config, folder: Path) -> None:
    """Raise `InputError` where the run in `folder` was started with other settings than these."""
    path = folder / CONFIG
    if not path.is_file():
        left = [name for name in (METRICS, "checkpoints", SUMMARY) if (folder / name).exists()]
        if left:
            raise InputError(
                f"{folder} holds {' and '.join(left)} but no {CONFIG}: nothing says with which "
                "settings it was started, so it cannot be resumed. Choose another --name"
            )
        return
    before, now = _settings(path), json.loads(json.dumps(asdict(config)))
    free = {"": _FREE, "train": _FREE_IN_TRAIN, "rollout": _FREE_IN_ROLLOUT, "data": _FREE_IN_DATA}
    free |= {"reward": _FREE_IN_REWARD, "eval": _FREE_IN_EVAL, "model": _FREE_IN_MODEL}
    if config.train.lr_schedule == "constant":
        free["train"] += _FREE_WHERE_LR_IS_CONSTANT
    if config.digits.enabled:  # filled in from the cache
        free |= {"model": (*_FREE_IN_MODEL, "path"), "data": (*free["data"], "train", "test")}
    for settings in (before, now):
        for section, names in free.items():
            part = settings.get(section) if section else settings
            for name in names if isinstance(part, dict) else ():
                part.pop(name, None)
    if changed := _differences(before, now):
        reason = ""
        if any(line.startswith("threads ") for line in changed):
            reason = ". With another number of threads, sums are rounded otherwise"
        if any(line.startswith(("train.steps ", "train.epochs ")) for line in changed):
            reason = ". Under lr_schedule linear they set the learning rate of every step"
        raise InputError(
            f"{folder} was started with other settings, so it cannot be resumed with these: "
            + "; ".join(changed)
            + reason
        )


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): the run cannot be resumed") from error
    if not isinstance(settings, dict) or "train" not in settings:
        raise InputError(f"{path} holds no settings of a run: it cannot be resumed")
    return settings


def _differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    found = []
    for name in sorted(before.keys() | now.keys()):
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} was {a!r} and is {b!r}")
    return found


def finished_steps(config: Config, folder: Path) -> int | None:
    """Steps of a run that is finished and to which this configuration adds none, else None."""
    try:
        steps = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["steps"]
        before = _settings(folder / CONFIG)["train"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if config.train.steps:
        return steps if config.train.steps <= steps else None
    same = not before.get("steps") and before.get("epochs") == config.train.epochs
    return steps if same else None


def rows_until(rows: list[Row], done: int, path: Path) -> list[Row]:
    """The rows of steps 1 to `done`, for a checkpoint of step `done`.

    Raises `InputError` where the file does not begin with just these.
    """
    for number in range(1, done + 1):
        found = rows[number - 1].get("step") if number <= len(rows) else None
        if found != number:
            what = "ends" if number > len(rows) else f"has {json_line({'step': found})}"
            raise InputError(
                f"{path} {what} where the row of step {number} should be, and the checkpoint is of "
                f"step {done}: it is damaged. Put the rows of steps 1 to {done} back, or start "
                "again with --overwrite"
            )
    return rows[:done]


def check_that_nothing_is_lost(rows: list[Row], every: int, folder: Path) -> str | None:
    """For a run without a checkpoint: None where it has done nothing, or what is done again.

    That can be step 1 alone, where its checkpoint was due and the run was killed before it was
    whole: a scheduler that starts a run again and again would never get past it otherwise.

    Raises `InputError` where more would be done again, or a finished run.
    """
    if not rows:
        return None
    if len(rows) > min(every, 1) or (folder / SUMMARY).is_file():
        steps = "1 step" if len(rows) == 1 else f"{len(rows)} steps"
        raise InputError(
            f"{folder} has done {steps} and left no checkpoint to resume from: --overwrite in "
            "place of --resume does them again from the start, or choose another --name"
        )
    return "step 1 had no whole checkpoint yet and is done again"
