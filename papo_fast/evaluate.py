"""Mean accuracy of k samples per question, and what went wrong where it was wrong.

A wrong answer is a *perception error* where the reasoning misread the picture and a *reasoning
error* where it read it right (the paper's error study); that needs a `reading` column.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from papo_fast.config import Config
from papo_fast.data.corruption import PromptCorruption, prompt_seed
from papo_fast.data.encoder import PLACEHOLDER, PromptEncoder
from papo_fast.data.prompts import Prompt, PromptDataset
from papo_fast.model.policy import Policy
from papo_fast.parallel import gather_in_order, pick_device, rank, share_of
from papo_fast.report import print_summary
from papo_fast.rewards.scorer import Scorer
from papo_fast.rollout.hf import HFRollout
from papo_fast.rollout.protocol import RolloutEngine
from papo_fast.run.progress import Progress

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

    def summary(self, when: str) -> dict:
        """Its entries of summary.json; `when` is `before` or `after`."""
        return {
            f"accuracy_{when}": self.accuracy,
            f"perception_errors_{when}": self.perception_errors,
            f"reasoning_errors_{when}": self.reasoning_errors,
        }


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
    mine = share_of(prompts)
    encoded = [prompts[i].encoded for i in mine]
    if pixel_values is not None:
        encoded = [
            replace(e, pixel_values=pixel_values[i]) for e, i in zip(encoded, mine, strict=True)
        ]
    groups = engine.generate(
        encoded,
        k,
        temperature=config.eval.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.seed + 1 + 1_000_003 * rank(),
    )
    responses = [encoder.decode(c.token_ids) for group in groups for c in group]
    scores = scorer.score(responses, [prompts[i].answer for i in mine for _ in range(k)])
    pairs = list(zip(responses, scores, strict=True))
    my_prompts = [pairs[i * k : (i + 1) * k] for i in range(len(mine))]
    by_prompt = gather_in_order(my_prompts, len(prompts))
    sampled = [
        Sampled(p, r, s.reward, s.accuracy)
        for p, pairs in zip(prompts, by_prompt, strict=True)
        for r, s in pairs
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


class Evaluator:
    """Evaluates one policy again and again on the same held-out questions and masks."""

    def __init__(
        self,
        config: Config,
        engine: RolloutEngine,
        encoder: PromptEncoder,
        scorer: Scorer,
        corrupt: PromptCorruption,
        progress: Progress,
    ):
        self.config = config
        self.engine = engine
        self.encoder = encoder
        self.scorer = scorer
        self.corrupt = corrupt
        self.progress = progress
        self.prompts: list[Prompt] = []
        if config.data.test:
            dataset = PromptDataset(config.data.test, config.data, encoder, split="test")
            self.prompts = limit_per_kind(dataset, config.eval.limit)

    def run(self, label: str, corrupted: bool = False) -> Evaluation | None:
        """Mean@k with real or corrupted pictures; None where there are no held-out questions."""
        if not self.prompts:
            return None
        pixels = None
        if corrupted:
            pixels = [self.corrupt(p, self.corruption_seed(p)) for p in self.prompts]
        with self.progress.task(label, total=len(self.prompts)) as advance:
            self.engine.progress = advance
            result = evaluate(
                self.engine,
                self.encoder,
                self.prompts,
                self.scorer,
                self.config,
                pixel_values=pixels,
            )
            self.engine.progress = None
        return result

    def corruption_seed(self, prompt: Prompt) -> int:
        return prompt_seed(self.config.seed, 0, prompt.index)

    def examples(self, when: str, result: Evaluation, n: int = 12) -> list[dict]:
        """Rows for the report: the first sample of each of the first questions, with pictures."""
        rows = []
        for sample in result.samples[:: self.config.eval.samples][:n]:
            prompt = sample.prompt
            rows.append(
                {
                    "when": when,
                    "problem": prompt.problem.replace(PLACEHOLDER, "").strip(),
                    "kind": prompt.kind,
                    "answer": prompt.answer,
                    "reading": prompt.reading,
                    "response": sample.response,
                    "reward": sample.reward,
                    "accuracy": sample.accuracy,
                    "image": prompt.images[0] if prompt.images else None,
                    "corrupted": self.corrupt.picture(prompt, self.corruption_seed(prompt)),
                }
            )
        return rows


def limit_per_kind(prompts: Iterable[Prompt], limit: int) -> list[Prompt]:
    """The first `limit` prompts of each kind; all of them where limit is 0."""
    seen: dict[str, int] = defaultdict(int)
    kept = []
    for prompt in prompts:
        seen[prompt.kind] += 1
        if not limit or seen[prompt.kind] <= limit:
            kept.append(prompt)
    return kept


def evaluate_checkpoint(config: Config, console: Console) -> dict:
    """Mean@k of the checkpoint `config.model.path` on `config.data.test`; prints a table."""
    config.validate()
    encoder = PromptEncoder(
        config.model.path, config.data, trust_remote_code=config.model.trust_remote_code
    )
    device = pick_device(config.device)
    policy = Policy.load(config.model, encoder.banned_token_ids, device)
    torch.manual_seed(config.seed)
    engine = HFRollout(
        policy, encoder.eos_token_ids, encoder.pad_token_id, config.rollout.batch_size
    )
    corrupt = PromptCorruption(config.corruption, encoder)
    with Scorer(config.reward) as scorer:
        evaluator = Evaluator(config, engine, encoder, scorer, corrupt, Progress(console))
        result = evaluator.run("evaluating")
        summary = {"samples_per_question": config.eval.samples} | result.summary("after")
        if config.eval.corrupted:
            corrupted = evaluator.run("with corrupted images", corrupted=True)
            summary["accuracy_after_corrupted"] = corrupted.accuracy
    print_summary(summary, console)
    return summary
