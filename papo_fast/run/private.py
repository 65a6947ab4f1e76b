"""Folders that only this user can read or change, in places that everybody can write to."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path


def private_folder(path: Path) -> Path:
    """An empty folder of mode 700 at `path`, whose contents of an earlier run are deleted.

    Raises `OSError` where it or the folder around it is a symlink, where it is somebody else's, or
    where others could replace it.
    """
    around = path.parent
    around.mkdir(parents=True, exist_ok=True, mode=0o700)
    for place in (around, path):
        if place.is_symlink():
            raise OSError(f"{place} is a symlink: whoever made it decides where weights go")
    found = around.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{around} is no folder")
    others_write = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    if others_write or found.st_uid not in (0, os.getuid()):
        raise OSError(
            f"{around} is a folder in which others can replace yours: choose one of your own"
        )
    if path.exists():
        if path.stat().st_uid != os.getuid():
            raise OSError(f"{path} belongs to another user")
        shutil.rmtree(path)
    path.mkdir(mode=0o700)
    path.chmod(0o700)  # mkdir's mode passes through the umask
    return path
