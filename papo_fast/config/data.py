"""Questions and their pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    train: str = ""
    """Training data: a .parquet or .jsonl file, or a hub dataset name."""
    test: str = ""
    """Held-out data for evaluation; empty: no evaluation before and after."""
    problem_key: str = "problem"
    """Column with the question's text."""
    answer_key: str = "answer"
    """Column with the reference answer."""
    images_key: str = "images"
    """Column with a list of images, as bytes or as paths relative to the file."""
    kind_key: str = "kind"
    """Optional column that splits the evaluation table, e.g. vision_dependent / text_leaning."""
    reading_key: str = "reading"
    """Optional column with what the picture says, for the split of errors into perception and
    reasoning: a response read it right if the same stands between <think> and </think>."""
    prompt_suffix: str = (
        " You first think through the reasoning process as an internal monologue, enclosed "
        "within <think> </think> tags. Then, provide your final answer enclosed within \\boxed{}."
    )
    """Appended to every question (PAPO's instruction)."""
    max_prompt_length: int = 4096
    """Longest prompt in tokens, image tokens included."""
    min_pixels: int = 200_704
    """Smaller images are enlarged to this many pixels."""
    max_pixels: int = 1_003_520
    """Larger images are shrunk to this many pixels."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An unreadable image, an empty answer or a too long prompt: stop, or skip it and count."""
    shuffle: bool = True
    """Shuffle the training data each epoch (seeded)."""
