"""Our data files as the conversations with pictures that TRL's trainers take."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import datasets

from papo_fast.config import DataConfig
from papo_fast.data.encoder import content_parts
from papo_fast.data.rows import (
    BadSample,
    as_answer,
    as_list,
    as_text,
    open_image,
    printable,
    read_rows,
)
from papo_fast.errors import InputError

_log = logging.getLogger(__name__)


def conversations(source: str | Path, data: DataConfig | None = None) -> datasets.Dataset:
    """Rows with `prompt`, `images` (RGB) and `answer` (text), made each time they are read.

    The file is read as the trainer reads it: no host is asked for anything.

    Args:
        source: .parquet or .jsonl file as `DataConfig.train` takes it.
        data: its column names, `prompt_suffix` and `on_bad_sample`; None: the defaults. `skip`
            leaves bad rows out, for which every row, its pictures included, is read once here.

    Raises:
        InputError: there is no such file, a column is missing or no row is usable. With
            `on_bad_sample="error"`, here or when that row is read: one that cannot be used.
    """
    data = data or DataConfig()
    path = Path(source).expanduser()
    if path.suffix not in (".parquet", ".jsonl"):
        raise InputError(f"there is no file {source}; expected a .parquet or .jsonl file")
    columns, rows, base = read_rows(str(path), "train", data.on_bad_sample)
    if not len(rows):
        raise InputError(f"{source} has no rows")
    for key in (data.problem_key, data.answer_key, data.images_key):
        if key not in columns:
            names = printable(", ".join(sorted(columns)), 1000)
            raise InputError(f"{source} has no column {key!r}: {names}")
    made = _Conversations(str(source), rows, base, data)
    numbers = list(range(len(rows)))
    if data.on_bad_sample == "skip":
        numbers = made.usable()
    return datasets.Dataset.from_dict({"row": numbers}).with_transform(made)


class _Conversations:
    """Row numbers → conversations; what `datasets` calls when rows are read."""

    def __init__(self, source: str, rows: Any, base: Path, data: DataConfig):
        self.source, self.rows, self.base, self.data = source, rows, base, data

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [self.conversation(number) for number in batch["row"]]
        return {key: [row[key] for row in found] for key in ("prompt", "images", "answer")}

    def conversation(self, number: int) -> dict[str, Any]:
        try:
            return self._conversation(number)
        except BadSample as bad:
            message = printable(f"{self.source}, row {number}: {bad}", 2000)
            raise InputError(
                f'{message}. Fix the row, or pass DataConfig(on_bad_sample="skip")'
            ) from bad

    def usable(self) -> list[int]:
        """Numbers of the rows that can be used; a warning says how many cannot, and why."""
        kept, skipped, first = [], Counter[str](), ""
        for number in range(len(self.rows)):
            try:
                self._conversation(number)
            except BadSample as bad:
                first = first or printable(f"row {number}: {bad}", 2000)
                skipped[bad.cause] += 1
            else:
                kept.append(number)
        if not kept:
            raise InputError(f"{self.source}: none of its {len(self.rows)} rows is usable; {first}")
        if skipped:
            _log.warning("%s: skipped %s; the first is %s", self.source, dict(skipped), first)
        return kept

    def _conversation(self, number: int) -> dict[str, Any]:
        row, data = self.rows[number], self.data
        problem = as_text(row.get(data.problem_key), data.problem_key, "problem")
        answer = as_answer(row.get(data.answer_key), data.answer_key)
        values = as_list(row.get(data.images_key))
        images = [open_image(value, i, self.base) for i, value in enumerate(values)]
        try:
            content = content_parts(problem + data.prompt_suffix, len(images))
        except InputError as error:
            raise BadSample("prompt", str(error)) from error
        return {
            "prompt": [{"role": "user", "content": content}],
            "images": images,
            "answer": answer,
        }
