"""Whether the data of a resumed run is what the run began with.

A file is the same where its SHA-256 is. That is not asked for where the file system says that the
file was not touched since: same file, size, time of the last write and of the last change. The last
of these cannot be set, so that a file that was written and dated back is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from papo_fast.config import Config
from papo_fast.errors import InputError

DATA = "data.json"

Mark = dict[str, Any]
"""`sha256` of a file, and what its file system says of it (`_untouched`)."""


@contextmanager
def marks_of_data(config: Config, folder: Path) -> Iterator[Future[dict[str, Mark]]]:
    """The marks of the files that are trained and evaluated on, made while the model is loaded.

    A resumed run is compared first, with what the run in `folder` began with: `InputError` where a
    file is another or cannot be read. Data of the hub has no mark, and neither has the digits task,
    whose data follows from the settings.
    """
    files = _files(config)
    known = check_data(config, folder) if config.resume else {}
    with ThreadPoolExecutor(1, "data-marks") as pool:
        yield pool.submit(_marks, files, known)


def check_data(config: Config, folder: Path) -> dict[str, Mark]:
    """Marks of the files that are as the run in `folder` began with them.

    Raises `InputError` where one is another.
    """
    try:
        before = json.loads((folder / DATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a new run, or one of an older version
    same = {}
    for name, path in _files(config).items():
        then = before.get(name) if isinstance(before, dict) else None
        if isinstance(then, str):  # of an older version
            then = {"sha256": then}
        if not isinstance(then, dict) or "sha256" not in then:
            continue
        now = _untouched(path)
        if any(then.get(key) != value for key, value in now.items()):
            other = then.get("size", now["size"]) != now["size"]
            if other or _sum(name, path) != then["sha256"]:
                raise InputError(
                    f"data.{name} {path} is not the file with which {folder} was started: the rows "
                    f"that are still to come would be others. Delete {folder / DATA} to go on with "
                    "it all the same"
                )
        same[name] = now | {"sha256": then["sha256"]}
    return same


def _files(config: Config) -> dict[str, Path]:
    named = (("train", config.data.train), ("test", config.data.test))
    if config.digits.enabled:
        return {}
    return {name: path for name, file in named if (path := Path(file).expanduser()).is_file()}


def _marks(files: dict[str, Path], known: dict[str, Mark]) -> dict[str, Mark]:
    marks: dict[str, Mark] = {}
    for name, path in files.items():
        if name in known:
            marks[name] = known[name]
        elif name == "test" and path == files.get("train"):
            marks[name] = marks["train"]
        else:
            # before the content: a file that is written meanwhile is read again
            now = _untouched(path)
            marks[name] = now | {"sha256": _sum(name, path)}
    return marks


def _untouched(path: Path) -> Mark:
    """What stays as it is as long as nobody touches the file."""
    about = os.stat(path)
    return {
        "file": f"{about.st_dev}:{about.st_ino}",
        "size": about.st_size,
        "written_ns": about.st_mtime_ns,
        "changed_ns": about.st_ctime_ns,
    }


def _sum(name: str, path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise InputError(f"data.{name} {path} cannot be read: {error}") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
