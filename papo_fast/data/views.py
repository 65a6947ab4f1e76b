"""The corrupted views of a prompt that one step looks at: one, or two."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

from torch import Tensor

from papo_fast.corruption_settings import CorruptionConfig
from papo_fast.data.corruption import PromptCorruption
from papo_fast.data.encoded import Later
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.prompts import Prompt


class CorruptedViews:
    """(prompt, seed) → pixels of the `aug` stream and of the second view, None without one.

    Attributes:
        first, second: the corruption of each; None without a second view.
        progress: share of the run that is done, in [0, 1], for noise that falls over it.
    """

    def __init__(self, config: CorruptionConfig, encoder: PromptEncoder):
        self.progress = 0.0
        self.first = PromptCorruption(config, encoder)
        self.second = None
        if config.second:
            second = replace(config, kind=config.second)
            self.second = PromptCorruption(second, encoder, setting="corruption.second")

    def check(self, columns: Collection[str]) -> None:
        """Raise `InputError` where a corruption needs a column that the data does not have."""
        for view in (self.first, self.second):
            if view is not None:
                view.check(columns)

    def check_row(self, prompt: Prompt) -> None:
        """Raise `InputError` where the prompt's row does not hold what a corruption needs."""
        for view in (self.first, self.second):
            if view is not None:
                view.check_row(prompt)

    def __call__(self, prompt: Prompt, seed: int) -> tuple[Tensor | None, Tensor | None]:
        first, second = self.later(prompt, seed)
        return first(), None if second is None else second()

    def later(self, prompt: Prompt, seed: int) -> tuple[Later, Later | None]:
        """The same pixels, made where they are used: no rank makes, or holds, those of others."""
        first, second = (
            None if view is None else Later(partial(view, prompt, seed, self.progress))
            for view in (self.first, self.second)
        )
        return first, second
