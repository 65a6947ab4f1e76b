"""What a run measured: one JSON object a training step.

The log is strict JSON (a NaN or an infinity is written as null), so any reader of JSON lines can
follow a run while it trains.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from papo_fast.errors import InputError

Row = dict[str, Any]


def json_line(row: Mapping[str, Any]) -> str:
    """`row` as one line of strict JSON, without the newline; NaN and infinities become null.

    Scalars of torch or numpy are written as the number they hold. Raises `TypeError` for anything
    JSON has no word for.
    """
    return json.dumps(_strict(row), allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "item"):
        return _strict(value.item())
    return value


def read_json_lines(path: Path) -> tuple[list[Row], str | None]:
    """Rows of a file with one JSON object a line, and a note if its last line was cut short.

    A process that is killed while it writes leaves a last line without a newline that does not
    parse: that line is left out and the note says so. Any other line that is not a JSON object
    raises `InputError` with its number. Empty lines are passed over.
    """
    lines = path.read_bytes().split(b"\n")  # bytes: a cut can fall inside a character
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return rows, f"{path.name}: line {number} was cut short and is left out"
            raise InputError(
                f"{path}, line {number} is not JSON ({error}): {_shown(line)}. "
                "Delete or repair that line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, found {_shown(line)}")
        rows.append(row)
    return rows, None


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", errors="replace")
    return repr(text if len(text) <= 80 else text[:80] + "…")


def read_metrics(path: Path) -> tuple[list[Row], str | None]:
    """Rows of a `metrics.jsonl`, and a note if the last line was cut short (see `read_json_lines`).

    Raises `InputError` if the file is missing or has a malformed line before its end.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: the run has not finished its first step")
    return read_json_lines(path)


def mean_rows(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the rows that have it."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


class MetricsLog:
    """Appends rows to a JSON lines file, flushed to the operating system one by one.

    `resume=False` wants a new (or empty) file and raises `InputError` otherwise, so that two runs
    never end up in one log. `resume=True` continues an existing file; a last line that an earlier
    process left unfinished is removed first, since it would become a malformed line in the middle.
    """

    def __init__(self, path: Path, resume: bool = False):
        self.path = Path(path)
        if self.path.exists() and self.path.stat().st_size > 0:
            if not resume:
                raise InputError(
                    f"{self.path} already holds the metrics of a run: give this run another name, "
                    "resume that one, or replace it with --overwrite"
                )
            self._mend()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def _mend(self) -> None:
        _, torn = read_json_lines(self.path)
        data = self.path.read_bytes()
        if torn is not None:
            with self.path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
        elif not data.endswith(b"\n"):
            with self.path.open("ab") as file:
                file.write(b"\n")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row."""
        self._file.write(json_line(row) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have the operating system put all rows on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
