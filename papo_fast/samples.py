"""The one shape from the sampler to the loss: a group is a prompt and what was sampled of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from papo_fast.data.encoded import Later
from papo_fast.data.prompts import Prompt
from papo_fast.rewards.scorer import Score


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    `token_ids` ends with the end-of-sequence id unless the length limit cut it (`finished` False);
    `logprobs` are the sampler's own, one per token, in nats, at the sampling temperature.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass
class Sample:
    """A response and what is known of it; vectors are (T,) float32 on the CPU, T its tokens."""

    completion: Completion
    text: str = ""
    """The response as a person reads it."""
    score: Score | None = None
    reward: float = 0.0
    """The score with the penalty for overlong responses."""
    advantage: float = 0.0
    """The reward beside those of the group."""
    old: Tensor | None = None
    """log π of the policy before the update; None where the update itself is the first to know."""
    ref: Tensor | None = None
    """log π_ref."""
    aug: Tensor | None = None
    """log π given the corrupted picture, where that stream is stored and not run by the update."""
    second: Tensor | None = None
    """The same given the second view."""
    seen: dict[str, Tensor] | None = None
    """What token weights read of the policy that sampled: vectors of `TokenBatch` by name."""
    weights: Tensor | None = None
    """Factors on the advantage of each token, of token weights that are measured on that policy."""

    def __len__(self) -> int:
        return len(self.completion.token_ids)

    @property
    def is_right(self) -> bool:
        return self.score is not None and self.score.accuracy >= 1


@dataclass
class Group:
    """A prompt and its samples, which are compared with each other and share its forward pass."""

    prompt: Prompt
    samples: list[Sample]
    aug_pixels: Tensor | Later | None = None
    """The corrupted pictures, shaped as the prompt's own; None where no such stream is asked for,
    where its text sees no picture, and for a prompt without pictures."""
    second_pixels: Tensor | Later | None = None
    """The same for the second view."""

    def pixels(self, stream: str) -> Tensor | None:
        """Of the stream `full`, `aug` or `second`."""
        if stream == "full":
            return self.prompt.encoded.pixel_values
        held = getattr(self, f"{stream}_pixels")
        return held() if isinstance(held, Later) else held


def all_samples(groups: Iterable[Group]) -> list[Sample]:
    """The samples of all groups, in order."""
    return [sample for group in groups for sample in group.samples]
