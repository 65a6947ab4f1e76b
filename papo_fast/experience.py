"""From prompts to scored sequences: sample, reward, compare within the group, corrupt, score.

One `Experience` is what an update consumes: B = prompts x G sequences in group order, with what the
passes without gradient found out about each response token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from papo_fast.config import Config
from papo_fast.data.corruption import prompt_seed
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.prompts import Prompt
from papo_fast.errors import InputError
from papo_fast.model.lora import SharedReference
from papo_fast.model.packing import Group, pack, plan
from papo_fast.model.policy import Policy, inference
from papo_fast.parallel import gather, gather_in_order, rank, share_of, world_size
from papo_fast.rewards.scorer import Score, Scorer
from papo_fast.rewards.shaping import dynamic_filter, group_advantages, overlong_penalty
from papo_fast.rollout.protocol import RolloutEngine
from papo_fast.samples import Completion


@dataclass
class Experience:
    """B sequences; lists have B entries, per-token tensors are (length of response i,) float32."""

    prompts: list[Prompt]
    completions: list[Completion]
    scores: list[Score]
    advantages_B: Tensor
    aug_pixels: list[Tensor | None]
    old_logprobs: list[Tensor] | None = None
    ref_logprobs: list[Tensor] | None = None
    aug_logprobs: list[Tensor] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    updates: int = 0
    """Updates made on it so far; before the first one, the policy is the one that sampled."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        return [len(c.token_ids) for c in self.completions]

    @cached_property
    def sampler_logprobs(self) -> list[Tensor]:
        return [torch.tensor(c.logprobs) for c in self.completions]

    def is_right(self, i: int) -> bool:
        return self.scores[i].accuracy >= 1

    def groups(self, sequences: Sequence[int]) -> list[Group]:
        """The sequences by prompt, in order; those of one prompt stand together."""
        groups = []
        for _, members in itertools.groupby(sequences, key=lambda i: id(self.prompts[i])):
            members = list(members)
            groups.append(
                Group(
                    self.prompts[members[0]].encoded,
                    [self.completions[i].token_ids for i in members],
                    members,
                    self.aug_pixels[members[0]],
                )
            )
        return groups


class Collector:
    """Samples and scores groups until a step's batch is full."""

    def __init__(
        self,
        config: Config,
        engine: RolloutEngine,
        encoder: PromptEncoder,
        scorer: Scorer,
        corrupt: Callable[[Prompt, int], Tensor | None],
    ):
        self.config = config
        self.engine = engine
        self.encoder = encoder
        self.scorer = scorer
        self.corrupt = corrupt

    def collect(self, stream: Iterator[list[Prompt]], step: int) -> Experience:
        """One rollout of `rollout.prompts` groups; DAPO's filter asks for more until it is full, or
        for so long as `rollout.max_filter_rounds` allows.

        The metrics are of everything that was sampled, also of the groups that the filter drops.
        """
        rollout = self.config.rollout
        kept: list[tuple[Prompt, list[Completion], list[Score]]] = []
        dropped: list[tuple[Prompt, list[Completion], list[Score]]] = []
        completions: list[Completion] = []
        scores: list[Score] = []
        rounds = 0
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
            prompts = next(stream)
            new_groups, new_scores = self._sample(prompts, step, rounds)
            good = set(self._kept(new_scores))
            for i, group in enumerate(zip(prompts, new_groups, new_scores, strict=True)):
                (kept if i in good else dropped).append(group)
            completions += [c for group in new_groups for c in group]
            scores += [s for group in new_scores for s in group]
            rounds += 1
        experience = self._experience([*kept, *dropped][: rollout.prompts], step)
        experience.metrics = {
            "reward": self._rewards(completions, scores).mean().item(),
            "accuracy": sum(s.accuracy for s in scores) / len(scores),
            "format": sum(s.format for s in scores) / len(scores),
            "response_length": sum(len(c.token_ids) for c in completions) / len(completions),
            "truncated": sum(not c.finished for c in completions) / len(completions),
            "groups_kept": len(kept) / (len(scores) / rollout.group_size),
            "rollout_rounds": rounds,
        }
        return experience

    def _sample(
        self, prompts: list[Prompt], step: int, round_: int
    ) -> tuple[list[list[Completion]], list[list[Score]]]:
        """All groups of the round; each rank samples and scores its share of the prompts."""
        rollout, n = self.config.rollout, self.config.rollout.group_size
        mine = [prompts[i] for i in share_of(prompts)]
        groups = self.engine.generate(
            [p.encoded for p in mine],
            n,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            seed=prompt_seed(self.config.seed, step, -1 - round_ * world_size() - rank()),
        )
        responses = [self.encoder.decode(c.token_ids) for group in groups for c in group]
        flat = self.scorer.score(responses, [p.answer for p in mine for _ in range(n)])
        scored = [(group, flat[i * n : (i + 1) * n]) for i, group in enumerate(groups)]
        pairs = gather_in_order(scored, len(prompts))
        return [group for group, _ in pairs], [scores for _, scores in pairs]

    def _kept(self, scores: list[list[Score]]) -> list[int]:
        rollout = self.config.rollout
        if not rollout.dynamic_filter:
            return list(range(len(scores)))
        accuracies = torch.tensor([s.accuracy for group in scores for s in group])
        group_ids = torch.arange(len(scores)).repeat_interleave(rollout.group_size)
        kept = dynamic_filter(accuracies, group_ids, *rollout.filter_range)
        return group_ids[kept].unique().tolist()

    def _rewards(self, completions: Sequence[Completion], scores: Sequence[Score]) -> Tensor:
        """Score plus DAPO's soft overlong penalty, (B,) float32."""
        reward, limit = self.config.reward, self.config.rollout.max_new_tokens
        lengths = torch.tensor([len(c.token_ids) for c in completions])
        penalty = overlong_penalty(lengths, limit, reward.overlong_buffer)
        return torch.tensor([s.reward for s in scores]) + reward.overlong_coef * penalty

    def _experience(
        self, groups: Sequence[tuple[Prompt, list[Completion], list[Score]]], step: int
    ) -> Experience:
        config, n = self.config, self.config.rollout.group_size
        prompts = [prompt for prompt, _, _ in groups]
        completions = [c for _, group, _ in groups for c in group]
        scores = [s for _, _, group in groups for s in group]
        rewards = self._rewards(completions, scores)
        group_ids = torch.arange(len(prompts)).repeat_interleave(n)
        aug: list[Tensor | None] = []
        for prompt in prompts:
            seed = prompt_seed(config.seed, step, prompt.index)
            pixels = self.corrupt(prompt, seed) if config.objective.needs_aug else None
            aug += [pixels] * n  # one mask per prompt, shared by its responses
        return Experience(
            prompts=[p for p in prompts for _ in range(n)],
            completions=completions,
            scores=scores,
            advantages_B=group_advantages(rewards, group_ids, config.objective.advantage),
            aug_pixels=aug,
        )


def score_without_gradient(
    experience: Experience,
    policy: Policy,
    reference: Policy | SharedReference | None,
    config: Config,
    *,
    on_policy: bool,
) -> None:
    """The experience pass: fills in old, reference and (official parity) aug log-probs.

    Args:
        on_policy: this rollout makes a single update, so the update's own log-probs are the old
            ones and no pass is needed for them.
    """
    objective = config.objective.resolved()
    n = len(experience)
    sampler = experience.sampler_logprobs
    recompute = config.rollout.old_logprobs == "recompute" and not on_policy
    want_ref = reference is not None and objective.kl_estimator == "sampled"
    want_aug = objective.needs_aug and not needs_aug_forward(config)
    passes: list[
        tuple[Policy | SharedReference, bool, list[Tensor]]
    ] = []  # policy, corrupted pictures, results
    if recompute:
        passes.append((policy, False, old := [torch.empty(0)] * n))
    if want_ref:
        passes.append((reference, False, ref := [torch.empty(0)] * n))
    if want_aug:
        passes.append((policy, True, aug := [torch.empty(0)] * n))
    if passes:
        # a pass without gradient runs one stream at a time and keeps no activations
        groups = experience.groups(range(n))
        batches = plan(groups, config.train.max_tokens, 1, policy.shape, world_size())[rank()]
        with inference(policy):
            for groups, (scorer, corrupted, results) in itertools.product(batches, passes):
                batch = pack(groups, policy.prompt_positions, full=not corrupted, aug=corrupted)
                batch = batch.to(policy.device)
                stats, _ = scorer.stats(batch, temperature=config.rollout.temperature)
                lengths = [experience.lengths[i] for i in batch.sequences]
                for i, logprobs in zip(
                    batch.sequences, stats.logprobs.cpu().split(lengths), strict=True
                ):
                    results[i] = logprobs
        for _, _, results in passes:
            mine = {i: x for i, x in enumerate(results) if len(x)}
            for of_rank in gather(mine):
                for i, x in of_rank.items():
                    results[i] = x
    if recompute:
        experience.old_logprobs = old
        gap = torch.cat(old) - torch.cat(sampler)
        experience.metrics["sampler_mismatch"] = gap.abs().mean().item()
    elif config.rollout.old_logprobs == "sampler":
        experience.old_logprobs = sampler
    experience.ref_logprobs = ref if want_ref else None
    experience.aug_logprobs = aug if want_aug else None


def weighs_rollout(config: Config) -> bool:
    """Whether the policy loss gets importance weights of the trainer over the sampler.

    Not where old log-probs are the sampler's: the policy ratio then is that of the trainer over
    the sampler already. Not with `hf`, whose sampler is the trainer's model, and not in the
    authors' objective.
    """
    rollout = config.rollout
    return (
        rollout.importance_cap > 0
        and rollout.engine != "hf"
        and rollout.old_logprobs == "recompute"
        and config.objective.parity != "official"
    )


def needs_aug_forward(config: Config) -> bool:
    """Whether the update runs the corrupted stream itself.

    It does not where nothing of that stream carries gradient and nothing exact is asked of it: then
    the log-probs of the experience pass are enough, as in the authors' code.
    """
    objective = config.objective.resolved()
    if not objective.needs_aug:
        return False
    exact = "exact" in (objective.kl_prcp_estimator, objective.entropy_estimator)
    return bool(objective.aug_gradient) or exact
