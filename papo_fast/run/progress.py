"""Progress bars, and their plain form where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

Advance = Callable[..., None]
SILENCE = 20.0


class Progress:
    """One bar per long piece of work, shown while it lasts; pieces of work may be nested.

    Args:
        console: where to print. On a terminal the bars move; in a file or a pipe each finished
            piece of work that is not `transient` leaves one line, and one every `SILENCE` seconds
            while it lasts, so that logs stay readable.
    """

    def __init__(self, console: Console):
        self.console = console
        self._bars: RichProgress | None = None

    @contextmanager
    def task(self, label: str, total: int, transient: bool = False) -> Iterator[Advance]:
        """Yield `advance(n, note="")`; a `transient` bar vanishes when it is done."""
        if not self.console.is_terminal:
            with self._plain(label, total, transient) as advance:
                yield advance
            return
        outermost = self._bars is None
        if outermost:  # rich shows one live display at a time, so nested bars share it
            self._bars = RichProgress(
                TextColumn("{task.description:>22}"),
                BarColumn(bar_width=32),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                transient=transient,
            )
            self._bars.start()
        bars = self._bars
        task = bars.add_task(label, total=total, note="")
        try:
            yield lambda n=1, note=None: bars.update(
                task, advance=n, **({} if note is None else {"note": note})
            )
        finally:
            if transient:
                bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None

    @contextmanager
    def _plain(self, label: str, total: int, transient: bool) -> Iterator[Advance]:
        done, last, printed = 0, "", time.monotonic()

        def advance(n: int = 1, note: str = "") -> None:
            nonlocal done, last, printed
            done, last = done + n, note or last
            if time.monotonic() - printed > SILENCE and not transient:
                printed = time.monotonic()
                self.console.print(f"{label}: {done}/{total}. {last}".rstrip(), soft_wrap=True)

        yield advance
        if not transient:
            self.console.print(f"{label}: done. {last}".rstrip(), soft_wrap=True)
