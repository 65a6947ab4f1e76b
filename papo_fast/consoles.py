"""Consoles that outlive their readers, and libraries that are silent where our own line says it."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text


class Unfailing:
    """A stream of text that is written to as long as it can be, and in silence from then on.

    What is printed is not worth the work of hours: its reader may go away (`| head`), its terminal
    may be closed, and the disk of its file may be full. The last is said on stderr.

    Attributes:
        lost: what the operating system said where a file lacks what was printed, else None.
    """

    def __init__(self, stream: IO[str]):
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._fall_silent(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fall_silent(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _fall_silent(self, error: OSError) -> None:
        silence(self._stream)
        if error.errno not in _NOBODY_READS:
            self.lost = error
            sys.stderr.write(f"what is printed is lost from here on: {error}\n")


_NOBODY_READS = (errno.EPIPE, errno.EIO)
"""Of a pipe whose reader has gone, and of a terminal that was closed."""


def as_command(main: Callable[[], int | None]) -> int:
    """The exit status of a command, whatever becomes of its output; 1 for a file that lacks it."""
    open_missing_streams()
    stdout = sys.stdout = cast(Any, Unfailing(sys.stdout))
    sys.stderr = cast(Any, Unfailing(sys.stderr))
    status = main() or 0
    stdout.flush()
    return status or int(stdout.lost is not None)


def make_console(*, stderr: bool = False) -> Console:
    """A console of stdout or stderr that goes on once nobody reads it any more."""
    console = Console(stderr=stderr, highlight=False)
    outlive_readers(console)
    return console


def outlive_readers(console: Console) -> None:
    """Go on in silence once nobody reads the output any more, as after `| head`."""
    if not isinstance(console.file, Unfailing):
        console.file = cast(Any, Unfailing(console.file))


def say(console: Console, line: str | Text) -> None:
    """Print a line as it is: what stands in brackets, as in a path, is no markup."""
    console.print(line, markup=False, soft_wrap=True)


def warn(console: Console, line: str) -> None:
    """Print a line that is marked as a warning."""
    say(console, Text.assemble(("warning:", "yellow"), f" {line}"))


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
