"""Engines that sample responses. All speak `RolloutEngine`; `hf` runs transformers' own model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from papo_fast.processing import EncodedPrompt
from papo_fast.sequences import Completion


class RolloutEngine(Protocol):
    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> list[list[Completion]]:
        """Sample `n` responses to each prompt; the same seed and weights give the same tokens."""
        ...
