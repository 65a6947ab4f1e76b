"""Settings of the terms that look at a picture in three ways: `papo_fast.view_terms`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ViewTermSettings:
    dvrp_sensitivity: float = 0.0
    """DVRP: weight of the k3 to the view of corruption.kind, which is maximised."""
    dvrp_robustness: float = 0.0
    """DVRP: weight of the k3 to the view of corruption.second, which is minimised."""
    dvrp_masked_entropy: float = 0.0
    """DVRP: weight of -log of the sampled tokens' probability given the view of corruption.kind,
    minimised; without gradients into that view (objective.aug) a constant, as in the code."""
    dvrp_noised_entropy: float = 0.0
    """DVRP: the same given the view of corruption.second."""
    margin_coef: float = 0.0
    """Weight of the margin, which is maximised: how much more a response depends on what
    corruption.kind removes (the evidence) than on what corruption.second removes (a control)."""
    margin_penalty: Literal["k1", "k3"] = "k3"
    """Margin: sampled estimator of the KL to a view; k3 has no bound."""
    margin_bound: float = 10.0
    """Margin: largest size of a response's margin that counts, in nats."""
    margin_kl_bound: float | None = None
    """Margin: largest mean KL of a response to a view; None: no bound."""
    margin_transform: Literal["linear", "softplus"] = "linear"
    """Margin: -margin itself, or softplus(-margin), is minimised; the latter is log 2 at 0."""

    @property
    def has_dvrp_term(self) -> bool:
        weights = (self.dvrp_sensitivity, self.dvrp_robustness)
        return any((*weights, self.dvrp_masked_entropy, self.dvrp_noised_entropy))
