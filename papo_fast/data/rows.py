"""Rows of a data file and the values in them: reading, checking, opening images."""

from __future__ import annotations

import codecs
import io
import json
import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from PIL import Image

from papo_fast.consoles import logged_from
from papo_fast.data.pictures import read_picture
from papo_fast.errors import InputError
from papo_fast.rewards.scorer import reference_of

MAX_ANSWER = 10_000
MAX_PATH = 4096
"""Characters; a longer text is no path on any system."""


class BadSample(Exception):
    """A row that cannot be used; `cause` is what skipped rows are counted by."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.cause, str(self))  # processes hand it on


class ListRows(list):
    """Rows of a .jsonl file, in memory; a line that holds no row is the `BadSample` it raises."""

    def __getitem__(self, index: Any) -> Any:
        row = super().__getitem__(index)
        if isinstance(row, BadSample):
            raise row.with_traceback(None)
        return row

    def column(self, key: str) -> list[Any]:
        return [row.get(key) if isinstance(row, dict) else None for row in self]


class ArrowRows:
    """Rows of a datasets.Dataset, memory-mapped; images stay encoded until they are opened."""

    def __init__(self, dataset: datasets.Dataset):
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._dataset[index].to_pylist()[0]
        except (ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise BadSample("row", f"it cannot be read: {printable(str(error), 500)}") from error

    def column(self, key: str) -> list[Any]:
        if key not in self._dataset.column_names:
            return [None] * len(self)
        values = self._dataset.select_columns([key])[:].column(key)
        try:
            return values.to_pylist()
        except (ValueError, OverflowError):  # one value is no UTF-8, or no date of Python's
            return [_as_python(value) for value in values]


def _as_python(value: pyarrow.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return None


def read_rows(
    source: str, split: str, on_bad: str = "error"
) -> tuple[set[str], ListRows | ArrowRows, Path]:
    """Columns, rows, and the folder that relative image paths start from.

    Args:
        on_bad: what a line that holds no row does: `error` raises here, `skip` leaves it to
            whoever asks for that row, who gets a `BadSample`.
    """
    path = Path(source).expanduser()
    if path.suffix in (".parquet", ".jsonl") and not _is_file(path):
        raise InputError(f"there is no file {source}; expected a .parquet or .jsonl file")
    if path.suffix == ".jsonl":
        try:
            rows = _read_jsonl(path, on_bad)
        except OSError as error:
            raise InputError(f"{source} cannot be read: {error}") from error
        return {key for row in rows if isinstance(row, dict) for key in row}, rows, path.parent
    if path.exists() and path.suffix != ".parquet":
        raise InputError(f"{source} is neither a .parquet nor a .jsonl file")
    try:
        if path.suffix == ".parquet":
            # datasets logs twice what it raises, which our one line says
            with logged_from(datasets.logging.CRITICAL, datasets.logging):
                table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(source, split=split)
    except (
        OSError,
        ValueError,
        datasets.exceptions.DatasetsError,
        pyarrow.ArrowException,
    ) as error:
        raise InputError(
            f"{source} cannot be read: {error}. Expected a .parquet or .jsonl file, or the name "
            f"of a hub dataset with a split {split!r} that is cached or can be downloaded"
        ) from error
    return set(table.column_names), ArrowRows(table), path.parent


def _read_jsonl(path: Path, on_bad: str) -> ListRows:
    rows = ListRows()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip():
                continue
            try:
                rows.append(_row(text))
            except BadSample as bad:
                message = f"line {number} {bad}"
                if on_bad == "error":
                    raise InputError(f"{path}, {message}") from bad
                rows.append(BadSample(bad.cause, message))
    return rows


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadSample("line", f"is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadSample("line", f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BadSample(
            "line",
            f"holds a {type(row).__name__}; expected an object with the columns, such as "
            '{"problem": …, "answer": …, "images": […]}',
        )
    return row


def as_kind(value: Any) -> str:
    return "" if value is None else printable(str(value), 10_000)


def as_text(value: Any, key: str, cause: str) -> str:
    """A text that is not empty and can be written as UTF-8, which half an emoji cannot."""
    if not isinstance(value, str) or not value.strip():
        raise BadSample(cause, f"column {key!r} holds {shown(value)}; expected a text")
    return _whole(value, key, cause)


def as_answer(value: Any, key: str) -> str:
    if isinstance(value, float) and math.isnan(value):
        value = None
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadSample("answer", f"column {key!r} is empty")
    if not isinstance(value, str | int | float):
        raise BadSample(
            "answer", f"column {key!r} holds a {type(value).__name__}; expected a text or a number"
        )
    try:
        answer = str(value)
    except ValueError as error:  # an integer of more than 4300 digits
        raise BadSample("answer", f"column {key!r} cannot be read: {error}") from error
    if len(answer) > MAX_ANSWER:
        raise BadSample(
            "answer", f"column {key!r} has {len(answer)} characters, more than {MAX_ANSWER}"
        )
    if not reference_of(answer) or not answer.strip("$ \t\n"):
        raise BadSample("answer", f"column {key!r} holds {answer!r}, which is an empty answer")
    return _whole(answer, key, "answer")


def as_reading(value: Any, key: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        raise BadSample(
            "reading", f"column {key!r} holds a {type(value).__name__}; expected a text"
        )
    return _whole(str(value), key, "reading")


def as_list(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def open_image(value: Any, number: int, base: Path) -> Image.Image:
    """RGB image from bytes, from {"bytes", "path"}, or from a path relative to `base`.

    Raises `BadSample` for whatever cannot be opened or decoded (see `pictures.read_picture`).
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if value.startswith("data:") or len(value) > MAX_PATH:
            raise BadSample(
                "image",
                f"image {number} is a text of {len(value)} characters, {shown(value)}; expected a "
                "path: give a picture itself as bytes, not in base64",
            )
        file: Any = base / value
        what = f"image {number} ({printable(str(file), 500)})"
        if not _is_file(file):
            raise BadSample(
                "image", f"{what}: there is no such file; paths are relative to the data file"
            )
    elif isinstance(value, bytes):
        file = io.BytesIO(value)
        what = f"image {number} ({len(value)} bytes)"
    else:
        raise BadSample(
            "image",
            f"image {number} is a {type(value).__name__}; expected bytes, a path or a "
            '{"bytes", "path"} pair with one of them set',
        )
    try:
        return read_picture(file)
    except Exception as error:  # each decoder has errors of its own
        reason = printable(str(error), 500) or type(error).__name__
        raise BadSample("image", f"{what} cannot be read: {reason}") from error


def shown(value: Any) -> str:
    """The value's repr for a message, cut where it is long."""
    if isinstance(value, str | bytes):
        return repr(value if len(value) <= 80 else value[:80]) + ("…" if len(value) > 80 else "")
    return printable(reprlib.repr(value), 200)


def printable(text: str, limit: int) -> str:
    """`text` as far as `limit`, with half emoji as escapes, so that a terminal can print it."""
    text = text if len(text) <= limit else text[:limit] + "…"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _whole(text: str, key: str, cause: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSample(
            cause,
            f"column {key!r} has half of a character (a lone surrogate) at position "
            f"{error.start}: the text was cut in two there",
        ) from error
    return text


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False
