"""One policy update: batches of groups, the objective, gradients, clip, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from papo_fast.config import Config
from papo_fast.errors import InputError
from papo_fast.estimators import at_update, truncated_weights
from papo_fast.model.batching import distribute
from papo_fast.model.policy import Policy, SharedReference
from papo_fast.objective import mean_metrics, objective
from papo_fast.optimizer import make_optimizer
from papo_fast.parallel import gather, rank, whole, world_size
from papo_fast.samples import Group, all_samples
from papo_fast.token_batch import Denominators, Metrics, TokenBatch
from papo_fast.weighing import TokenWeigher


@dataclass
class Updater:
    """Owns the optimizer and counts updates.

    Args:
        config: resolved.
        policy: what is trained.
        reference: frozen policy for the reference KL, or None where its weight is 0.
        total_updates: of the whole run, for the learning-rate schedule.
    """

    config: Config
    policy: Policy
    reference: Policy | SharedReference | None
    total_updates: int

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.config, self.parameters, self.policy.device)
        self.weigher = TokenWeigher(self.config)
        self.updates = 0
        self.bad_updates = 0
        self._bad_in_a_row = 0

    def update(
        self, groups: Sequence[Group], advance: Callable[[int], None], *, first: bool = True
    ) -> dict[str, float]:
        """One optimizer step on these groups; returns its metrics.

        A gradient that is not finite changes nothing, is counted, and stops the run after
        `train.max_bad_updates` in a row.

        Args:
            advance: called with the number of samples that are done since the last call.
            first: the policy is still the one that sampled the groups.
        """
        config, ranks = self.config, world_size()
        goal = at_update(config.objective, self.updates)
        lr = self._lr()
        for of_optimizer in self.optimizer.param_groups:
            of_optimizer["lr"] = lr
        samples = all_samples(groups)
        over = Denominators.from_lengths(
            torch.tensor([len(s) for s in samples]),
            config.rollout.max_new_tokens,
            torch.tensor([s.is_right for s in samples]),
        )
        self.weigher.weigh(groups)
        self.policy.train()
        self.optimizer.zero_grad(set_to_none=True)
        streams = config.objective.streams_at_once
        room, shape = config.train.max_tokens, self.policy.shape
        metrics: list[Metrics] = []
        for some in distribute(groups, room, streams, shape, ranks)[rank()]:
            tokens, of_sampler = self._token_batch(some, first)
            loss, of_loss = objective(tokens, goal, over)
            # the denominators are of all ranks together, and gradients are averaged over ranks
            (loss * ranks).backward()
            metrics.append(of_loss | of_sampler)
            advance(sum(len(group.samples) for group in some))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.train.grad_clip)
        norm = whole(norm).item()
        if math.isfinite(norm):
            self.optimizer.step()
            self._bad_in_a_row = 0
        else:
            self._skip(norm)
        self.updates += 1
        numbers = [{n: (float(a), float(b)) for n, (a, b) in part.items()} for part in metrics]
        means = mean_metrics(part for of_rank in gather(numbers) for part in of_rank)
        return means | {"grad_norm": norm, "lr": lr, "kl_prcp_coef": goal.kl_prcp_coef}

    def _token_batch(self, groups: Sequence[Group], first: bool) -> tuple[TokenBatch, Metrics]:
        """The policy's statistics of the groups' tokens beside what was stored of them."""
        config, goal, device = self.config, self.config.objective, self.policy.device
        views = {"aug": True, "second": goal.needs_second}
        trained = views if goal.aug_stream == "trained" else {}
        batch, frozen_aug = self.policy.pack(groups, **trained), None
        if goal.aug_stream == "frozen":
            frozen_aug = self.policy.pack(groups, full=False, **views)
        exact_ref = goal.needs_reference and goal.kl_estimator == "exact"
        stats, ref_kl, second = self.policy.stats_of_views(
            batch,
            frozen_aug=frozen_aug,
            kl_to=self.reference if exact_ref else None,
            temperature=config.rollout.temperature,
        )

        def stored(vectors: Sequence[Tensor | None]) -> Tensor | None:
            known = [x for x in vectors if x is not None]
            return torch.cat(known).to(device) if known else None

        metrics: Metrics = {}
        samples, is_stored = batch.samples, goal.aug_stream == "stored"
        sampler = stored([torch.tensor(s.completion.logprobs) for s in samples])
        old = stored([s.old for s in samples])
        if old is None:  # the only update of this rollout: its policy is the old one
            old = stats.logprobs.detach()
        if first and config.old_logprobs_from != "pass":  # the pass has measured it already
            gap = (stats.logprobs.detach() - sampler).abs().sum()
            metrics["sampler_mismatch"] = (gap, batch.n_tokens)
        weights = None
        if config.weighs_by_sampler:
            cap = config.rollout.importance_cap
            weights, of_weights = truncated_weights(old, sampler, cap)
            metrics |= of_weights
        advantages = torch.tensor([s.advantage for s in samples], device=device)
        right = torch.tensor([s.is_right for s in samples], device=device)
        tokens = TokenBatch(
            logprobs=stats.logprobs,
            old_logprobs=old,
            advantages=advantages[batch.sequence_ids_N],
            sequence_ids=batch.sequence_ids_N,
            entropy=stats.entropy,
            aug_logprobs=stored([s.aug for s in samples]) if is_stored else stats.aug_logprobs,
            second_logprobs=stored([s.second for s in samples]) if is_stored else second,
            aug_entropy=stats.aug_entropy,
            kl_prcp=stats.kl_prcp,
            kl_reverse=stats.kl_reverse,
            ref_logprobs=stored([s.ref for s in samples]),
            ref_kl=ref_kl,
            correct=right[batch.sequence_ids_N],
            rollout_weights=weights,
        )
        factors = stored([s.weights for s in samples])
        tokens, of_weights = self.weigher.weighted(tokens, factors)
        return tokens, metrics | of_weights

    def counters(self) -> dict[str, int]:
        """What a checkpoint keeps besides the optimizer."""
        return {
            "updates": self.updates,
            "bad_updates": self.bad_updates,
            "bad_in_a_row": self._bad_in_a_row,
        }

    def restore(self, counters: dict[str, int]) -> None:
        self.updates = counters["updates"]
        self.bad_updates = counters["bad_updates"]
        self._bad_in_a_row = counters["bad_in_a_row"]

    def _lr(self) -> float:
        train = self.config.train
        lr = train.lr * min(1.0, (self.updates + 1) / max(1, train.warmup_steps))
        if train.lr_schedule == "linear":
            lr *= max(0.0, 1.0 - self.updates / self.total_updates)
        return lr

    def _skip(self, norm: float) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_updates += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self.config.train.max_bad_updates:
            raise InputError(
                f"gradient norm was {norm} in {self._bad_in_a_row} updates in a row "
                "(train.max_bad_updates): lower train.lr, or train in float32"
            )
