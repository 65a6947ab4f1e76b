"""What a response says that it reads in the picture."""

from __future__ import annotations

import re


def reading(response: str) -> str | None:
    """What stands between <think> and </think>, or None where there is no such pair."""
    match = re.search(r"<think>(.*?)</think>", response, re.DOTALL)
    return match.group(1).strip() if match else None
