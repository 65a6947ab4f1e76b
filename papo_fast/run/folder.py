"""The folder of a run: a new one, or the one to continue; and its JSON files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

from papo_fast.config import Config
from papo_fast.errors import InputError
from papo_fast.run.clock import Clock
from papo_fast.run.files import CONFIG, is_run


def claim_run_dir(config: Config) -> Path:
    """The run's folder, made now.

    A run that was given a name is never replaced without `overwrite`; one that was not takes the
    next free name (`tiny-seed0`, `tiny-seed0-2`, ...), so that a command can simply be repeated.
    """
    path = Path(config.out) / config.run_name
    if config.overwrite and path.exists():
        if any(path.iterdir()) and not is_run(path):
            raise InputError(f"{path} is not a run (no config.json): it will not be replaced")
        shutil.rmtree(path)
    taken = 1
    while path.exists() and any(path.iterdir()):
        if config.name:
            raise InputError(
                f"{path} already holds a run: choose another --name, or pass --overwrite to "
                "replace it"
            )
        taken += 1
        path = Path(config.out) / f"{config.run_name}-{taken}"
    path.mkdir(parents=True, exist_ok=True)
    return path


# Settings that may differ between a run and its continuation: none of them changes a step.
_FREE = ("resume", "overwrite", "out", "name", "threads", "device", "preset")
_FREE_IN_TRAIN = ("steps", "epochs", "checkpoint_every", "keep_checkpoints", "max_tokens")
_FREE_IN_ROLLOUT = (
    *("gpu_memory", "tensor_parallel"),
    *("server_urls", "server_timeout", "server_weights"),
)
# A bad row that stopped a run may be skipped from there on.
_FREE_IN_DATA = ("on_bad_sample",)


def find_run_dir(config: Config) -> Path:
    """The run to continue: the latest of its name, or a new one.

    Raises `InputError` where it was started with other settings than these.
    """
    first = Path(config.out) / config.run_name
    path, n = first, 2
    while not config.name and (first.with_name(f"{first.name}-{n}") / CONFIG).is_file():
        path, n = first.with_name(f"{first.name}-{n}"), n + 1
    path.mkdir(parents=True, exist_ok=True)
    if (path / CONFIG).is_file():
        before, now = json.loads((path / CONFIG).read_text()), json.loads(as_json(asdict(config)))
        for name in _FREE:
            before.pop(name, None), now.pop(name, None)
        for name in _FREE_IN_TRAIN:
            before["train"].pop(name, None), now["train"].pop(name, None)
        for name in _FREE_IN_DATA:
            before["data"].pop(name, None), now["data"].pop(name, None)
        for name in _FREE_IN_ROLLOUT:
            before["rollout"].pop(name, None), now["rollout"].pop(name, None)
        if config.digits.enabled:  # filled in from the cache
            for settings in (before, now):
                settings["model"].pop("path")
                settings["data"].pop("train"), settings["data"].pop("test")
        if changed := _differences(before, now):
            raise InputError(
                f"{path} was started with other settings, so it cannot be resumed with these: "
                + "; ".join(changed)
            )
    return path


def _differences(before: dict, now: dict, prefix: str = "") -> list[str]:
    found = []
    for name in sorted(before.keys() | now.keys()):
        a, b = before.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} was {a!r} and is {b!r}")
    return found


def as_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(as_json(value))
    os.replace(partial, path)


def git_commit() -> str | None:
    """Commit of the source tree, or None for an installed package."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def describe(config: Config, steps: int, clock: Clock, bad_updates: int) -> dict[str, object]:
    """The entries of summary.json that say which run it is of."""
    return {
        "preset": config.preset,
        "seed": config.seed,
        "git_commit": git_commit(),
        "steps": steps,
        "seconds": round(clock.seconds, 1),
        "samples_per_question": config.eval.samples,
        "bad_updates": bad_updates,
    }
