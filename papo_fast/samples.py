"""The one shape from the sampler to the loss: a group is a prompt and what was sampled of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    `token_ids` ends with the end-of-sequence id unless the length limit cut it (`finished` False);
    `logprobs` are the sampler's own, one per token, in nats, at the sampling temperature.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool
