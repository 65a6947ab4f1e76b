"""From prompts to groups that an update can learn from: sample, score, compare, corrupt.

The passes without gradient stand here too: what the old policy, the reference and, where it is
stored, the corrupted stream say of each response token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from papo_fast.config import Config
from papo_fast.data.corruption import prompt_seed
from papo_fast.data.prompts import Prompt
from papo_fast.data.views import CorruptedViews
from papo_fast.errors import InputError
from papo_fast.model.batching import distribute
from papo_fast.model.policy import Policy, SharedReference, inference
from papo_fast.parallel import gather, rank, world_size
from papo_fast.rewards.shaping import dynamic_filter, group_advantages, overlong_penalty
from papo_fast.rollout.sampler import Sampler
from papo_fast.samples import Group, Sample, all_samples


class Collector:
    """Samples and scores groups until a step's batch is full."""

    def __init__(self, config: Config, sampler: Sampler, views: CorruptedViews, steps: int):
        self.config, self.sampler = config, sampler
        self.views, self.steps = views, steps

    def collect(
        self, stream: Iterator[list[Prompt]], step: int, advance: Callable[[int], None]
    ) -> tuple[list[Group], dict[str, float]]:
        """One rollout of `rollout.prompts` groups and its metrics.

        DAPO's filter asks for more groups until the batch is full, or for so long as
        `rollout.max_filter_rounds` allows. The metrics are of everything that was sampled, also of
        the groups that the filter drops.
        """
        rollout = self.config.rollout
        self.views.progress = (step - 1) / self.steps
        sampled, kept, dropped, rounds = [], [], [], 0
        while len(kept) < rollout.prompts:
            if rounds == (rollout.max_filter_rounds if rollout.dynamic_filter else 1):
                if rollout.filter_unfilled == "top_up":
                    break
                raise InputError(
                    f"rollout.dynamic_filter kept {len(kept)} of the {rollout.prompts} groups "
                    f"needed after {rounds} rounds: the questions are too easy or too hard for "
                    "this model; widen rollout.filter_range, raise rollout.max_filter_rounds, or "
                    "pass --rollout.filter-unfilled top_up"
                )
            groups = self.sampler.sample(
                next(stream),
                rollout.group_size,
                temperature=rollout.temperature,
                max_new_tokens=rollout.max_new_tokens,
                seed=prompt_seed(self.config.seed, step, -1 - rounds * world_size() - rank()),
                advance=advance,
            )
            for group in groups:
                self._reward(group)
                (kept if self._teaches(group) else dropped).append(group)
            sampled += groups
            rounds += 1
        batch = [*kept, *dropped][: rollout.prompts]
        self._compare(batch)
        if self.config.objective.needs_aug:
            for group in batch:
                # one corruption per prompt and step, shared by its responses; made by who needs it
                seed = prompt_seed(self.config.seed, step, group.prompt.index)
                group.aug_pixels, group.second_pixels = self.views.later(group.prompt, seed)
        return batch, sampling_metrics(all_samples(sampled)) | {
            "groups_kept": len(kept) / len(sampled),
            "groups_differ": sum(_differ(group) for group in sampled) / len(sampled),
            "rollout_rounds": rounds,
        }

    def _reward(self, group: Group) -> None:
        """Score plus DAPO's soft penalty for overlong responses."""
        reward, limit = self.config.reward, self.config.rollout.max_new_tokens
        lengths = torch.tensor([len(s) for s in group.samples])
        penalty = overlong_penalty(lengths, limit, reward.overlong_buffer)
        scores = torch.tensor([s.score.reward for s in group.samples])
        rewards = scores + reward.overlong_coef * penalty
        for sample, value in zip(group.samples, rewards.tolist(), strict=True):
            sample.reward = value

    def _teaches(self, group: Group) -> bool:
        rollout = self.config.rollout
        if not rollout.dynamic_filter:
            return True
        accuracies = torch.tensor([s.score.accuracy for s in group.samples])
        one_group = torch.zeros(len(group.samples), dtype=torch.int64)
        return bool(dynamic_filter(accuracies, one_group, *rollout.filter_range).all())

    def _compare(self, groups: Sequence[Group]) -> None:
        rewards = torch.tensor([s.reward for s in all_samples(groups)])
        group_ids = torch.arange(len(groups)).repeat_interleave(self.config.rollout.group_size)
        advantages = group_advantages(rewards, group_ids, self.config.objective.advantage)
        for sample, value in zip(all_samples(groups), advantages.tolist(), strict=True):
            sample.advantage = value


def _differ(group: Group) -> bool:
    """Whether the rewards of a group are not all equal, so that it has advantages."""
    return len({sample.reward for sample in group.samples}) > 1


def sampling_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Means over all samples; of each reward function its own."""
    n = len(samples)
    names = samples[0].score.values
    of_functions = {f"reward_{x}": sum(s.score.values[x] for s in samples) / n for x in names}
    return of_functions | {
        "reward": torch.tensor([s.reward for s in samples]).mean().item(),
        "accuracy": sum(s.score.accuracy for s in samples) / n,
        "format": sum(s.score.format for s in samples) / n,
        "response_length": sum(len(s) for s in samples) / n,
        "truncated": sum(not s.completion.finished for s in samples) / n,
    }


def add_logprobs(
    groups: Sequence[Group],
    policy: Policy,
    reference: Policy | SharedReference | None,
    config: Config,
) -> dict[str, float]:
    """Fill in what the update needs of each sample but does not compute itself; returns metrics.

    That is `old` where several updates follow or the sampler's word is taken, `ref` for a sampled
    reference KL, and `aug` where the corrupted stream is stored.
    """
    samples = all_samples(groups)
    if config.old_logprobs_from == "pass":
        _score(groups, "old", policy, policy, config)
    if reference is not None and config.objective.kl_estimator == "sampled":
        _score(groups, "ref", reference, policy, config)
    if config.objective.aug_stream == "stored":
        for view in ("aug", "second") if config.objective.needs_second else ("aug",):
            _score(groups, view, policy, policy, config)
    if config.old_logprobs_from == "sampler":
        for sample in samples:
            sample.old = torch.tensor(sample.completion.logprobs)
    if config.old_logprobs_from != "pass":
        return {}
    old = torch.cat([sample.old for sample in samples])
    sampler = torch.cat([torch.tensor(sample.completion.logprobs) for sample in samples])
    return {"sampler_mismatch": (old - sampler).abs().mean().item()}


def _score(
    groups: Sequence[Group],
    field: Literal["old", "ref", "aug", "second"],
    scorer: Policy | SharedReference,
    policy: Policy,
    config: Config,
) -> None:
    """Fill in one field of all samples; each rank scores its share."""
    # a pass without gradient runs one stream at a time and keeps no activations
    batches = distribute(groups, config.train.max_tokens, 1, policy.shape, world_size())[rank()]
    stream = {field: True, "full": False} if field in ("aug", "second") else {}
    samples = all_samples(groups)
    with inference(policy):
        for some in batches:
            batch = policy.pack(some, **stream)
            stats, _ = scorer.stats(batch, temperature=config.rollout.temperature)
            logprobs = stats.logprobs.cpu().split([len(s) for s in batch.samples])
            for sample, of_sample in zip(batch.samples, logprobs, strict=True):
                setattr(sample, field, of_sample)
    mine = {i: x for i, s in enumerate(samples) if (x := getattr(s, field)) is not None}
    for of_rank in gather(mine):
        for i, of_sample in of_rank.items():
            setattr(samples[i], field, of_sample)
