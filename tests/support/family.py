"""`data/family.json`: what released code of perception-aware methods returned, by method and case.

Each case names a batch and a setting of its method. Lists of a batch are flat, response after
response; strings of 0 and 1 are masks. A case with a key `…tie…` has tokens of equal rank on both
sides of a threshold: which of them were kept is in its mask, which `chosen` takes over after it has
checked that it is one that ranks allow.
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from papo_fast.config import ObjectiveConfig
from papo_fast.dependency import WeightBatch
from papo_fast.estimators import kl_penalty
from papo_fast.objective import objective
from papo_fast.token_batch import Denominators
from support import TESTS

FAMILY = json.loads((TESTS / "data" / "family.json").read_text())
PENALTY = {"low_var_kl": "k3", "kl": "k1", "mse": "k2", "abs": "abs"}
TOLERANCE = 1e-6


def cases(*methods: str) -> list:
    """(method, setting's values, case) of all cases of these methods, as parameters of a test."""
    return [
        (name, FAMILY["methods"][name]["settings"][case["setting"]], case)
        for name in methods
        for case in FAMILY["methods"][name]["cases"]
    ]


def label(value) -> str:
    return (
        f"{value['setting']}-{value['batch']}" if isinstance(value, dict) and "out" in value else ""
    )


def f64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bits(text: str) -> Tensor:
    return torch.tensor([c == "1" for c in text])


class Batch:
    """A batch of the file as float64 tensors; `leaves` want gradients."""

    def __init__(self, case: dict):
        self.raw = FAMILY["batches"][case["batch"]]
        self.lengths = torch.tensor(self.raw["len"])
        self.ids = torch.arange(len(self.lengths)).repeat_interleave(self.lengths)
        names = ("logp", "old", "ref", "aug", "aug2", "H", "Haug", "S", "jsd")
        self.leaves = {n: f64(self.raw[n]).requires_grad_() for n in names}

    def __getitem__(self, name: str) -> Tensor:
        return self.leaves[name]

    def dependency(self, setting: dict) -> Tensor:
        """What peers' settings rank tokens by: the sampled k3 or |k1|, or the file's S itself."""
        if setting.get("scores") == "S":
            return self["S"].detach()
        metric = setting.get("loss", {}).get("visual_sensitivity_metric", "sampled_low_var_kl")
        kind = {"sampled_low_var_kl": "k3", "sampled_abs_log_ratio": "abs"}[metric]
        return kl_penalty(self["old"], self["aug"], kind, clamp_value=True).detach()

    def of_rollout(self, dependency: Tensor | None = None, evidence: bool = False) -> WeightBatch:
        """What token weights see: statistics of the policy that sampled."""
        old = self["old"].detach()
        score = self["S"].detach() if dependency is None else dependency
        return WeightBatch(
            logprobs=old,
            old_logprobs=old,
            aug_logprobs=self["aug"].detach(),
            advantages=f64(self.raw["adv"])[self.ids],
            sequence_ids=self.ids,
            entropy=self["H"].detach(),
            aug_entropy=self["Haug"].detach(),
            nucleus_entropy=self["H"].detach(),  # the file gives the one entropy to all methods
            kl_prcp=self["S"].detach(),
            js_divergence=self["jsd"].detach(),
            dependency=score,
            evidence=f64(self.raw["span"]).bool() if evidence else None,
        )

    def micro(self, setting: dict) -> list[Tensor]:
        """Tokens of each micro-batch: all, or the responses in two halves."""
        n = len(self.lengths)
        halves = torch.arange(n).split(n // 2) if setting.get("micro") == "half" else [None]
        tokens = torch.arange(len(self.ids))
        return [tokens if h is None else tokens[torch.isin(self.ids, h)] for h in halves]

    def loss(
        self, config: ObjectiveConfig, weights: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """Our objective on these tokens, its denominators those of the whole batch."""
        at = torch.arange(len(self.ids)) if tokens is None else tokens
        advantages = f64(self.raw["adv"])[self.ids]
        batch = WeightBatch(
            logprobs=self["logp"][at],
            old_logprobs=self["old"].detach()[at],
            ref_logprobs=self["ref"].detach()[at],
            aug_logprobs=self["aug"][at],
            advantages=(advantages if weights is None else advantages * weights)[at],
            sequence_ids=self.ids[at],
            entropy=self["H"][at],
            aug_entropy=self["Haug"][at],
        )
        over = Denominators(tokens=len(self.ids), sequences=len(self.lengths))
        return objective(batch, config, over)[0]

    def errors_of_gradients(self, out: dict, names: dict[str, str]) -> dict[str, float]:
        """Errors of gradients; `names` is {key of the file: leaf}."""
        found = {}
        for key, leaf in names.items():
            if key not in out:
                continue
            grad = self[leaf].grad
            theirs = out[key] or [0.0] * len(self.ids)  # None: no gradient at all
            found[key] = error(torch.zeros_like(self[leaf]) if grad is None else grad, theirs)
        return found


def error(ours: Tensor, theirs) -> float:
    """Largest difference, relative to the largest entry of what is recorded, or to 1e-9."""
    expected = f64(theirs)
    ours = ours.detach()
    assert ours.shape == expected.shape, (ours.shape, expected.shape)
    if not expected.numel():
        return 0.0
    worst = (ours - expected).abs().max().item() / max(expected.abs().max().item(), 1e-9)
    return math.inf if math.isnan(worst) else worst


def chosen(
    ours: Tensor,
    recorded: str,
    scores: Tensor,
    ids: Tensor,
    tie: bool,
    besides: Tensor | None = None,
) -> Tensor:
    """The recorded mask; it must be ours, or where ranks tie differ from it by equals alone.

    Args:
        scores: (N,) by which the largest were kept.
        ids: (N,) among which tokens they were kept.
        besides: (N,) bool, tokens that both masks have whatever their rank; how many others there
            are then depends on how many of these are among the largest.
    """
    mask = bits(recorded)
    if not tie:
        assert torch.equal(ours, mask)
        return mask
    for one in ids.unique():
        at = ids == one
        swapped = scores[at][ours[at] != mask[at]]
        assert besides is not None or ours[at].sum() == mask[at].sum()
        if len(swapped):
            assert swapped.max() - swapped.min() <= 1e-9 * swapped.abs().max()
    return mask
