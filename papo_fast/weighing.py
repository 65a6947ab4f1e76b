"""Token weights in a run: what they read of the policy, and the factors of an update's tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from papo_fast.config import Config
from papo_fast.dependency import dependency, js_divergence, measured, nucleus_entropy
from papo_fast.errors import InputError
from papo_fast.model.batching import distribute
from papo_fast.model.policy import Policy, inference
from papo_fast.parallel import gather, rank, world_size
from papo_fast.samples import Group, Sample, all_samples
from papo_fast.token_batch import Metrics, TokenBatch
from papo_fast.token_weights import named_weights, token_weights
from papo_fast.weight_settings import OVER_VOCABULARY
from papo_kernels import token_stats

_LOGITS = 2**24
"""Logits of one stream that are held at a time."""


class TokenWeigher:
    """The weights of `objective.token_weights`; without any it does nothing.

    Args:
        config: resolved.
    """

    def __init__(self, config: Config):
        self.config, self.goal = config, config.objective
        self.weights = named_weights(self.goal)
        needs = {name for weight in self.weights.values() for name in weight.needs(self.goal)}
        self.over_vocabulary = [name for name in OVER_VOCABULARY if name in needs]

    def measure(self, groups: Sequence[Group], policy: Policy) -> dict[str, float]:
        """Fill in `Sample.seen`, where weights are of the policy that sampled; returns metrics.

        Each rank measures its share, and knows all afterwards.
        """
        if self.goal.weighs_on != "rollout":
            return {}
        # one stream at a time, as all passes without gradient
        room, samples = self.config.train.max_tokens, all_samples(groups)
        batches = distribute(groups, room, 1, policy.shape, world_size())[rank()]
        with inference(policy):
            for some in batches:
                self._measure(some, policy)
        mine = {i: s.seen for i, s in enumerate(samples) if s.seen is not None}
        for of_rank in gather(mine):
            for i, seen in of_rank.items():
                samples[i].seen = seen
        score = dependency(_tokens(samples), self.goal)
        return {"dependency": score.mean().item()}

    def _measure(self, groups: Sequence[Group], policy: Policy) -> None:
        options = policy.head_options(self.config.rollout.temperature)
        hidden = []
        for aug in (False, True):
            batch = policy.pack(groups, full=not aug, aug=aug)
            hidden_ND, weight_VD = policy.hidden_and_head(batch)
            hidden.append(hidden_ND)
        stats = token_stats(hidden[0], weight_VD, batch.targets_N, aug_hidden=hidden[1], **options)
        names = ("logprobs", "entropy", "aug_logprobs", "aug_entropy", "kl_prcp", "kl_reverse")
        found = {name: getattr(stats, name) for name in names}
        if self.over_vocabulary:
            found |= self._whole_rows(*hidden, weight_VD, **options)
        lengths = [len(sample) for sample in batch.samples]
        parts = {name: value.cpu().split(lengths) for name, value in found.items()}
        for i, sample in enumerate(batch.samples):
            sample.seen = {name: of_samples[i] for name, of_samples in parts.items()}

    def _whole_rows(
        self,
        hidden_ND: Tensor,
        aug_ND: Tensor,
        weight_VD: Tensor,
        *,
        bias: Tensor,
        temperature: float,
        softcap: float | None = None,
    ) -> dict[str, Tensor]:
        """What the kernels do not compute, from the logits of a few tokens at a time."""
        weight_VD = weight_VD.float()  # logits rounded to 16 bits would lose small divergences
        parts: dict[str, list[Tensor]] = {name: [] for name in self.over_vocabulary}
        rows = max(1, _LOGITS // len(weight_VD))
        for full, aug in zip(hidden_ND.split(rows), aug_ND.split(rows), strict=True):
            # in float64 from here: close policies differ in the last digits of float32
            p = capped(full.float() @ weight_VD.T + bias, softcap).double() / temperature
            if "js_divergence" in parts:
                q = capped(aug.float() @ weight_VD.T + bias, softcap).double() / temperature
                parts["js_divergence"].append(js_divergence(p, q))
            if "nucleus_entropy" in parts:
                parts["nucleus_entropy"].append(nucleus_entropy(p, self.goal.tor_nucleus))
        return {name: torch.cat(values).float() for name, values in parts.items()}

    def weigh(self, groups: Sequence[Group]) -> None:
        """Fill in `Sample.weights` of an update's groups, the same on every rank.

        Raises `InputError` where `measure` has not been called with the groups.
        """
        if self.goal.weighs_on != "rollout":
            return
        samples = all_samples(groups)
        batch = _tokens(samples)
        more = {name: _joined(samples, name) for name in self.over_vocabulary}
        factors = token_weights(measured(batch, self.goal, **more), self.goal, self.weights)
        lengths = [len(sample) for sample in samples]
        for sample, of_sample in zip(samples, factors.split(lengths), strict=True):
            sample.weights = of_sample

    def weighted(self, batch: TokenBatch, factors: Tensor | None) -> tuple[TokenBatch, Metrics]:
        """The batch with each token's factor on its advantage, and the metrics of the factors.

        Args:
            factors: (N,) of `weigh`; None where they are measured on the current policy.
        """
        if not self.weights:
            return batch, {}
        metrics: Metrics = {}
        n = batch.logprobs.numel()
        if factors is None:
            seen = measured(batch, self.goal)
            factors = token_weights(seen, self.goal, self.weights)
            metrics["dependency"] = (seen.vector("dependency").sum(), n)
        metrics["token_weight"] = (factors.sum(), n)
        metrics["tokens_left_out"] = ((factors == 0).sum(), n)
        return dataclasses.replace(batch, advantages=batch.advantages * factors), metrics


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits under a soft cap as `token_stats` has them: what is banned stays banned."""
    if softcap is None:
        return logits
    return torch.where(logits > -1e29, softcap * (logits / softcap).tanh(), logits)


def _joined(samples: Sequence[Sample], name: str) -> Tensor:
    missing = next((i for i, sample in enumerate(samples) if sample.seen is None), None)
    if missing is not None:
        raise InputError(f"samples[{missing}].seen is missing: call TokenWeigher.measure before")
    return torch.cat([sample.seen[name] for sample in samples])


def _tokens(samples: Sequence[Sample]) -> TokenBatch:
    """The samples' tokens as the policy saw them that sampled."""
    lengths = torch.tensor([len(sample) for sample in samples])
    logprobs = _joined(samples, "logprobs")
    names = ("entropy", "aug_logprobs", "aug_entropy", "kl_prcp", "kl_reverse")
    return TokenBatch(
        logprobs=logprobs,
        old_logprobs=logprobs,
        advantages=torch.tensor([s.advantage for s in samples]).repeat_interleave(lengths),
        sequence_ids=torch.arange(len(samples)).repeat_interleave(lengths),
        correct=torch.tensor([s.is_right for s in samples]).repeat_interleave(lengths),
        **{name: _joined(samples, name) for name in names},
    )
