"""What the examples run on: a model of under a million parameters, 64 questions, a reward."""

import tempfile
from pathlib import Path

from papo_fast.digits.model import build_checkpoint
from papo_fast.digits.task import write_questions
from papo_fast.rewards.scorer import equal_as_text, last_boxed


def tiny_files() -> tuple[str, str]:
    """Paths of an untrained checkpoint and of a data file, in a new temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="papo_fast_tiny_"))
    build_checkpoint(folder / "model", seed=0)
    write_questions(folder / "train.parquet", 64, "train", 0)
    return str(folder / "model"), str(folder / "train.parquet")


def reward(text: str, answer: str) -> float:
    """0.9 for the right answer in \\boxed{}, up to 0.1 for digits, an untrained model's foothold.

    By reading alone: where answers take algebra, use `papo_fast.rewards.scorer.Scorer`.
    """
    right = equal_as_text(answer, last_boxed(text) or "") is True
    return 0.9 * right + 0.1 * sum(c.isdigit() for c in text) / max(1, len(text))
