"""One process at a time in a folder: a file that says which one it is.

A lock whose process is gone is taken over, so a killed run needs no cleaning up after. Only the
machine of the lock can tell that: on another one it stays until somebody deletes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from papo_fast.errors import InputError

LOCK = "lock.json"


class Locked(InputError):
    """Another process holds the folder."""

    def __init__(self, folder: Path, holder: dict[str, Any]):
        self.holder = holder
        where = "" if is_here(holder) else f" of {holder.get('host')}"
        super().__init__(
            f"{folder} is in use by process {holder.get('pid')}{where}: wait for it or end it. If "
            f"there is no such process, delete {folder / LOCK}"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which exists, while the block lasts.

    Raises `Locked` where another process does.
    """
    path = folder / LOCK
    with _alone(folder):
        if path.exists() and (holder := _read(path)) is not None and may_live(holder):
            raise Locked(folder, holder)
        partial = folder / f"{LOCK}.{os.getpid()}.partial"
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        partial.write_text(json.dumps(me) + "\n", encoding="utf-8")
        partial.replace(path)
    try:
        yield
    finally:
        with suppress(OSError):
            if _read(path) == me:
                path.unlink()


def is_here(holder: dict[str, Any]) -> bool:
    """Whether the holder is, or was, a process of this machine."""
    return holder.get("host") == socket.gethostname()


def may_live(holder: dict[str, Any]) -> bool:
    """Whether the process of a lock is, as far as this machine can tell, still there."""
    if not is_here(holder):
        return True
    pid = holder["pid"]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return holder.get("started") == _started(pid)  # otherwise another one that got its number


def _started(pid: int) -> str | None:
    """When a process was started, by the boot and its ticks; None for one that has ended.

    Systems without /proc cannot tell, and say "".
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says; None where it says nothing that a lock of ours would."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No two processes look at a lock and take it at the same time, where the disk can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network disk without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
