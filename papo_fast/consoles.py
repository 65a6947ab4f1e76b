"""Consoles that outlive their readers, and libraries that are silent where our own line says it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from rich.console import Console


def make_console(*, stderr: bool = False) -> Console:
    """A console of stdout or stderr that goes on once nobody reads it any more."""
    console = Console(stderr=stderr, highlight=False)
    outlive_readers(console)
    return console


def outlive_readers(console: Console) -> None:
    """Go on in silence once nobody reads the output any more, as after `| head`."""

    def go_on() -> None:
        console.quiet = True
        silence(console.file)

    console.on_broken_pipe = go_on  # type: ignore[method-assign]


def silence(stream: IO[Any]) -> None:
    """Have what is still written to `stream` go nowhere, its buffer at the exit included."""
    with suppress(OSError, ValueError):  # no file: nothing is left to fail
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


@contextmanager
def logged_from(level: int, library: Any) -> Iterator[None]:
    """Have a library of HuggingFace log what is of `level` or above; library: its `logging`."""
    before = library.get_verbosity()
    library.set_verbosity(level)
    try:
        yield
    finally:
        library.set_verbosity(before)


def open_missing_streams() -> None:
    """Have printing never fail: what the shell closed (`>&-`) is None in Python and is opened, and
    characters that a stream cannot write, such as half an emoji, are written as `\\ud83d`."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # in this order each gets the number that is its own
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif name != "stdin" and isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
