"""Per-token estimates and choices that the objective's terms are made of, in plain torch.

k1, k2, k3: Schulman, http://joschu.net/blog/kl-approx.html; truncated importance sampling: Ionides
2008.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from papo_fast.config import KLPenalty, ObjectiveConfig
from papo_fast.errors import InputError
from papo_fast.token_batch import Metrics, TokenBatch

MAX_LOG_RATIO = 20.0
"""Differences of log-probs are clamped to ± this before `exp`, as the authors do."""
MAX_K3 = 10.0
"""The authors' bound of the k3 value, `parity="official"` only."""


def kl_penalty(
    logprobs: Tensor, other_logprobs: Tensor, kind: KLPenalty, *, clamp_value: bool = False
) -> Tensor:
    """Per-token estimate of KL(π ‖ other) from tokens sampled from π; (N,) and (N,) → (N,), nats.

    With d = other − log π: k1 = −d; k2 = d²/2 (the authors' `mse`); k3 = exp(d) − d − 1 (their
    `low_var_kl`), d clamped to ± `MAX_LOG_RATIO` so that it stays finite; abs = |d|. `clamp_value`
    bounds k3 by `MAX_K3` as the authors do: beyond it the token has no gradient.
    """
    d = other_logprobs - logprobs
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "abs":
        return d.abs()
    if kind == "k3":
        d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        value = d.exp() - d - 1
        return value.clamp(max=MAX_K3) if clamp_value else value
    raise InputError(f"KL penalty is {kind!r}: expected one of k1, k2, k3, abs")


def truncated_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, cap: float
) -> tuple[Tensor, Metrics]:
    """min(π_old / μ, cap) of tokens that μ sampled, (N,) constants, and their metrics.

    π_old is the policy before the update, as the trainer computes it, and μ the same weights as
    the sampler computed them. E_μ[w f] is E_π[f] but for what the cap takes away, which bounds the
    variance. (Truncated importance sampling: Ionides 2008; for samplers that round otherwise than
    their trainer: verl, TRL, prime-rl.)
    """
    with torch.no_grad():
        log_ratio = (old_logprobs - sampler_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        weights = log_ratio.exp().clamp(max=cap)
        capped = (log_ratio > math.log(cap)).sum()
    n = weights.numel()
    return weights, {"rollout_weight": (weights.sum(), n), "rollout_capped": (capped, n)}


def annealed(coef: float, update: int, total: int) -> float:
    """γ at `update` (from 0): linear from `coef` to 0 at `total`; constant if `total` is 0."""
    return coef if total <= 0 else coef * max(0.0, 1.0 - update / total)


def at_update(config: ObjectiveConfig, update: int) -> ObjectiveConfig:
    """`config` with the coefficients of `update` (from 0): γ as `kl_prcp_anneal_steps` says.

    In official parity η₁ and η₂ fall by the same factor as γ, as in the authors' code; elsewhere
    they stay.
    """
    factor = annealed(1.0, update, config.kl_prcp_anneal_steps)
    # without a perception KL the authors have nothing to anneal
    all_fall = config.parity == "official" and config.kl_prcp_coef != 0
    of_entropies = factor if all_fall else 1.0
    return dataclasses.replace(
        config,
        kl_prcp_coef=config.kl_prcp_coef * factor,
        entropy_coef=config.entropy_coef * of_entropies,
        aug_entropy_coef=config.aug_entropy_coef * of_entropies,
    )


def mean_per_sequence(values: Tensor, batch: TokenBatch) -> Tensor:
    """(N,) → (B,): each response's mean, in the order of the batch."""
    index = batch.sequence_index
    n = int(index[-1]) + 1 if len(index) else 0
    lengths = index.bincount(minlength=n)
    return values.new_zeros(n).index_add(0, index, values) / lengths


def minmax_per_sequence(values: Tensor, batch: TokenBatch, least_range: float = 1e-8) -> Tensor:
    """(N,) → (N,) in [0, 1]: (x − min) / max(max − min, least_range) of each response."""
    index = batch.sequence_index
    start = torch.zeros_like(values)
    low = start.scatter_reduce(0, index, values, "amin", include_self=False)[index]
    high = start.scatter_reduce(0, index, values, "amax", include_self=False)[index]
    return (values - low) / (high - low).clamp(min=least_range)


def largest_per_sequence(values: Tensor, batch: TokenBatch, share: float) -> Tensor:
    """(N,) bool: each sequence's ⌈share × length⌉ largest `values`; earlier tokens win ties."""
    order, first = _sorted_within_sequences(values, batch, descending=True)
    position = torch.arange(len(values), device=values.device)
    # The small number keeps 0.1 × 30 = 3.0000000000000004 from asking for a fourth token.
    quota = torch.ceil(share * batch.lengths.double() - 1e-9)
    keep = torch.zeros_like(values, dtype=torch.bool)
    keep[order] = position - first[order] < quota[order]
    return keep


def above_quantile_per_sequence(values: Tensor, batch: TokenBatch, share: float) -> Tensor:
    """(N,) bool: `values` not below their sequence's (1 − share) quantile, the authors' token mask.

    The quantile lies between two values by linear interpolation, as `torch.quantile` has it. These
    are 1 + ⌊share (n − 1)⌋ of n distinct values, and with them every value that equals the least
    of them.
    """
    order, first = _sorted_within_sequences(values, batch, descending=False)
    ranked = values.detach()[order]
    # in the dtype of the values, as torch has it: rounding decides where a rank is a whole number
    rank = torch.full_like(ranked, 1.0 - share) * (batch.lengths.to(ranked.dtype) - 1)
    below = rank.floor()
    ends = [ranked[first + place.long()] for place in (below, rank.ceil())]
    return values.detach() >= torch.lerp(ends[0], ends[1], rank - below)


def _sorted_within_sequences(
    values: Tensor, batch: TokenBatch, *, descending: bool
) -> tuple[Tensor, Tensor]:
    """(N,) token of each place, sequence after sequence; (N,) first place of a token's sequence."""
    index = batch.sequence_index
    order = values.detach().argsort(descending=descending, stable=True)
    order = order[index[order].argsort(stable=True)]
    position = torch.arange(len(values), device=values.device)
    # After sorting, sequence s occupies the places it had before: its first is its first token's.
    first = torch.full_like(position, len(values)).scatter_reduce(0, index, position, "amin")
    return order, first[index]
