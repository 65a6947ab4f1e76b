"""Rewards of a group of responses → advantages, with DAPO's filter and length penalty.

GRPO: arXiv 2402.03300; Dr. GRPO: arXiv 2503.20783; DAPO: arXiv 2503.14476.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from papo_fast.errors import InputError

EPSILON = 1e-6
"""Added to the standard deviation, as the authors do."""


def group_advantages(
    rewards: Tensor, group_ids: Tensor, kind: Literal["grpo", "dr_grpo"] = "grpo"
) -> Tensor:
    """(B,) rewards and (B,) int64 group ids → (B,) advantages in the rewards' dtype.

    `grpo`: (r − mean) / (std + 1e-6) with the group's unbiased standard deviation, as in the
    authors' code; `dr_grpo`: r − mean. Groups may have different sizes and stand in any order. A
    group whose rewards are all equal gets exact zeros: rounding in its mean, divided by 1e-6,
    would otherwise look like a signal.

    Raises `InputError` for a group of one, a reward that is not finite, or mismatched shapes.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise InputError(
            f"rewards has shape {tuple(rewards.shape)}, group_ids {tuple(group_ids.shape)}: "
            "expected (B,) and (B,), one entry per response"
        )
    if kind not in ("grpo", "dr_grpo"):
        raise InputError(f"advantage is {kind!r}: expected grpo or dr_grpo")
    if not torch.isfinite(rewards).all():
        bad = int((~torch.isfinite(rewards)).nonzero()[0])
        raise InputError(f"rewards[{bad}] is {float(rewards[bad])}: expected a finite number")
    index, counts = _groups(group_ids)
    if (counts == 1).any():
        alone = group_ids[(counts == 1)[index]][0]
        raise InputError(
            f"group {int(alone)} has a single response: a group-relative advantage compares at "
            "least 2 responses of one prompt (rollout.group_size)"
        )
    exact = rewards.double()
    centred = exact - _group_mean(exact, index, counts)[index]
    if kind == "grpo":
        sums = torch.zeros_like(counts, dtype=exact.dtype).index_add(0, index, centred.square())
        centred = centred / ((sums / (counts - 1)).sqrt() + EPSILON)[index]
    start = torch.zeros_like(counts, dtype=exact.dtype)
    low = start.scatter_reduce(0, index, exact, "amin", include_self=False)
    high = start.scatter_reduce(0, index, exact, "amax", include_self=False)
    return torch.where((low == high)[index], 0.0, centred).to(rewards.dtype)


def dynamic_filter(accuracies: Tensor, group_ids: Tensor, low: float, high: float) -> Tensor:
    """(B,) bool: the responses of groups whose mean accuracy is above `low` and below `high`.

    DAPO's dynamic sampling: a group that is all right or all wrong teaches nothing. `accuracies`
    is (B,), `group_ids` (B,) int64.
    """
    if accuracies.ndim != 1 or accuracies.shape != group_ids.shape:
        raise InputError(
            f"accuracies has shape {tuple(accuracies.shape)}, group_ids {tuple(group_ids.shape)}: "
            "expected (B,) and (B,), one entry per response"
        )
    index, counts = _groups(group_ids)
    mean = _group_mean(accuracies.double(), index, counts)
    return ((mean > low) & (mean < high))[index]


def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: int) -> Tensor:
    """(B,) response lengths in tokens → (B,) float32 penalties in [−1, 0] (DAPO, equation 13).

    0 up to max_new_tokens − buffer, then linearly to −1 at max_new_tokens; `buffer` 0 turns it off.
    """
    if not 0 <= buffer <= max_new_tokens:
        raise InputError(
            f"reward.overlong_buffer is {buffer}: expected between 0 and rollout.max_new_tokens = "
            f"{max_new_tokens}"
        )
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float32)
    return ((max_new_tokens - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def _groups(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each response's group, 0 … G − 1, and each group's number of responses."""
    _, index, counts = group_ids.unique(return_inverse=True, return_counts=True)
    return index, counts


def _group_mean(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    return torch.zeros_like(counts, dtype=values.dtype).index_add(0, index, values) / counts
