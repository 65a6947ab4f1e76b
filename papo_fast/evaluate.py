"""Mean accuracy of k samples per question, and what went wrong where it was wrong.

A wrong answer is a *perception error* where the reasoning misread the picture and a *reasoning
error* where it read it right (the paper's error study); that needs a `reading` column.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from papo_fast.config import Config
from papo_fast.data import Prompt
from papo_fast.processing import PromptEncoder
from papo_fast.rewards import Scorer
from papo_fast.rollout import RolloutEngine

VISION = "vision_dependent"


@dataclass(frozen=True)
class Sampled:
    """One response to one question, as scored."""

    prompt: Prompt
    response: str
    reward: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """Shares of all samples. Errors are of vision-dependent samples; None without readings."""

    accuracy: dict[str, float]
    perception_errors: float | None
    reasoning_errors: float | None
    samples: list[Sampled]


def evaluate(
    engine: RolloutEngine,
    encoder: PromptEncoder,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    config: Config,
    *,
    samples: int | None = None,
    pixel_values: Sequence | None = None,
) -> Evaluation:
    """Mean@k on `prompts`.

    Args:
        samples: k; None takes `config.eval.samples`.
        pixel_values: pictures that stand in for the prompts' own, one per prompt (corrupted ones).
    """
    k = samples or config.eval.samples
    encoded = [p.encoded for p in prompts]
    if pixel_values is not None:
        encoded = [
            replace(e, pixel_values=p) for e, p in zip(encoded, pixel_values, strict=True)
        ]
    groups = engine.generate(
        encoded,
        k,
        temperature=config.eval.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.seed + 1,
    )
    owners = [p for p in prompts for _ in range(k)]
    responses = [encoder.decode(c.token_ids) for group in groups for c in group]
    scores = scorer.score(responses, [p.answer for p in owners])
    sampled = [
        Sampled(p, r, s.reward, s.accuracy)
        for p, r, s in zip(owners, responses, scores, strict=True)
    ]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for s in sampled:
        by_kind[s.prompt.kind or "all"].append(s.accuracy)
    perception, reasoning = error_shares(sampled)
    return Evaluation(
        accuracy={kind: sum(v) / len(v) for kind, v in by_kind.items()},
        perception_errors=perception,
        reasoning_errors=reasoning,
        samples=sampled,
    )


def error_shares(sampled: Sequence[Sampled]) -> tuple[float | None, float | None]:
    """Shares of vision-dependent samples that are perception errors and reasoning errors."""
    judged = [s for s in sampled if s.prompt.kind == VISION and s.prompt.reading is not None]
    if not judged:
        return None, None
    wrong = [s for s in judged if s.accuracy < 1]
    misread = sum(reading(s.response) != s.prompt.reading for s in wrong)
    return misread / len(judged), (len(wrong) - misread) / len(judged)


def reading(response: str) -> str | None:
    """What stands between <think> and </think>, or None where there is no such pair."""
    match = re.search(r"<think>(.*?)</think>", response, re.DOTALL)
    return match.group(1).strip() if match else None
