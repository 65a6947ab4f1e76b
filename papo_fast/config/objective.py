"""What an update minimises."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from papo_fast.term_settings import OF_AUG, OF_SECOND, own_terms
from papo_fast.view_settings import ViewTermSettings
from papo_fast.weight_settings import TokenWeightSettings

Estimator = Literal["sampled", "exact"]
KLPenalty = Literal["k1", "k2", "k3", "abs"]
Average = Literal["token", "sequence", "constant"]
AugRun = Literal["none", "stored", "frozen", "trained"]


@dataclass(frozen=True)
class ObjectiveConfig(TokenWeightSettings, ViewTermSettings):
    parity: Literal["ours", "official", "paper"] = "ours"
    """`ours`: exact terms; `official`: the authors' code; `paper`: the paper's printed equations.
    Sets every field below whose default is None, and nothing else."""
    clip_low: float = 0.2
    """Policy ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.3
    """Policy ratio is clipped above at 1 + clip_high."""
    clip_dual: float | None = 3.0
    """Dual clip: bounds the loss at clip_dual * |A| where A < 0; None turns it off."""
    kl_coef: float = 0.01
    """β, weight of the KL to the reference policy; 0 loads no reference model."""
    kl_estimator: Estimator = "sampled"
    """Reference KL from sampled tokens (`kl_penalty`), or exact over the vocabulary."""
    kl_penalty: KLPenalty = "k3"
    """Sampled estimator of the reference KL."""
    kl_prcp_coef: float = 0.02
    """γ, weight of the perception KL, which is maximised."""
    kl_prcp_estimator: Estimator | None = None
    """Perception KL from sampled tokens (`kl_prcp_penalty`), or exact over the vocabulary."""
    kl_prcp_penalty: KLPenalty = "k3"
    """Sampled estimator of the perception KL."""
    kl_prcp_top_p: float | None = None
    """Keep the perception KL on the largest share of each sequence's tokens; None: on all. In
    official parity: on the tokens that are not below its (1 - share) quantile."""
    kl_prcp_clip: float | None = None
    """Upper bound of a token's perception KL; None: no bound of ours. In official parity a bound
    comes with a lower one, 0, which acts on k1."""
    kl_prcp_anneal_steps: int = 0
    """Updates over which γ goes linearly from kl_prcp_coef to 0; 0: constant. In official parity
    η₁ and η₂ shrink by the same factor."""
    entropy_coef: float = 0.0
    """η₁, weight of the entropy with the real image, which is minimised."""
    aug_entropy_coef: float = 0.0
    """η₂, weight of the entropy with the corrupted image, which is minimised."""
    entropy_estimator: Estimator | None = None
    """Entropies as mean of -logprobs of the sampled tokens, or exact over the vocabulary."""
    kl_prcp_direction: Literal["forward", "reverse"] = "forward"
    """Perception KL(π ‖ π_aug), or `reverse`: KL(π_aug ‖ π), exact only, whose gradient with the
    corrupted stream constant is what the authors' sampled term has in expectation."""
    aug: Literal["stored", "frozen", "trained"] | None = None
    """How the corrupted stream runs. `stored`: its log-probs of the sampled tokens are taken once
    per rollout, as the authors do; sampled terms only. `frozen`: the update runs it, and it is a
    constant in every gradient. `trained`: gradients flow into it too."""
    average: Average | None = None
    """Token mean, mean of sequence means, or Dr. GRPO's constant denominator."""
    average_over: Literal["global", "micro"] | None = None
    """Denominators of the mean: the whole global batch, or each micro-batch (the authors' code)."""
    advantage: Literal["grpo", "dr_grpo"] = "grpo"
    """Group-relative advantage with (`grpo`) or without (`dr_grpo`) division by the group's std."""
    sft_coef: float = 0.0
    """Weight of a likelihood term on right responses."""
    terms: tuple[str, ...] = ()
    """Terms of your own that are added to the loss, as FILE.py:name, each with =COEFFICIENT behind
    it; without one it is 1. A positive one is minimised."""

    def resolved(self) -> ObjectiveConfig:
        """A copy in which every field that follows `parity` is filled in (docs/design.md)."""
        estimator = "exact" if self.parity == "ours" else "sampled"
        exact = "exact" in (
            self.kl_prcp_estimator or estimator,
            self.entropy_estimator or estimator,
        )
        # With gradients into it a policy learns to spot corrupted pictures (docs/evidence.md).
        constant = "frozen" if exact or self.parity == "ours" else "stored"
        follow = {
            "kl_prcp_estimator": estimator,
            "entropy_estimator": estimator,
            "aug": "trained" if self.parity == "paper" else constant,
            "average": "token",
            "average_over": "micro" if self.parity == "official" else "global",
        }
        if self.parity == "paper" and self.kl_coef > 0:
            follow["average"] = "sequence"  # the paper's PAPO-G; its PAPO-D (β = 0) averages tokens
        missing = {k: v for k, v in follow.items() if getattr(self, k) is None}
        return dataclasses.replace(self, **missing)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef != 0

    @property
    def has_aug_terms(self) -> bool:
        own = any(name in OF_AUG for term in own_terms(self.terms) for name in term.needs)
        built_in = self.kl_prcp_coef != 0 or self.aug_entropy_coef != 0
        return own or built_in or self.needs_second

    @property
    def needs_second(self) -> bool:
        """A second corrupted view, which runs as the first one does."""
        own = any(name in OF_SECOND for term in own_terms(self.terms) for name in term.needs)
        return own or self.has_dvrp_term or self.margin_coef != 0

    @property
    def needs_aug(self) -> bool:
        return self.has_aug_terms or self.weighs_on != "none"

    @property
    def aug_stream(self) -> AugRun:
        """How the corrupted stream runs in an update, `none` where it needs none.

        Raises `ValueError` for a configuration that is not resolved: it does not know yet.
        """
        if not self.has_aug_terms:
            return "frozen" if self.weighs_on == "current" else "none"
        if self.aug is None:
            raise ValueError("the objective is not resolved: pass config.resolved()")
        return self.aug

    @property
    def streams_at_once(self) -> int:
        """Streams in the largest forward pass of an update."""
        views = 2 if self.needs_second else 1
        return {"trained": 1 + views, "frozen": views}.get(self.aug_stream, 1)
