"""One policy update: micro-batches, the objective, gradients, clip, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from papo_fast.config import Config
from papo_fast.errors import InputError
from papo_fast.experience import Experience, needs_aug_forward, weighs_rollout
from papo_fast.model.lora import SharedReference
from papo_fast.model.packing import Group, pack, plan
from papo_fast.model.policy import Policy
from papo_fast.objective import Metrics, annealed, mean_metrics, objective, truncated_weights
from papo_fast.parallel import gather, rank, world_size
from papo_fast.token_batch import Denominators, TokenBatch


@dataclass
class Updater:
    """Owns the optimizer and counts updates.

    Args:
        policy: what is trained.
        reference: frozen policy for the reference KL, or None where its weight is 0.
        total_updates: of the whole run, for the learning-rate schedule.
    """

    config: Config
    policy: Policy
    reference: Policy | SharedReference | None
    total_updates: int

    def __post_init__(self) -> None:
        train = self.config.train
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=train.lr, betas=train.betas, weight_decay=train.weight_decay
        )
        self.objective = self.config.objective.resolved()
        self.updates = 0
        self.bad_updates = 0
        self._bad_in_a_row = 0

    def update(
        self, experience: Experience, sequences: Sequence[int], advance: Callable[..., None]
    ) -> dict[str, float]:
        """One optimizer step on `sequences` of the experience; returns its metrics.

        A gradient that is not finite changes nothing, is counted, and stops the run after
        `train.max_bad_updates` in a row.
        """
        config, parts = self.config, []
        kl_prcp_coef = annealed(
            self.objective.kl_prcp_coef, self.updates, self.objective.kl_prcp_anneal_steps
        )
        lr = self._lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        denominators = Denominators(
            tokens=float(sum(experience.lengths[i] for i in sequences)),
            sequences=float(len(sequences)),
            constant=float(len(sequences) * config.rollout.max_new_tokens),
            correct_tokens=float(
                sum(experience.lengths[i] for i in sequences if experience.is_right(i))
            ),
        )
        self.policy.train()
        self.optimizer.zero_grad(set_to_none=True)
        streams = 2 if needs_aug_forward(config) and self.objective.aug_gradient else 1
        groups = experience.groups(sequences)
        ranks = world_size()
        batches = plan(groups, config.train.max_tokens, streams, self.policy.shape, ranks)[rank()]
        for pieces in batches:
            tokens, mismatch = self._token_batch(experience, pieces)
            loss, metrics = objective(
                tokens, self.objective, denominators, kl_prcp_coef=kl_prcp_coef
            )
            # the denominators are of all ranks together, and gradients are averaged over ranks
            (loss * ranks).backward()
            parts.append(metrics | mismatch)
            advance(sum(len(piece.responses) for piece in pieces))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.train.grad_clip)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if math.isfinite(norm):
            self.optimizer.step()
            self._bad_in_a_row = 0
        else:
            self._skip(norm)
        self.updates += 1
        experience.updates += 1
        numbers = [{n: (float(a), float(b)) for n, (a, b) in part.items()} for part in parts]
        parts = [part for of_rank in gather(numbers) for part in of_rank]
        return mean_metrics(parts) | {"grad_norm": norm, "lr": lr, "kl_prcp_coef": kl_prcp_coef}

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

    def _token_batch(
        self, experience: Experience, pieces: Sequence[Group]
    ) -> tuple[TokenBatch, Metrics]:
        config, goal, device = self.config, self.objective, self.policy.device
        want_aug = needs_aug_forward(config)
        together = want_aug and bool(goal.aug_gradient)
        positions = self.policy.prompt_positions
        batch = pack(pieces, positions, aug=together).to(device)
        frozen_aug = None
        if want_aug and not together:
            frozen_aug = pack(pieces, positions, full=False, aug=True).to(device)
        exact_ref = goal.needs_reference and goal.kl_estimator == "exact"
        stats, ref_kl = self.policy.stats(
            batch,
            frozen_aug=frozen_aug,
            kl_to=self.reference if exact_ref else None,
            temperature=config.rollout.temperature,
        )

        def stored(per_sequence: list[Tensor] | None) -> Tensor | None:
            if per_sequence is None:
                return None
            return torch.cat([per_sequence[i] for i in batch.sequences]).to(device)

        mismatch: Metrics = {}
        sampler = stored(experience.sampler_logprobs)
        old_logprobs = stored(experience.old_logprobs)
        if old_logprobs is None:  # the only update of this rollout: its policy is the old one
            old_logprobs = stats.logprobs.detach()
        if experience.updates == 0 and "sampler_mismatch" not in experience.metrics:
            gap = (stats.logprobs.detach() - sampler).abs().sum()
            mismatch = {"sampler_mismatch": (gap, batch.n_tokens)}
        weights = None
        if weighs_rollout(config):
            cap = config.rollout.importance_cap
            weights, of_weights = truncated_weights(old_logprobs, sampler, cap)
            mismatch |= of_weights
        right = torch.tensor([experience.is_right(i) for i in batch.sequences], device=device)
        advantages = experience.advantages_B[batch.sequences].to(device)
        tokens = TokenBatch(
            logprobs=stats.logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages[batch.sequence_ids_N],
            sequence_ids=batch.sequence_ids_N,
            entropy=stats.entropy,
            aug_logprobs=stats.aug_logprobs if want_aug else stored(experience.aug_logprobs),
            aug_entropy=stats.aug_entropy,
            kl_prcp=stats.kl_prcp,
            ref_logprobs=stored(experience.ref_logprobs),
            ref_kl=ref_kl,
            correct=right[batch.sequence_ids_N],
            rollout_weights=weights,
        )
        return tokens, mismatch
