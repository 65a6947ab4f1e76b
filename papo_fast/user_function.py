"""A function of the user's own, named on the command line as `FILE.py:name`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from papo_fast.errors import InputError


def load_function(named: str, setting: str) -> Callable[..., Any]:
    """The function `name` of the file in `named`, "FILE.py:name"; the file is run to find it.

    Args:
        setting: whose value `named` is, for the message.

    Raises `InputError` where there is no such file, it cannot be run, or has no such function.
    """
    file, colon, name = named.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise InputError(f"{setting}: {named!r} is not of the form FILE.py:name")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{setting}: {file} is not a file (looked for from {Path.cwd()})")
    # a name of its own: a user's file may be called like a module of Python
    loader = SourceFileLoader(f"papo_fast_user_{path.stem}", str(path))
    module = ModuleType(loader.name)
    module.__file__ = str(path)
    try:
        loader.exec_module(module)
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{setting}: {file} cannot be run ({what})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{setting}: {file} has no function {name}")
    return function
