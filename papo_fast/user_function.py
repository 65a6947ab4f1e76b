"""Functions of the user's own: `FILE.py:name` on the command line, plain ones in Python.

Settings are text. A function that a Python program hands over is kept here under a name of its own,
`python:NAME`, so that from there on both kinds go the same way.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any

from papo_fast.errors import InputError

PYTHON = "python:"
FORM = "FILE.py:name"
"""How a function of a file is named."""
LARGEST_WEIGHT = 1e6
"""Size of a function's weight beyond which it counts as a mistake; sums of terms stay finite."""

_given: dict[str, Any] = {}


def name_given(function: Any, taken: Collection[str] = ()) -> str:
    """The name under which `load_function` finds what a Python program has handed over.

    A later function of the same name takes the place of an earlier one, unless the name is of
    `taken`: then it gets a number.
    """
    own = getattr(function, "__name__", type(function).__name__)
    own = own if own.isidentifier() else "function"  # a lambda is called <lambda>
    name, n = PYTHON + own, 1
    while name in taken and _given.get(name) is not function:
        n += 1
        name = f"{PYTHON}{own}_{n}"
    _given[name] = function
    return name


def is_given(named: str) -> bool:
    """Whether a name is of a function that a Python program hands over."""
    return named.startswith(PYTHON)


def load_function(named: str, setting: str) -> Callable[..., Any]:
    """The function `name` of the file in `named`, "FILE.py:name"; the file is run to find it.

    A file is run once, until `forget_files`. `python:NAME` is what `name_given` was given.

    Args:
        setting: whose value `named` is, for the message.

    Raises `InputError` where there is no such file, it cannot be run, or has no such function.
    """
    if is_given(named):
        if named not in _given:
            raise InputError(
                f"{setting}: {named} was handed over by a Python program: hand it to "
                f"papo_fast.train again, or write it into a file and name it {FORM}"
            )
        return _given[named]
    path, name = _parts(named, setting)
    try:
        module = _module(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{setting}: {named.rpartition(':')[0]} is not a file (looked for from {Path.cwd()})"
        ) from error
    except (Exception, SystemExit) as error:  # a script, which ends where it has done its work
        raise InputError(f"{setting}: {path} cannot be run ({one_line(error)})") from error
    return _function_of(module, name, setting)


def forget_files() -> None:
    """Read files anew from here on. A run reads each once: a file that is edited or deleted while
    the run lasts changes nothing in it."""
    _module.cache_clear()


def source_of(named: str, setting: str) -> tuple[str, str, bytes]:
    """Path, name and the file's text of FILE.py:name, for `function_of_source` elsewhere."""
    path, name = _parts(named, setting)
    return str(path), name, path.read_bytes()


def function_of_source(path: str, name: str, source: bytes) -> Callable[..., Any]:
    """The function that `source_of` names, from the text as it was then."""
    return _function_of(_run(Path(path), source), name, path)


def _parts(named: str, setting: str) -> tuple[Path, str]:
    file, colon, name = named.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise InputError(f"{setting}: {named!r} is not of the form {FORM}")
    return Path(file).absolute(), name


def _function_of(module: ModuleType, name: str, setting: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{setting}: {module.__file__} has no function {name}")
    return function


def split_weight(entry: str, setting: str) -> tuple[str, float | None]:
    """`NAME=WEIGHT` in two; None where no number stands behind an equals sign.

    Raises `InputError` for a weight beyond ± `LARGEST_WEIGHT`, or that is no number.
    """
    name, equals, behind = entry.rpartition("=")
    try:
        weight = float(behind) if equals else None
    except ValueError:
        weight = None  # the sign is a part of the name, as in a URL
    if weight is None:
        return entry.strip(), None
    if not abs(weight) <= LARGEST_WEIGHT:  # NaN is not, either
        raise InputError(
            f"{setting}: {entry!r} has the weight {behind}: expected a number within "
            f"±{LARGEST_WEIGHT:g}"
        )
    return name.strip(), weight


@functools.cache
def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(path)
    return _run(path, path.read_bytes())


def _run(path: Path, source: bytes) -> ModuleType:
    # a name of its own: a user's file may be called like a module of Python, or like another's
    module = ModuleType(f"papo_fast_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look their names up
    exec(compile(source, path, "exec"), vars(module))
    return module


def one_line(error: BaseException) -> str:
    """What an exception says, even one that cannot say it."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())[:1000]
    except Exception:
        return type(error).__name__
