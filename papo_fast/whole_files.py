"""Files that are there whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give the path to write to, which takes the place of `path` when the block ends well.

    An older file at `path` stays as it is until then, and where the block fails. A process that is
    killed leaves the half-written file beside it, which the next one writes over.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
