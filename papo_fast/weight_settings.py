"""Settings of token weights: which are on, what they are measured by, and each method's numbers.

`papo_fast.config.ObjectiveConfig` is made of these and of its own; `papo_fast.token_weights` says
what each number does and where its default value comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from papo_fast.errors import InputError
from papo_fast.user_function import load_function

WEIGHT_NAMES = ("vppo", "pgpo", "tor", "cgpo", "vepo")
"""Token weights that come with the package; others are `FILE.py:name`."""

OVER_VOCABULARY = ("js_divergence", "nucleus_entropy")
"""What is measured where a weight asks for it alone, and in the pass after sampling alone."""


def load_weight(name: str) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The user's function `FILE.py:name`, and what its attribute `needs` asks for.

    Raises `InputError` where it cannot be loaded, or needs what is not of `OVER_VOCABULARY`.
    """
    function = load_function(name, "objective.token_weights")
    needs = getattr(function, "needs", ())
    if not isinstance(needs, tuple) or not set(needs) <= set(OVER_VOCABULARY):
        raise InputError(
            f"objective.token_weights: {name} has needs = {needs!r}, expected a tuple of "
            f"{' and '.join(OVER_VOCABULARY)}"
        )
    return function, needs


@dataclass(frozen=True)
class TokenWeightSettings:
    token_weights: str = ""
    """Factors on each token's advantage, multiplied: names out of vppo, pgpo, tor, cgpo, vepo and
    functions of your own as FILE.py:name, separated by commas; empty: none."""
    dependency: Literal["exact", "sampled-k3", "sampled-k1"] = "exact"
    """A token's dependency on the picture: the exact KL of the policy to the one with the
    corrupted picture, or of the sampled token its k3 or the size of its k1."""
    dependency_of: Literal["rollout", "current"] = "rollout"
    """The policy that weights are measured on: the one that sampled (one more pass per rollout, the
    weights see all tokens of an update), or the current one (they see a micro-batch)."""
    vppo_top_p: float = 0.4
    """VPPO: share of each response's tokens, those that depend most, that keep their advantage."""
    vppo_entropy_top_p: float = 0.0
    """VPPO: share of each response's tokens with the highest entropy that keep theirs too."""
    vppo_scaling_min: float = 0.9
    """VPPO: factor of the response that depends least on its picture; 1 leaves responses equal."""
    pgpo_threshold: float = 0.4
    """PGPO: normalised dependency from which on a token is boosted."""
    pgpo_boost: float = 2.0
    """PGPO: what the boost adds to the weight of the token that depends most."""
    pgpo_variant: Literal["paper", "code"] = "paper"
    """PGPO: the paper's rule, or that of its authors' development code."""
    tor_entropy_share: float = 0.3
    """ToR: share of tokens, of the highest entropy, that count as reasoning."""
    tor_perception_share: float = 0.3
    """ToR: share of tokens, of the highest dependency, that count as perception."""
    tor_perception_weight: float = 0.5
    """ToR: weight of perception tokens beside reasoning tokens at 1."""
    tor_nucleus: float = 0.95
    """ToR: probability mass of the most likely words that its entropy is of; 1: the entropy."""
    cgpo_entropy_share: float = 0.3
    """CGPO: share of tokens, of the highest entropy, that keep their advantage as it is."""
    cgpo_perception_share: float = 0.3
    """CGPO: share of tokens, of the highest dependency, whose advantage is scaled."""
    cgpo_scale: float = 0.1
    """CGPO: how far the factor of a response may be from 1."""
    select_over: Literal["batch", "response"] = "batch"
    """ToR, CGPO: shares of tokens are of all that are weighted together, or of each response."""
    vepo_score: Literal["A", "B", "C", "D", "E", "F", "G", "H"] = "D"
    """VEPO: the score of its code by which tokens are selected; D is the paper's."""
    vepo_alpha: float = 0.7
    """VEPO: exponent of the divergence in the score, beside 1 - this of the change of entropy."""
    vepo_top_p: float = 0.2
    """VEPO: share of each response's tokens that are selected."""
    vepo_bottom: bool = False
    """VEPO: select the lowest scores instead of the highest."""
    vepo_mode: Literal["mask", "weight"] = "mask"
    """VEPO: the mean over selected tokens alone, or a factor of 1 + vepo_lambda on them."""
    vepo_lambda: float = 1.0
    """VEPO: what vepo_mode=weight adds to the factor of selected tokens."""

    @property
    def weight_names(self) -> tuple[str, ...]:
        """What `token_weights` lists."""
        return tuple(x.strip() for x in self.token_weights.split(",") if x.strip())

    @property
    def weighs_on(self) -> Literal["none", "rollout", "current"]:
        """The policy that token weights are measured on, `none` without any."""
        return self.dependency_of if self.weight_names else "none"
