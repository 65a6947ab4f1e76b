"""The built-in task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DigitsConfig:
    """The built-in task: arithmetic over handwritten digits, for the `tiny` presets."""

    enabled: bool = False
    """Build model and data on this machine instead of reading `model.path`, `data.train`."""
    cache: str = "runs/digits"
    """Where the data and the warm-started model are kept between runs."""
    train_questions: int = 8192
    """Training questions written to parquet."""
    test_questions: int = 512
    """Held-out questions written to parquet, half of each kind."""
    warm_accuracy: float = 0.36
    """Accuracy on vision-dependent questions at which the supervised warm start stops."""
    warm_max_steps: int = 1500
    """Supervised steps after which the warm start stops with an error."""
    task: Literal["digits", "digits-shortcut"] = "digits"
    """`digits-shortcut`: training questions carry hints that are right in 80 % of the rows, and the
    test has hints that are right, absent and misleading in equal parts."""
    held_out: Literal["test", "dev"] = "test"
    """Whose handwriting the held-out questions show; `dev` for choosing settings, so that the test
    stays unseen."""
