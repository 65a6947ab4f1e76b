"""How much each response token depends on the picture, and what else token weights read.

k3, k1: Schulman, http://joschu.net/blog/kl-approx.html; Jensen-Shannon divergence of the two
policies: VEPO, arXiv 2606.03937; entropy of the most likely words: ToR, arXiv 2603.25077.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from papo_fast.errors import InputError
from papo_fast.estimators import kl_penalty
from papo_fast.token_batch import TokenBatch
from papo_fast.weight_settings import TokenWeightSettings


@dataclass(frozen=True)
class WeightBatch(TokenBatch):
    """What a token weight is a function of: a `TokenBatch`, all constants, of the policy that is
    measured (`logprobs`, `entropy`, … are of the one that sampled where `dependency_of` says so).

    The tokens are those that are weighted together: of an update over all processes, or with
    `dependency_of="current"` of one micro-batch.
    """

    dependency: Tensor | None = None
    """(N,) nats, at least 0: how much the token depends on the picture."""
    js_divergence: Tensor | None = None
    """(N,) nats: Jensen-Shannon divergence of π and π_aug, exact over the vocabulary."""
    nucleus_entropy: Tensor | None = None
    """(N,) nats: entropy of π among its most likely words (`nucleus_entropy`)."""
    evidence: Tensor | None = None
    """(N,) bool: token of an annotated evidence span; None: nothing is annotated."""


def dependency(batch: TokenBatch, config: TokenWeightSettings) -> Tensor:
    """(N,) constants in nats, as `config.dependency` says: of π given π_aug.

    `exact`: KL(π ‖ π_aug). `sampled-k3`: k3 of the sampled token, in [0, 10] as VPPO's, PGPO's and
    CGPO's code bounds it. `sampled-k1`: |log π − log π_aug|, as ToR's.

    Raises `InputError` where the vector that it is made of is missing.
    """
    if config.dependency == "exact":
        return batch.vector("kl_prcp").detach()
    aug, logprobs = batch.vector("aug_logprobs").detach(), batch.logprobs.detach()
    if config.dependency == "sampled-k1":
        return kl_penalty(logprobs, aug, "abs")
    return kl_penalty(logprobs, aug, "k3", clamp_value=True)


def measured(batch: TokenBatch, config: TokenWeightSettings, **more: Tensor) -> WeightBatch:
    """`batch` as token weights read it: constants, with `dependency` and the vectors in `more`."""
    values: dict[str, Any] = {"dependency": dependency(batch, config), **more}
    for field in dataclasses.fields(TokenBatch):
        value = getattr(batch, field.name)
        values[field.name] = value.detach() if isinstance(value, Tensor) else value
    return WeightBatch(**values)


def js_divergence(logits: Tensor, aug_logits: Tensor, eps: float = 0.0) -> Tensor:
    """(N, V) and (N, V) → (N,) nats: ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2.

    Exact over the vocabulary, in [0, log 2], in the logits' dtype. VEPO's code takes log(m + eps)
    with eps 1e-8, which makes it a little smaller, and 0 where it then would be negative.
    """
    p, q = logits.log_softmax(-1), aug_logits.log_softmax(-1)
    mixture = 0.5 * (p.exp() + q.exp())
    tiny = torch.finfo(mixture.dtype).tiny
    log_m = (mixture + eps).clamp(min=tiny).log()
    return 0.5 * (_kl_to(p, log_m) + _kl_to(q, log_m)).clamp(min=0)


def _kl_to(log_p: Tensor, log_m: Tensor) -> Tensor:
    p = log_p.exp()
    # a word that cannot be, -inf, adds nothing
    return torch.where(p > 0, p * (log_p - log_m), 0.0).sum(-1)


def nucleus_entropy(logits: Tensor, mass: float) -> Tensor:
    """(N, V) → (N,) nats: the entropy of p among its most likely words, made to sum to 1.

    A word is among them while those that are likelier hold less than `mass` (ToR, arXiv
    2603.25077, with mass .95); with a mass of 1 it is the entropy of p.

    Raises `InputError` for a mass outside (0, 1].
    """
    if not 0 < mass <= 1:
        raise InputError(f"mass is {mass}: expected a probability in (0, 1]")
    log_p = logits.log_softmax(-1).sort(-1, descending=True).values
    p = log_p.exp()
    kept = p.cumsum(-1) - p < mass
    log_p = log_p.masked_fill(~kept, -torch.inf).log_softmax(-1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)
