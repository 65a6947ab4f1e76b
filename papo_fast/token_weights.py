"""Weights of tokens by their dependency on the picture: factors on each token's advantage.

A weight is a function (`WeightBatch`, `ObjectiveConfig`) → (N,) factors without gradient. Rules:
VPPO, arXiv 2510.09285; PGPO, arXiv 2604.01840; ToR, arXiv 2603.25077; CGPO, doi
10.1145/3767308.3835969; VEPO, arXiv 2606.03937, each as its code computes it where that differs
from the paper (docs/implementations.md).

An argument `…mask`, (N,) bool, takes the place of a selection by rank. Where tokens tie at the
threshold the code of the methods keeps any of them, and ours the earlier ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from papo_fast.config import ObjectiveConfig
from papo_fast.dependency import WeightBatch
from papo_fast.errors import InputError
from papo_fast.estimators import largest_per_sequence, mean_per_sequence, minmax_per_sequence
from papo_fast.token_batch import TokenBatch
from papo_fast.weight_settings import load_weight

Weight = Callable[[WeightBatch, ObjectiveConfig], Tensor]

# --- which tokens ---------------------------------------------------------------------------------


def largest(values: Tensor, batch: TokenBatch, share: float, over: str) -> Tensor:
    """(N,) bool: the ⌈share · n⌉ largest of the n tokens of each "response" or of the "batch"."""
    if over == "batch":
        whole = torch.zeros_like(batch.sequence_ids)
        batch = dataclasses.replace(batch, sequence_ids=whole, responses=None)
    return largest_per_sequence(values, batch, share)


def over_selected(mask: Tensor, batch: TokenBatch, average: str) -> Tensor:
    """(N,): factors that make a mean over all tokens one over those of `mask`, (N,) bool.

    With average="sequence" the mean is that of each response. Where none is selected all are 0.
    """
    chosen = mask.to(batch.logprobs.dtype)
    if average == "sequence":
        share = mean_per_sequence(chosen, batch)[batch.sequence_index]
    else:
        share = chosen.mean() if len(chosen) else chosen
    return torch.where(mask, chosen / share, 0.0)


# --- weights --------------------------------------------------------------------------------------


def vppo(batch: WeightBatch, config: ObjectiveConfig, mask: Tensor | None = None) -> Tensor:
    """VPPO, arXiv 2510.09285: a mask of tokens times a factor of each response, `vppo_scaling`.

    The mask keeps the ⌈vppo_top_p · T⌉ tokens of a response that depend most, and with
    `vppo_entropy_top_p` those of highest entropy too. All tokens stay in the denominator.
    """
    score = batch.vector("dependency")
    if mask is None:
        mask = largest(score, batch, config.vppo_top_p, "response")
        if config.vppo_entropy_top_p > 0:
            entropies = batch.vector("entropy")
            mask = mask | largest(entropies, batch, config.vppo_entropy_top_p, "response")
    scaling_B = vppo_scaling(mean_per_sequence(score, batch), config.vppo_scaling_min)
    return mask * scaling_B[batch.sequence_index]


def vppo_scaling(
    scores_B: Tensor, least: float, extremes: tuple[float, float] | None = None
) -> Tensor:
    """(B,) mean dependencies of responses → (B,) factors of mean 1, the lowest `least`.

    With n the scores scaled to [0, 1]: least + n (1 − least) / mean n. All 1 where the scores span
    no more than 1e-6. VPPO's "batch" whose mean is 1 is a micro-batch.

    Args:
        extremes: lowest and highest score of a larger batch, where n is scaled by that one's.
    """
    if not len(scores_B):
        return scores_B
    low, high = extremes or (scores_B.min(), scores_B.max())
    if not high - low > 1e-6:
        return torch.ones_like(scores_B)
    n = ((scores_B - low) / (high - low)).clamp(0, 1)
    return least + n * (1 - least) / (n.mean() + 1e-8)


def pgpo(batch: WeightBatch, config: ObjectiveConfig) -> Tensor:
    """PGPO, arXiv 2604.01840: advantage moves from tokens of low to tokens of high dependency.

    With x = log(1 + dependency) scaled to [0, 1] in each response: x / τ below the threshold τ,
    from there on 1 + boost · (x − τ) / (1 − τ). `paper`: the weights of a response are scaled to
    sum to its length; all 1 where its dependencies differ by less than 1e-8. `code`: τ is that of
    the response's x which stands at place ⌊threshold · T⌋ in ascending order, no weight is below
    .1, and nothing is scaled.
    """
    x = minmax_per_sequence(batch.vector("dependency").log1p(), batch)
    threshold = torch.full_like(x, config.pgpo_threshold)
    if config.pgpo_variant == "code":
        threshold = _at_rank(x, batch, config.pgpo_threshold)
    tiny = 1e-8
    above = 1 + config.pgpo_boost * (x - threshold) / (1 - threshold).clamp(min=tiny)
    weight = torch.where(x < threshold, x / threshold.clamp(min=tiny), above)
    if config.pgpo_variant == "code":
        return weight.clamp(min=0.1)
    index = batch.sequence_index
    mean = mean_per_sequence(weight, batch)[index]
    # Differences below the least range are rounding: they stay below 1, and would be scaled up.
    largest = torch.zeros_like(x).scatter_reduce(0, index, x, "amax")[index]
    return torch.where(largest == 1, weight / mean, 1.0)


def _at_rank(values: Tensor, batch: TokenBatch, share: float) -> Tensor:
    """(N,): of each response the value at place ⌊share · T⌋, from 0, in ascending order."""
    parts = []
    for of_response in values.split(batch.sequence_index.bincount().tolist()):
        n = len(of_response)
        place = min(n - 1, math.floor(share * n))
        parts.append(of_response.sort().values[place].expand(n))
    return torch.cat(parts) if parts else values


def tor(
    batch: WeightBatch,
    config: ObjectiveConfig,
    reasoning_mask: Tensor | None = None,
    perception_mask: Tensor | None = None,
) -> Tensor:
    """ToR, arXiv 2603.25077: 1 on reasoning tokens, less on perception tokens, 0 on all others.

    Reasoning: the largest `tor_entropy_share` by entropy among the most likely words
    (`tor_nucleus`). Perception: the largest `tor_perception_share` by dependency. A token that is
    both counts as reasoning.
    """
    if reasoning_mask is None:
        entropies = batch.vector("entropy" if config.tor_nucleus == 1 else "nucleus_entropy")
        reasoning_mask = largest(entropies, batch, config.tor_entropy_share, config.select_over)
    if perception_mask is None:
        score, share = batch.vector("dependency"), config.tor_perception_share
        perception_mask = largest(score, batch, share, config.select_over)
    of_perception = config.tor_perception_weight * perception_mask.to(batch.logprobs.dtype)
    return torch.where(reasoning_mask, 1.0, of_perception)


def cgpo(
    batch: WeightBatch,
    config: ObjectiveConfig,
    entropy_mask: Tensor | None = None,
    perception_mask: Tensor | None = None,
) -> Tensor:
    """CGPO, doi 10.1145/3767308.3835969: perception tokens by the dependency of their response.

    Perception: the largest `cgpo_perception_share` by dependency, and tokens of an evidence span.
    Their factor is 1 + scale · tanh((s − median) / (MAD + 1e-8)), s the response's mean dependency,
    median and median absolute deviation over responses (of two middle ones the lower). The
    largest `cgpo_entropy_share` by entropy have 1, all others 0.
    """
    score = batch.vector("dependency")
    if entropy_mask is None:
        entropies, share = batch.vector("entropy"), config.cgpo_entropy_share
        entropy_mask = largest(entropies, batch, share, config.select_over)
    if perception_mask is None:
        perception_mask = largest(score, batch, config.cgpo_perception_share, config.select_over)
        if batch.evidence is not None:
            perception_mask = perception_mask | batch.evidence
    scores_B = mean_per_sequence(score, batch)
    if not len(scores_B):
        return scores_B
    centred = scores_B - scores_B.median()
    scale_B = 1 + config.cgpo_scale * torch.tanh(centred / (centred.abs().median() + 1e-8))
    plain = entropy_mask.to(score.dtype)
    return torch.where(perception_mask, scale_B[batch.sequence_index], plain)


def vepo(batch: WeightBatch, config: ObjectiveConfig, mask: Tensor | None = None) -> Tensor:
    """VEPO, arXiv 2606.03937: the mean over the tokens of highest `vepo_scores` alone.

    ⌈vepo_top_p · T⌉ of each response. With `vepo_mode="weight"` all tokens stay, and the selected
    ones have the factor 1 + vepo_lambda.
    """
    if mask is None:
        scores = vepo_scores(batch, config)
        scores = -scores if config.vepo_bottom else scores
        mask = largest(scores, batch, config.vepo_top_p, "response")
    if config.vepo_mode == "weight":
        return 1 + config.vepo_lambda * mask.to(batch.logprobs.dtype)
    return over_selected(mask, batch, config.average or "token")


def vepo_scores(batch: WeightBatch, config: ObjectiveConfig) -> Tensor:
    """(N,) in [0, 1]: VEPO's score of each token, by the letter of its code (`vepo_score`).

    j, h and d are the Jensen-Shannon divergence, the entropy H and |ΔH|, each scaled to [0, 1] in
    its response, d⁺ that of max(ΔH, 0), where ΔH = H[π_aug] − H[π]; a is `vepo_alpha`.

        A = 1 − (1−j)(1−h)(1−d⁺)         B = [1 − (1−j)(1−h)] d⁺
        D = [1 − (1−j)ᵃ (1−d)¹⁻ᵃ] h        C: D with d⁺      E: D without h
        F = [1 − (a (1−j) + (1−a)(1−d))] h    G = j d h       H: D with KL(π ‖ π_aug) for j
    """
    kind, a = config.vepo_score, config.vepo_alpha
    entropies = batch.vector("entropy")
    change = batch.vector("aug_entropy") - entropies
    risen = kind in ("A", "B", "C")
    change = change.clamp(min=0) if risen else change.abs()
    divergence = batch.vector("kl_prcp" if kind == "H" else "js_divergence")
    j, h, d = (minmax_per_sequence(x, batch) for x in (divergence, entropies, change))
    if kind == "A":
        return 1 - (1 - j) * (1 - h) * (1 - d)
    if kind == "B":
        return (1 - (1 - j) * (1 - h)) * d
    if kind == "F":
        return (1 - (a * (1 - j) + (1 - a) * (1 - d))) * h
    if kind == "G":
        return j * d * h
    either = 1 - (1 - j) ** a * (1 - d) ** (1 - a)
    return either if kind == "E" else either * h


# --- by name --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedWeight:
    """A weight and the vectors of `WeightBatch` that it reads."""

    function: Weight
    needs: Callable[[ObjectiveConfig], tuple[str, ...]]


def _vppo_needs(config: ObjectiveConfig) -> tuple[str, ...]:
    return ("dependency", "entropy") if config.vppo_entropy_top_p > 0 else ("dependency",)


def _vepo_needs(config: ObjectiveConfig) -> tuple[str, ...]:
    return ("kl_prcp" if config.vepo_score == "H" else "js_divergence", "entropy", "aug_entropy")


WEIGHTS = {
    "vppo": NamedWeight(vppo, _vppo_needs),
    "pgpo": NamedWeight(pgpo, lambda config: ("dependency",)),
    "tor": NamedWeight(
        tor,
        lambda c: ("dependency", "entropy" if c.tor_nucleus == 1 else "nucleus_entropy"),
    ),
    "cgpo": NamedWeight(cgpo, lambda config: ("dependency", "entropy")),
    "vepo": NamedWeight(vepo, _vepo_needs),
}


def named_weights(config: ObjectiveConfig) -> dict[str, NamedWeight]:
    """The weights that `config.token_weights` lists, by their names.

    A function of the user's own reads what a run measures of every token, and an attribute `needs`
    of it, a tuple, asks for vectors of `WeightBatch` that cost more: `js_divergence` and
    `nucleus_entropy`.

    Raises `InputError` where a function cannot be loaded or needs something else.
    """
    found = {}
    for name in config.weight_names:
        if name in WEIGHTS:
            found[name] = WEIGHTS[name]
        else:
            found[name] = _of_user(name)
    return found


def _of_user(name: str) -> NamedWeight:
    function, needs = load_weight(name)
    return NamedWeight(function, lambda config: needs)


def token_weights(
    batch: WeightBatch, config: ObjectiveConfig, weights: dict[str, NamedWeight]
) -> Tensor:
    """(N,) factors on the advantages, the product of all `weights`; without gradient.

    Raises `InputError` where a vector that a weight needs is missing, or where it returns something
    else than N finite numbers.
    """
    product = torch.ones_like(batch.logprobs)
    for name, weight in weights.items():
        for needed in weight.needs(config):
            batch.vector(needed)
        with torch.no_grad():
            factors = weight.function(batch, config)
        if not isinstance(factors, Tensor) or factors.shape != product.shape:
            got = tuple(factors.shape) if isinstance(factors, Tensor) else type(factors).__name__
            raise InputError(
                f"token weight {name} returned {got}: expected a tensor of shape "
                f"{tuple(product.shape)}, one factor per response token"
            )
        if not torch.isfinite(factors).all():
            raise InputError(f"token weight {name} returned a number that is not finite")
        product = product * factors.to(product.dtype)
    return product
