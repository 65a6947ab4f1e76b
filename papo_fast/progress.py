"""Progress bars, and their plain form where the output is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

Advance = Callable[..., None]


class Progress:
    """One bar per long piece of work, shown while it lasts.

    Args:
        console: where to print. On a terminal the bars move; in a file or a pipe each finished
            piece of work that took a while leaves one line, so that logs stay readable.
    """

    def __init__(self, console: Console):
        self.console = console

    @contextmanager
    def task(self, label: str, total: int, transient: bool = False) -> Iterator[Advance]:
        """Yield `advance(n, note="")`; `transient` bars vanish when they are done."""
        bar = RichProgress(
            TextColumn("{task.description:>18}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=transient or not self.console.is_terminal,
            disable=not self.console.is_terminal,
        )
        with bar:
            task = bar.add_task(label, total=total, note="")
            last = ""

            def advance(n: int = 1, note: str = "") -> None:
                nonlocal last
                last = note or last
                bar.update(task, advance=n, note=last)

            yield advance
        if not self.console.is_terminal and not transient:
            self.console.print(f"{label}: done. {last}".rstrip())
