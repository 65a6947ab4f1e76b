"""A model of under a million parameters and 64 questions, made here, for the examples to run on."""

import tempfile
from pathlib import Path

from papo_fast.digits.model import build_checkpoint
from papo_fast.digits.task import write_questions


def tiny_files() -> tuple[str, str]:
    """Paths of an untrained checkpoint and of a data file, in a new temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="papo_fast_tiny_"))
    build_checkpoint(folder / "model", seed=0)
    write_questions(folder / "train.parquet", 64, "train", 0)
    return str(folder / "model"), str(folder / "train.parquet")
