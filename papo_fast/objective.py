"""The PAPO objective in plain torch over flat (N,) vectors of response tokens.

Equations: PAPO, arXiv 2507.06448; clip-higher and token mean: DAPO, arXiv 2503.14476; constant
denominator: Dr. GRPO, arXiv 2503.20783; dual clip: arXiv 1912.09729; k1, k2, k3: Schulman,
http://joschu.net/blog/kl-approx.html. The loss, to be minimised, is a sum of `TERMS`, each a
coefficient times a weighted sum over tokens. A new term is a function from the batch to (N,)
values, named in `objective.terms`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from papo_fast.config import ObjectiveConfig
from papo_fast.errors import InputError
from papo_fast.estimators import (
    MAX_LOG_RATIO,
    above_quantile_per_sequence,
    kl_penalty,
    largest_per_sequence,
)
from papo_fast.term_settings import OwnTerm, own_terms
from papo_fast.token_batch import Denominators, Metrics, Scalar, TokenBatch
from papo_fast.view_terms import dvrp_term, evidence_kls, margin_losses

# --- terms: (batch, config) → (N,) values ---------------------------------------------------------


def _log_ratio(batch: TokenBatch) -> Tensor:
    log_ratio = batch.logprobs - batch.old_logprobs.detach()
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _policy_losses(batch: TokenBatch, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """−r A and −clip(r) A, each (N,)."""
    log_ratio = _log_ratio(batch)
    low, high = math.log1p(-config.clip_low), math.log1p(config.clip_high)
    advantages = batch.advantages
    return -advantages * log_ratio.exp(), -advantages * log_ratio.clamp(low, high).exp()


def policy_loss(batch: TokenBatch, config: ObjectiveConfig) -> Tensor:
    """max(−r A, −clip(r) A), where A < 0 at most clip_dual |A|, times the rollout weight."""
    loss = torch.maximum(*_policy_losses(batch, config))
    if config.clip_dual is not None:
        bound = -config.clip_dual * batch.advantages
        loss = torch.where(batch.advantages < 0, torch.minimum(loss, bound), loss)
    if batch.rollout_weights is not None:
        loss = loss * batch.rollout_weights.detach()
    return loss


def reference_kl(batch: TokenBatch, config: ObjectiveConfig) -> Tensor:
    """KL(π ‖ π_ref), sampled or exact."""
    if config.kl_estimator == "exact":
        return batch.vector("ref_kl")
    clamp = config.parity == "official"
    other = batch.vector("ref_logprobs").detach()
    return kl_penalty(batch.logprobs, other, config.kl_penalty, clamp_value=clamp)


def perception_kl(batch: TokenBatch, config: ObjectiveConfig) -> Tensor:
    """KL between π and π_aug on the chosen tokens only, each at most `kl_prcp_clip`.

    KL(π ‖ π_aug), sampled or exact, or with `kl_prcp_direction="reverse"` the exact KL(π_aug ‖ π).
    In official parity the tokens are chosen by a quantile, and a value is at least 0 where it is at
    most `kl_prcp_clip`: k1 may be negative, and the authors clamp it from both sides.
    """
    official = config.parity == "official"
    if config.kl_prcp_direction == "reverse":
        value = batch.vector("kl_reverse")
    elif config.kl_prcp_estimator == "exact":
        value = batch.vector("kl_prcp")
    else:
        other = _aug(batch.vector("aug_logprobs"), config)
        value = kl_penalty(batch.logprobs, other, config.kl_prcp_penalty, clamp_value=official)
    keep = None
    if config.kl_prcp_top_p is not None:
        choose = above_quantile_per_sequence if official else largest_per_sequence
        keep = choose(value, batch, config.kl_prcp_top_p)
    if config.kl_prcp_clip is not None:
        value = value.clamp(min=0.0 if official else None, max=config.kl_prcp_clip)
    # The authors leave the other tokens in the denominator. A product, so that NaN stays NaN.
    return value if keep is None else value * keep


def entropy(batch: TokenBatch, config: ObjectiveConfig) -> Tensor:
    """H[π], sampled (−log π) or exact."""
    return batch.vector("entropy") if config.entropy_estimator == "exact" else -batch.logprobs


def aug_entropy(batch: TokenBatch, config: ObjectiveConfig) -> Tensor:
    """H[π_aug], sampled (−log π_aug of the tokens that π sampled) or exact."""
    if config.entropy_estimator == "exact":
        return _aug(batch.vector("aug_entropy"), config)
    return -_aug(batch.vector("aug_logprobs"), config)


def sft_loss(batch: TokenBatch, config: ObjectiveConfig) -> Tensor:  # noqa: ARG001  as all terms
    """−log π; averaged over right responses only."""
    return -batch.logprobs


def dvrp(batch: TokenBatch, config: ObjectiveConfig) -> Tensor:
    """DVRP's four terms with their weights (`papo_fast.view_terms.dvrp_term`)."""
    masked, noised = (_aug(batch.vector(f"{x}_logprobs"), config) for x in ("aug", "second"))
    return dvrp_term(
        batch.logprobs,
        masked,
        noised,
        sensitivity=config.dvrp_sensitivity,
        robustness=config.dvrp_robustness,
        masked_entropy=config.dvrp_masked_entropy,
        noised_entropy=config.dvrp_noised_entropy,
    )


def margin(batch: TokenBatch, config: ObjectiveConfig) -> Tensor:
    """Loss of the margin of evidence over control of the token's response (`margin_losses`)."""
    views = [_aug(batch.vector(f"{x}_logprobs"), config) for x in ("aug", "second")]
    losses = margin_losses(
        *evidence_kls(batch, *views, penalty=config.margin_penalty),
        margin_bound=config.margin_bound,
        kl_bound=config.margin_kl_bound,
        transform=config.margin_transform,
    )
    return losses[batch.sequence_index]


def _aug(values: Tensor, config: ObjectiveConfig) -> Tensor:
    return values if config.aug == "trained" else values.detach()


# --- weights: what a mean is over -----------------------------------------------------------------


def mean_weights(batch: TokenBatch, config: ObjectiveConfig, over: Denominators) -> Tensor:
    """(N,): each token's weight under `config.average` and `config.average_over`."""
    ones = torch.ones_like(batch.logprobs)
    if config.average == "sequence":
        return ones / (batch.lengths * over.sequences)
    if config.average == "constant":
        if over.constant is None:
            raise InputError(
                'Denominators.constant is missing: average="constant" divides by it, pass the '
                "number of responses × rollout.max_new_tokens"
            )
        return ones / over.constant
    if config.average_over == "micro":
        share = batch.n_sequences / over.sequences
        return ones * share / max(1, ones.numel())
    return ones / over.tokens


def entropy_weights(batch: TokenBatch, config: ObjectiveConfig, over: Denominators) -> Tensor:
    """As `mean_weights`, but the authors' entropies are token means whatever the average."""
    if config.parity == "official":
        config = dataclasses.replace(config, average="token")
    return mean_weights(batch, config, over)


def response_weights(
    batch: TokenBatch,
    config: ObjectiveConfig,  # noqa: ARG001  as all weights
    over: Denominators,
) -> Tensor:
    """The mean over responses, whatever the average."""
    return 1 / (batch.lengths * over.sequences)


def sft_weights(batch: TokenBatch, config: ObjectiveConfig, over: Denominators) -> Tensor:
    """Token mean over right responses, 0 if there are none."""
    chosen = batch.vector("correct").to(batch.logprobs.dtype)
    if config.average_over == "micro":
        return chosen * (batch.n_sequences / over.sequences) / chosen.sum().clamp(min=1)
    if over.correct_tokens is None:
        raise InputError(
            "Denominators.correct_tokens is missing: sft_coef is not 0, pass the number of "
            "response tokens of right responses in the global batch"
        )
    return chosen / torch.as_tensor(over.correct_tokens).clamp(min=1)


# --- the sum --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """One summand of the loss: `coef` × Σ `weights` · `values`."""

    name: str
    """Its metric."""
    coef: Callable[[ObjectiveConfig], float]
    """Positive: minimised. 0: not part of the loss, at most monitored if its inputs are there."""
    values: Callable[[TokenBatch, ObjectiveConfig], Tensor]
    """(N,) per-token values."""
    needs: Callable[[ObjectiveConfig], tuple[str, ...]] = lambda config: ()
    """Optional vectors of `TokenBatch` that `values` and `weights` read."""
    weights: Callable[[TokenBatch, ObjectiveConfig, Denominators], Tensor] = mean_weights
    """(N,) what the average is over."""
    monitored: bool = True
    """Report the metric where `coef` is 0 too."""


def _either(estimator: str, exact: str, *sampled: str) -> Callable[..., tuple[str, ...]]:
    return lambda config: (exact,) if getattr(config, estimator) == "exact" else sampled


def _perception_vectors(config: ObjectiveConfig) -> tuple[str, ...]:
    if config.kl_prcp_direction == "reverse":
        return ("kl_reverse",)
    return ("kl_prcp",) if config.kl_prcp_estimator == "exact" else ("aug_logprobs",)


TERMS = (
    Term("pg_loss", lambda c: 1.0, policy_loss),
    Term(
        "kl_ref",
        lambda c: c.kl_coef,
        reference_kl,
        _either("kl_estimator", "ref_kl", "ref_logprobs"),
    ),
    Term(
        "kl_prcp",
        lambda c: -c.kl_prcp_coef,
        perception_kl,
        _perception_vectors,
    ),
    Term(
        "entropy",
        lambda c: c.entropy_coef,
        entropy,
        _either("entropy_estimator", "entropy"),
        entropy_weights,
    ),
    Term(
        "aug_entropy",
        lambda c: c.aug_entropy_coef,
        aug_entropy,
        _either("entropy_estimator", "aug_entropy", "aug_logprobs"),
        entropy_weights,
    ),
    Term("sft_loss", lambda c: c.sft_coef, sft_loss, lambda c: ("correct",), sft_weights, False),
)


_VIEWS = ("aug_logprobs", "second_logprobs")
VIEW_TERMS = (
    Term("dvrp", lambda c: float(c.has_dvrp_term), dvrp, lambda c: _VIEWS, monitored=False),
    Term(
        "margin_loss",
        lambda c: c.margin_coef,
        margin,
        lambda c: _VIEWS,
        response_weights,
        monitored=False,
    ),
)
"""Terms of two corrupted views."""


def terms_of(config: ObjectiveConfig) -> tuple[Term, ...]:
    """`TERMS`, `VIEW_TERMS`, and those of `config.terms`."""
    return TERMS + VIEW_TERMS + tuple(_as_term(own) for own in own_terms(config.terms))


def _as_term(own: OwnTerm) -> Term:
    def values(batch: TokenBatch, config: ObjectiveConfig) -> Tensor:
        found = own.values(batch, config)
        if not isinstance(found, Tensor) or found.shape != batch.logprobs.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"objective.terms: {own.name} returned {got}, expected a tensor "
                f"{tuple(batch.logprobs.shape)}, a value for each token"
            )
        return found

    return Term(own.metric, lambda config: own.coef, values, lambda config: own.needs)


def sum_of_terms(
    terms: Iterable[Term],
    batch: TokenBatch,
    config: ObjectiveConfig,
    weights_of: Callable[[Term], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ coefficient × weighted sum, () in the dtype of `logprobs`, and each weighted sum, detached.

    Args:
        weights_of: (N,) weights of a term's tokens.

    Raises `InputError` if a vector that a term with a non-zero coefficient needs is missing.
    """
    loss = batch.logprobs.new_zeros(())
    sums = {}
    for term in terms:
        coef = term.coef(config)
        missing = [name for name in term.needs(config) if getattr(batch, name) is None]
        if missing and coef != 0:
            raise InputError(
                f"TokenBatch.{missing[0]} is missing: {term.name} has coefficient {coef} and is "
                "computed from it"
            )
        if missing or (coef == 0 and not term.monitored):
            continue
        with torch.set_grad_enabled(coef != 0 and torch.is_grad_enabled()):
            value = (weights_of(term) * term.values(batch, config)).sum()
        sums[term.name] = value.detach()
        if coef != 0:
            loss = loss + coef * value
    return loss, sums


def objective(
    batch: TokenBatch,
    config: ObjectiveConfig,
    denominators: Denominators,
) -> tuple[Tensor, Metrics]:
    """The loss of one micro-batch, () in the dtype of `logprobs`, and its metrics.

    `config` must be resolved (`ObjectiveConfig.resolved`). `denominators` are those of the global
    batch; with average_over="micro" the micro-batch's own token mean counts by its share of the
    batch's sequences, as in the authors' gradient accumulation. Whoever anneals γ passes a `config`
    with the coefficients of this update (see `papo_fast.estimators.at_update`).

    Metrics: one per term of `terms_of` whose inputs are there, before its coefficient; `loss`;
    `sampled_entropy`, the mean of −log π; and as means over tokens `ppo_kl` (mean of old − new
    log-probs), `clip_fraction_high` (−r A lost to its clipped rival), `clip_fraction_low` (dual
    clip at work); `ratio_max`, `ratio_min`. A batch without tokens has the same names, of weight 0.

    Raises `InputError` if a vector that a term with a non-zero coefficient needs is missing.
    """
    if config.average is None or config.kl_prcp_estimator is None:
        raise InputError("config is not resolved: pass config.resolved()")

    share = batch.n_sequences / denominators.sequences
    loss, means = sum_of_terms(
        terms_of(config), batch, config, lambda term: term.weights(batch, config, denominators)
    )
    metrics: Metrics = {name: (value, share) for name, value in means.items()}
    metrics["loss"] = (loss.detach(), share)
    with torch.no_grad():
        weights = mean_weights(batch, config, denominators)
        metrics["sampled_entropy"] = (-(weights * batch.logprobs).sum(), share)
        metrics.update(_ratio_metrics(batch, config))
    return loss, metrics


def _ratio_metrics(batch: TokenBatch, config: ObjectiveConfig) -> Metrics:
    log_ratio, n = _log_ratio(batch), batch.logprobs.numel()
    extremes = log_ratio if n else log_ratio.new_zeros(1)  # of no token: a ratio of 1, weight 0
    plain, clipped = _policy_losses(batch, config)
    metrics: Metrics = {
        "ppo_kl": (-log_ratio.sum(), n),
        "clip_fraction_high": ((plain < clipped).sum(), n),
        "ratio_max": (extremes.max().exp(), min(1, n)),
        "ratio_min": (extremes.min().exp(), min(1, n)),
    }
    if config.clip_dual is not None:
        bound = -config.clip_dual * batch.advantages
        bounded = (torch.maximum(plain, clipped) > bound) & (batch.advantages < 0)
        metrics["clip_fraction_low"] = (bounded.sum(), n)
    return metrics


def mean_metrics(parts: Iterable[Metrics]) -> dict[str, float]:
    """One number per metric: Σ sums / Σ weights; the extreme for names in `_max` and `_min`.

    Parts of weight 0 do not count. A metric that has no others is 0, as the authors' masked mean of
    nothing is, and an extreme is what those parts say.
    """
    gathered: dict[str, list[tuple[Tensor, Scalar]]] = {}
    for part in parts:
        for name, pair in part.items():
            gathered.setdefault(name, []).append(pair)
    means = {}
    for name, pairs in gathered.items():
        known = [(float(total), float(weight)) for total, weight in pairs]
        sums = [total for total, weight in known if weight]
        if name.endswith(("_max", "_min")):
            sums = sums or [total for total, _ in known]
            means[name] = max(sums) if name.endswith("_max") else min(sums)
        else:
            means[name] = sum(sums) / sum(weight for _, weight in known) if sums else 0.0
    return means
