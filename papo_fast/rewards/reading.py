"""What a response says that it reads in the picture."""

from __future__ import annotations

import re

_BESIDE_A_TAG = re.compile(r"(?<!\s)\s++(?=[<>/])|(?<=[<>/])\s+")


def tight(text: str) -> str:
    """Without white space beside `<`, `>` and `/`, as the authors' code reads `< think >`."""
    return _BESIDE_A_TAG.sub("", text)


def end_of_prompt(text: str) -> str:
    """As much of a prompt's end, in text, as tells whether it has opened <think>."""
    return text.rstrip()[-40:]


def reading(response: str, prompt: str = "") -> str | None:
    """What stands between <think> and </think>, or None where there is no such pair.

    Args:
        prompt: what the response follows, or its end, which may have opened <think> already.
    """
    opened = tight(prompt).rstrip().endswith("<think>")
    start = re.search(r"<\s*think\s*>", response)
    begin = start.end() if start else 0 if opened else None
    if begin is None:
        return None
    end = re.compile(r"<\s*/\s*think\s*>").search(response, begin)
    return response[begin : end.start()].strip() if end else None
