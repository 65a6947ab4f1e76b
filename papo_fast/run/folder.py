"""The folder of a run: a new one, or the one to continue; and its JSON files."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from papo_fast.config import Config
from papo_fast.errors import InputError
from papo_fast.run.clock import Clock
from papo_fast.run.files import CONFIG
from papo_fast.run.lock import LOCK, Locked, locked
from papo_fast.run.resume import check_settings
from papo_fast.run.trackers import LEFT
from papo_fast.whole_files import written_whole

_OF_NO_STEP = {LOCK, "vllm_server.log", "server_weights", *LEFT}
"""What a run leaves that ended before its first step began."""


@contextmanager
def run_folder(config: Config) -> Iterator[Path]:
    """The folder of this run, which nobody else writes to while the block lasts.

    Raises `InputError` where it is in use, holds another run, cannot be continued, or cannot be
    made or written to.
    """
    _check_name(config.run_name)
    _check_characters(Path(config.out) / config.run_name)
    with ExitStack() as held:
        try:
            path = _to_continue(config, held) if config.resume else _new(config, held)
        except OSError as error:
            raise InputError(
                f"out is {config.out!r}, and the folder of this run cannot be made or written to "
                f"in it: {error}"
            ) from error
        yield path


def _check_name(name: str) -> None:
    """A run stays in `out`: its name is one name, and no path to somewhere else."""
    if name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise InputError(
            f"name is {name!r}: expected the name of a folder in `out`, without slashes, and "
            "neither . nor .."
        )


def _check_characters(path: Path) -> None:
    """Tokenizers, for one, write to no path that is not Unicode: the model would be lost."""
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the folder of this run is {str(path.absolute())!r}, in which this locale finds bytes "
            "that are no characters: expected a path in UTF-8, and a locale such as LC_ALL=C.UTF-8"
        ) from error


def _new(config: Config, held: ExitStack) -> Path:
    """A run that was given a name is never replaced without `overwrite`; one that was not takes the
    next free name (`tiny-seed0`, `tiny-seed0-2`, ...), so that a command can simply be repeated.
    """
    path, taken = Path(config.out) / config.run_name, 1
    if config.overwrite and (path.is_symlink() or path.exists()):
        _check_that_it_is_ours(path)
        held.enter_context(locked(path))
        for entry in path.iterdir():
            if entry.name != LOCK:
                _delete(entry)
        return path
    while True:
        if not path.is_symlink() and (not path.exists() or _is_unused(path)):
            path.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(locked(path))
            except Locked:
                if config.name:
                    raise
            else:
                return path
        if config.name:
            raise InputError(
                f"{path} already holds a run: choose another --name, or pass --overwrite to "
                "replace it"
            )
        taken += 1
        path = Path(config.out) / f"{config.run_name}-{taken}"


def _is_unused(path: Path) -> bool:
    return path.is_dir() and {entry.name for entry in path.iterdir()} <= _OF_NO_STEP


def _check_that_it_is_ours(path: Path) -> None:
    """Raise where a folder to be replaced is anything but a run that this program has written."""
    if path.is_symlink() or not path.is_dir():
        raise InputError(f"{path} is no folder of its own: it will not be replaced")
    if _is_unused(path):
        return
    try:
        settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    ours = {"preset", "seed", "model", "data", "rollout", "objective", "train"}
    if not isinstance(settings, dict) or not ours <= settings.keys():
        raise InputError(
            f"{path} is not a run (no {CONFIG} of ours): it will not be replaced. Delete it "
            "yourself, or choose another --name"
        )


def _delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _to_continue(config: Config, held: ExitStack) -> Path:
    """The latest run of this name, or a new one."""
    first = Path(config.out) / config.run_name
    path, n = first, 2
    while not config.name and (first.with_name(f"{first.name}-{n}") / CONFIG).is_file():
        path, n = first.with_name(f"{first.name}-{n}"), n + 1
    path.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(path))
    check_settings(config, path)
    return path


def as_json(value: object) -> str:
    """Characters as they are, except half a one, which UTF-8 has none for and JSON an escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: Path, value: object) -> None:
    with written_whole(path) as partial:
        partial.write_text(as_json(value), encoding="utf-8")


def git_commit() -> str | None:
    """Commit of the source tree; None for an installed package, or where git does not answer."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git, or one that waits for a disk
        return None
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
