"""Rows of a data file and the values in them: reading, checking, opening images."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from papo_fast.errors import InputError


class BadSample(Exception):
    """A row that cannot be used; `cause` is what skipped rows are counted by."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause


class ListRows(list):
    """Rows of a .jsonl file, in memory."""

    def column(self, key: str) -> list[Any]:
        return [row.get(key) for row in self]


class ArrowRows:
    """Rows of a datasets.Dataset, memory-mapped; images stay encoded until they are opened."""

    def __init__(self, dataset: datasets.Dataset):
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._dataset[index].to_pylist()[0]

    def column(self, key: str) -> list[Any]:
        if key not in self._dataset.column_names:
            return [None] * len(self)
        return self._dataset.select_columns([key])[:].column(key).to_pylist()


def read_rows(source: str, split: str) -> tuple[set[str], ListRows | ArrowRows, Path]:
    """Columns, rows, and the folder that relative image paths start from."""
    path = Path(source).expanduser()
    if path.suffix in (".parquet", ".jsonl") and not path.is_file():
        raise InputError(f"there is no file {source}; expected a .parquet or .jsonl file")
    if path.suffix == ".jsonl":
        rows = _read_jsonl(path)
        return {key for row in rows for key in row}, rows, path.parent
    if path.exists() and path.suffix != ".parquet":
        raise InputError(f"{source} is neither a .parquet nor a .jsonl file")
    try:
        if path.suffix == ".parquet":
            table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{source} cannot be read: {error}. Expected a .parquet or .jsonl file, or the name "
            f"of a hub dataset with a split {split!r} that is cached or can be downloaded"
        ) from error
    return set(table.column_names), ArrowRows(table), path.parent


def _read_jsonl(path: Path) -> ListRows:
    rows = ListRows()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, line {number} holds a {type(row).__name__}; expected an object with "
                    'the columns, such as {"problem": …, "answer": …, "images": […]}'
                )
            rows.append(row)
    return rows


def as_kind(value: Any) -> str:
    return "" if value is None else str(value)


def as_answer(value: Any, key: str) -> str:
    if isinstance(value, float) and math.isnan(value):
        value = None
    if value is None or (isinstance(value, str) and not value.strip()):
        raise BadSample("answer", f"column {key!r} is empty")
    if not isinstance(value, str | int | float):
        raise BadSample(
            "answer", f"column {key!r} holds a {type(value).__name__}; expected a text or a number"
        )
    return str(value)


def as_list(value: Any) -> Sequence[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def open_image(value: Any, number: int, base: Path) -> Image.Image:
    """RGB image from bytes, from {"bytes", "path"}, or from a path relative to `base`."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        file: Any = base / value
        what = f"image {number} ({file})"
        if not file.is_file():
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
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSample("image", f"{what} cannot be read: {error}") from error
    if 0 in image.size:
        raise BadSample("image", f"{what} is {image.width}x{image.height} pixels")
    return image
