"""Engines that sample responses. All speak `RolloutEngine`; `hf` runs transformers' own model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from papo_fast.data.encoded import EncodedPrompt
from papo_fast.errors import InputError
from papo_fast.samples import Completion

if TYPE_CHECKING:
    from papo_fast.model.policy import Policy


class RolloutError(InputError):
    """The engine failed for a reason outside this program; the training step can be repeated."""


class RolloutEngine(Protocol):
    """What the training loop asks of an engine. Every rank calls every method."""

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        advance: Callable[[int], None],
    ) -> list[list[Completion]]:
        """Sample `n` responses to each prompt; the same seed and weights give the same tokens.

        `advance` is called with the number of prompts that are done since the last call.
        """
        ...

    def load_weights(self, policy: Policy) -> None:
        """Sample with the policy's weights as they are now; forget all that older ones computed."""
        ...

    @staticmethod
    def prompt_passes(n: int) -> int:
        """How often the model runs a prompt, its pictures included, for `n` responses to it."""
        ...

    def sleep(self) -> None:
        """Leave the device's memory to the update; weights have to be loaded before `generate`."""
        ...

    def close(self) -> None:
        """End what the engine has started."""
        ...
