"""What is measured of a policy on held-out questions, before training and after.

Beside the evaluation of `papo-fast train` (real pictures, corrupted pictures):

- *swapped*: each question gets the picture of the next one. No picture is corrupted, so a policy
  that detects black patches is not warned. One that looks reads what the new picture shows, and
  still answers from the text where the text gives the numbers.
- *one ruler*: perception KL and both entropies, exact and without a clip, of the policy's own
  answers. Arms log the KL that they train, in other directions, sampled or clipped, so their logs
  cannot be compared. The KL of the first token stands apart: every answer begins with the same
  word, whatever the picture shows, so who looks has no KL there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from papo_fast.data.prompts import Prompt
from papo_fast.digits.shortcut import hint_of
from papo_fast.evaluate import TEXT, VISION, Evaluation, evaluate, main_kind
from papo_fast.model.packing import pack
from papo_fast.model.policy import inference
from papo_fast.rewards.reading import reading
from papo_fast.rewards.scorer import last_boxed
from papo_fast.samples import Group, Sample
from papo_fast.trainer import Trainer

SWAPPED_SAMPLES = 2
RULER_PROMPTS = 128
RULER_BATCH = 32


class Measures:
    """Takes them of the policy that a trainer has at the moment."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.evaluator = trainer.evaluator

    def take(self, when: str) -> dict[str, dict]:
        """`summary`: the entries of summary.json; `measures`: what only the comparison reads."""
        real = self.evaluator.run("")
        corrupted = self.evaluator.run("", corrupted=True)
        return {
            "summary": real.summary(when) | corrupted.corrupted_summary(when),
            "measures": {
                "by_kind": by_kind(real),
                "corrupted": {
                    "accuracy": corrupted.accuracy,
                    "given": share(corrupted.groups, _is_right, _text_gives_all),
                },
                "swapped": self._swapped(),
                "ruler": self._ruler(real.groups),
            },
        }

    def _swapped(self) -> dict[str, Any]:
        """Accuracy by kind, and how often the picture that is there was read."""
        prompts = self.evaluator.prompts
        others = [*prompts[2:], *prompts[:2]]  # kinds come in turn: one of the same kind
        pairs = list(zip(prompts, others, strict=True))
        shown = [replace(p, encoded=_with_pixels(p, other)) for p, other in pairs]
        config = self.trainer.config
        result = evaluate(
            self.evaluator.sampler, shown, config, lambda n: None, samples=SWAPPED_SAMPLES
        )
        there = {prompt.index: other.reading for prompt, other in pairs}
        return {
            "accuracy": result.accuracy,
            "given": share(result.groups, _is_right, _text_gives_all),
            "read": share(
                result.groups,
                lambda prompt, sample: reading(sample.text) == there[prompt.index],
                lambda prompt: main_kind(prompt.kind) == VISION,
            ),
        }

    def _ruler(self, groups: Sequence[Group]) -> dict[str, float]:
        """Means over tokens of the first answer to each of the first questions, in nats."""
        policy, evaluator = self.trainer.policy, self.evaluator
        sums: dict[str, float] = defaultdict(float)
        tokens = answers = 0
        for start in range(0, min(RULER_PROMPTS, len(groups)), RULER_BATCH):
            some = [
                Group(g.prompt, g.samples[:1], _corrupted_pixels(evaluator, g.prompt))
                for g in groups[start : start + RULER_BATCH]
            ]
            with inference(policy):
                batch = pack(some, policy.prompt_positions, aug=True).to(policy.device)
                stats, _ = policy.stats(batch, temperature=self.trainer.config.eval.temperature)
            ids = batch.sequence_ids_N
            first = torch.ones_like(ids, dtype=torch.bool)
            first[1:] = ids[1:] != ids[:-1]
            for name in ("kl_prcp", "entropy", "aug_entropy"):
                sums[name] += getattr(stats, name).sum().item()
            sums["kl_first_token"] += stats.kl_prcp[first].sum().item()
            tokens, answers = tokens + len(ids), answers + int(first.sum())
        return {
            name: total / (answers if name == "kl_first_token" else tokens)
            for name, total in sums.items()
        }


def by_kind(result: Evaluation) -> dict[str, dict[str, float]]:
    """For each kind of question: shares of its samples, and the number of its questions.

    `misread` and `miscalculated` are wrong answers, the former with a wrong reading; `followed` are
    wrong answers that are what the hint says.
    """
    kinds: dict[str, list[Group]] = defaultdict(list)
    for group in result.groups:
        kinds[group.prompt.kind].append(group)
    found = {}
    for kind, groups in kinds.items():
        found[kind] = {
            "questions": len(groups),
            "accuracy": share(groups, _is_right),
            "read": share(groups, _is_read),
            "misread": share(groups, lambda p, s: not s.is_right and not _is_read(p, s)),
            "miscalculated": share(groups, lambda p, s: not s.is_right and _is_read(p, s)),
        }
        if any(hint_of(group.prompt.problem) for group in groups):
            found[kind]["followed"] = share(
                groups, lambda p, s: not s.is_right and last_boxed(s.text) == hint_of(p.problem)
            )
    return found


def share(
    groups: Sequence[Group],
    holds: Callable[[Prompt, Sample], bool],
    of: Callable[[Prompt], bool] = lambda prompt: True,
) -> float | None:
    """The share of samples for which `holds`, of prompts that are asked for; None of none."""
    found = [holds(g.prompt, s) for g in groups if of(g.prompt) for s in g.samples]
    return sum(found) / len(found) if found else None


def _is_right(prompt: Prompt, sample: Sample) -> bool:
    return sample.is_right


def _is_read(prompt: Prompt, sample: Sample) -> bool:
    return reading(sample.text) == prompt.reading


def _text_gives_all(prompt: Prompt) -> bool:
    """The text holds all that the picture shows, and no hint that misleads."""
    return (
        main_kind(prompt.kind) == TEXT
        and "Given: " in prompt.problem
        and not prompt.kind.endswith("misleading")
    )


def _with_pixels(prompt: Prompt, other: Prompt) -> Any:
    return replace(prompt.encoded, pixel_values=other.encoded.pixel_values)


def _corrupted_pixels(evaluator: Any, prompt: Prompt) -> torch.Tensor:
    return evaluator.corrupt(prompt, evaluator.corruption_seed(prompt))
