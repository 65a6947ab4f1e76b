"""Rows of questions and the tables that tests of the data read them from."""

import json

from papo_fast.config import DataConfig
from papo_fast.data.prompts import PromptDataset

CONFIG = DataConfig(min_pixels=784, max_pixels=64 * 784, prompt_suffix=" Think.")
SKIP = DataConfig(min_pixels=784, max_pixels=64 * 784, prompt_suffix="", on_bad_sample="skip")
ROWS = 7


def row(number, **changes):
    return {
        "problem": f"What is {number}?",
        "answer": number,
        "images": [f"{number}.png"],
        "kind": "odd" if number % 2 else "even",
    } | changes


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def dataset(folder, encoder, rows, config=CONFIG, name="data.jsonl"):
    return PromptDataset(write_jsonl(folder / name, rows), config, encoder)
