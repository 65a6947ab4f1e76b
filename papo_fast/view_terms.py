"""Loss terms of methods that look at a picture in three ways; each over (N,) log-probs.

DVRP, arXiv 2601.06801: a masked and a noised view. The margin of evidence over control (a public
driving trainer, no paper): the evidence removed, or an area of the same size elsewhere. In a run
the two views are those of `corruption.kind` and `corruption.second`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from papo_fast.errors import InputError
from papo_fast.estimators import kl_penalty, mean_per_sequence
from papo_fast.token_batch import TokenBatch


def dvrp_term(
    logprobs: Tensor,
    masked_logprobs: Tensor,
    noised_logprobs: Tensor,
    *,
    sensitivity: float = 0.01,
    robustness: float = 0.01,
    masked_entropy: float = 0.05,
    noised_entropy: float = 0.05,
) -> Tensor:
    """(N,) values to be averaged over tokens and minimised beside the policy loss.

        − sensitivity · k3(π, masked) + robustness · k3(π, noised)
        + masked_entropy · (−log masked) + noised_entropy · (−log noised)

    DVRP, arXiv 2601.06801, with the sampled k3 in [0, 10] of the implementation that there is; the
    paper has the KL of the whole distributions. The answer should change where the picture is
    masked and stay where it is noised. Views pass gradient as they come: detach them, as that
    implementation does, and the two entropies are constants.

    Raises `InputError` where the shapes differ.
    """
    _check_shapes(logprobs, masked_logprobs=masked_logprobs, noised_logprobs=noised_logprobs)
    masked_kl = kl_penalty(logprobs, masked_logprobs, "k3", clamp_value=True)
    noised_kl = kl_penalty(logprobs, noised_logprobs, "k3", clamp_value=True)
    entropies = masked_entropy * masked_logprobs + noised_entropy * noised_logprobs
    return robustness * noised_kl - sensitivity * masked_kl - entropies


def evidence_kls(
    batch: TokenBatch,
    evidence_logprobs: Tensor,
    control_logprobs: Tensor,
    *,
    penalty: Literal["k1", "k3"] = "k3",
) -> tuple[Tensor, Tensor]:
    """(B,) mean KLs of each response in nats: to π without the evidence, and without the control.

    Gradient flows into `batch.logprobs` and both views. As in the original, neither k3 nor the
    log-ratio that it is made of has a bound: its author met values of 4e13.

    Args:
        evidence_logprobs: (N,) log-probs with the evidence removed from the picture.
        control_logprobs: (N,) log-probs with an area of the same size removed elsewhere.

    Raises `InputError` for another penalty, or shapes that differ from that of `batch.logprobs`.
    """
    if penalty not in ("k1", "k3"):
        raise InputError(f"penalty is {penalty!r}: expected k1 or k3")
    _check_shapes(
        batch.logprobs, evidence_logprobs=evidence_logprobs, control_logprobs=control_logprobs
    )

    def of(view: Tensor) -> Tensor:
        d = view - batch.logprobs
        return mean_per_sequence(-d if penalty == "k1" else d.expm1() - d, batch)

    return of(evidence_logprobs), of(control_logprobs)


def margin_loss(
    evidence_kl: Tensor,
    control_kl: Tensor,
    valid: Tensor,
    *,
    coef: float = 0.02,
    margin_bound: float = 10.0,
    kl_bound: float | None = None,
    transform: Literal["linear", "softplus"] = "linear",
) -> Tensor:
    """(), to be minimised: the evidence should matter more to the answer than the control does.

    With margin = clamp(evidence_kl − control_kl, ± margin_bound), each KL at most `kl_bound`, the
    mean over valid responses of − coef · margin, or of coef · softplus(− margin); 0 if none is
    valid.

    Args:
        evidence_kl, control_kl: (B,), as `evidence_kls` returns them. Zeros for `control_kl` raise
            the first one alone.
        valid: (B,) bool, the responses that have both views.

    Raises `InputError` for mismatched shapes or another transform.
    """
    if not evidence_kl.shape == control_kl.shape == valid.shape:
        raise InputError(
            f"evidence_kl, control_kl, valid have shapes {tuple(evidence_kl.shape)}, "
            f"{tuple(control_kl.shape)}, {tuple(valid.shape)}: expected (B,) each"
        )
    loss = margin_losses(
        evidence_kl,
        control_kl,
        margin_bound=margin_bound,
        kl_bound=kl_bound,
        transform=transform,
    )
    # a product with `valid` would carry NaN over from responses that do not count
    return coef * torch.where(valid, loss, 0.0).sum() / valid.sum().clamp(min=1)


def margin_losses(
    evidence_kl: Tensor,
    control_kl: Tensor,
    *,
    margin_bound: float = 10.0,
    kl_bound: float | None = None,
    transform: Literal["linear", "softplus"] = "linear",
) -> Tensor:
    """(B,) what `margin_loss` is the mean of, before its coefficient."""
    if kl_bound is not None:
        evidence_kl, control_kl = evidence_kl.clamp(max=kl_bound), control_kl.clamp(max=kl_bound)
    margin = (evidence_kl - control_kl).clamp(-margin_bound, margin_bound)
    if transform == "linear":
        return -margin
    if transform == "softplus":
        return torch.nn.functional.softplus(-margin)
    raise InputError(f"transform is {transform!r}: expected linear or softplus")


def _check_shapes(logprobs: Tensor, **views: Tensor) -> None:
    for name, view in views.items():
        if view.shape != logprobs.shape:
            raise InputError(
                f"{name} has shape {tuple(view.shape)}: expected {tuple(logprobs.shape)} like "
                "logprobs"
            )
