"""Our data files as the conversations with pictures that TRL's trainers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from papo_fast.config import DataConfig
from papo_fast.data.encoder import content_parts
from papo_fast.data.rows import as_list, open_image
from papo_fast.errors import InputError


def conversations(source: str | Path, data: DataConfig | None = None) -> datasets.Dataset:
    """Rows with `prompt`, `images` and `answer`, made when they are read.

    Args:
        source: .parquet or .jsonl file as `DataConfig.train` takes it.
        data: its column names and `prompt_suffix`; None: the defaults.

    Raises:
        InputError: there is no such file or a column is missing.
    """
    data = data or DataConfig()
    path = Path(source).expanduser()
    kinds = {".parquet": "parquet", ".jsonl": "json"}
    if path.suffix not in kinds or not path.is_file():
        raise InputError(f"there is no file {source}; expected a .parquet or .jsonl file")
    table = datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    for key in (data.problem_key, data.answer_key, data.images_key):
        if key not in table.column_names:
            raise InputError(f"{source} has no column {key!r}: {', '.join(table.column_names)}")

    def transform(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images = [
            [open_image(value, i, path.parent) for i, value in enumerate(as_list(values))]
            for values in rows[data.images_key]
        ]
        prompts = [
            [
                {
                    "role": "user",
                    "content": content_parts(problem + data.prompt_suffix, len(pictures)),
                }
            ]
            for problem, pictures in zip(rows[data.problem_key], images, strict=True)
        ]
        return {"prompt": prompts, "images": images, "answer": list(rows[data.answer_key])}

    return table.with_transform(transform)
