"""What the objective is computed from: per-token vectors, and what they are averaged over."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from papo_fast.errors import InputError

Scalar = float | Tensor
Metrics = dict[str, tuple[Tensor, Scalar]]
"""Name → (detached sum, weight). Add both over micro-batches, then divide: `mean_metrics`."""


@dataclass(frozen=True)
class TokenBatch:
    """Per-token vectors of one micro-batch: response tokens only, sequence after sequence.

    All are (N,) on one device; `logprobs` is float32 or float64, and a sequence is never split
    over two batches. Gradients flow through `logprobs` and, where the objective lets them, through
    `entropy`, `aug_logprobs`, `aug_entropy`, `kl_prcp` and `ref_kl`; the rest are constants.

    `kl_prcp` is one operation of both streams: with `aug="frozen"` whoever computes it has
    to pass the corrupted stream's hidden states detached, since this module cannot separate them.
    """

    logprobs: Tensor
    """log π of the sampled tokens."""
    old_logprobs: Tensor
    """log π of the policy that sampled them."""
    advantages: Tensor
    """The sequence's advantage, repeated for each of its tokens."""
    sequence_ids: Tensor
    """int64, which sequence the token belongs to; equal ids stand next to each other."""
    entropy: Tensor | None = None
    """Exact entropy of π, in nats."""
    aug_logprobs: Tensor | None = None
    """log π of the same tokens given the corrupted image."""
    aug_entropy: Tensor | None = None
    """Exact entropy of π given the corrupted image, in nats."""
    kl_prcp: Tensor | None = None
    """Exact KL(π ‖ π_aug), in nats."""
    kl_reverse: Tensor | None = None
    """Exact KL(π_aug ‖ π), in nats."""
    second_logprobs: Tensor | None = None
    """log π of the same tokens given the picture corrupted in a second way."""
    ref_logprobs: Tensor | None = None
    """log π_ref of the sampled tokens."""
    ref_kl: Tensor | None = None
    """Exact KL(π ‖ π_ref), in nats."""
    correct: Tensor | None = None
    """bool, token of a right response (the SFT term learns from these)."""
    rollout_weights: Tensor | None = None
    """Truncated importance weights of trainer over sampler; they multiply the policy term."""
    responses: int | None = None
    """Responses of this micro-batch, those included of which no token counts (all masked); None:
    every response has tokens here. Means over a micro-batch weigh it by this number."""

    def __post_init__(self) -> None:
        n = self.logprobs.shape
        if self.logprobs.ndim != 1:
            raise InputError(f"logprobs has shape {tuple(n)}: expected (N,), response tokens only")
        if self.logprobs.dtype not in (torch.float32, torch.float64):
            raise InputError(
                f"logprobs has dtype {self.logprobs.dtype}: expected float32 or float64, ratios of "
                "16-bit log-probs are noise"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "responses":
                continue
            if value.shape != n:
                raise InputError(
                    f"{field.name} has shape {tuple(value.shape)}: expected {tuple(n)}, one value "
                    "per response token like logprobs"
                )
            if value.device != self.logprobs.device:
                raise InputError(
                    f"{field.name} is on {value.device}: expected {self.logprobs.device} like "
                    "logprobs"
                )
        # On CUDA this check would synchronise.
        if self.sequence_ids.device.type == "cpu":
            runs, distinct = int(self._with_tokens), self.sequence_ids.unique().numel()
            if runs != distinct:
                raise InputError(
                    f"sequence_ids has {distinct} ids in {runs} runs: the tokens of a sequence "
                    "must stand next to each other"
                )
            if self.responses is not None and self.responses < runs:
                raise InputError(
                    f"responses is {self.responses}, but sequence_ids has {runs} sequences: "
                    "expected at least as many"
                )

    def vector(self, name: str) -> Tensor:
        """The (N,) vector of that name; raises `InputError` if it was not given."""
        value = getattr(self, name)
        if value is None:
            raise InputError(f"TokenBatch.{name} is missing: pass it, or a config without its term")
        return value

    @cached_property
    def sequence_index(self) -> Tensor:
        """(N,) int64: 0 for the tokens of the first sequence, 1 for the second, …"""
        starts = torch.zeros_like(self.sequence_ids)
        starts[1:] = self.sequence_ids[1:] != self.sequence_ids[:-1]
        return starts.cumsum(0)

    @cached_property
    def n_sequences(self) -> Tensor:
        """() int64, all `responses`; a tensor so that the GPU need not be waited for."""
        if self.responses is None:
            return self._with_tokens
        return torch.full((), self.responses, device=self.sequence_ids.device)

    @property
    def _with_tokens(self) -> Tensor:
        return self.sequence_index[-1:].sum() + min(1, self.logprobs.numel())

    @cached_property
    def lengths(self) -> Tensor:
        """(N,) float, each token's sequence length in tokens."""
        index = self.sequence_index
        ones = torch.ones_like(self.logprobs)
        return torch.zeros_like(ones).scatter_add(0, index, ones)[index]


@dataclass(frozen=True)
class Denominators:
    """What the global batch is averaged over; numbers or 0-d tensors.

    Every micro-batch divides by these, so that the losses, and the gradients, of all micro-batches
    add up to those of the whole batch. With data parallelism, counts are of all ranks together, and
    whoever averages gradients over ranks multiplies the loss by their number.
    """

    tokens: Scalar
    """Response tokens."""
    sequences: Scalar
    """Responses."""
    constant: Scalar | None = None
    """Responses × longest response in tokens, for average="constant" (Dr. GRPO)."""
    correct_tokens: Scalar | None = None
    """Response tokens of right responses, for the SFT term."""

    @classmethod
    def from_lengths(
        cls, lengths: Tensor, max_new_tokens: int, correct: Tensor | None = None
    ) -> Denominators:
        """Of responses with these `lengths` (B,) int and, for the SFT term, `correct` (B,) bool."""
        return cls(
            tokens=int(lengths.sum()),
            sequences=lengths.numel(),
            constant=lengths.numel() * max_new_tokens,
            correct_tokens=None if correct is None else int(lengths[correct.bool()].sum()),
        )
