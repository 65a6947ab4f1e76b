"""Mean accuracy of k samples per question, and what went wrong where it was wrong.

A wrong answer is a *perception error* where the reasoning misread the picture and a *reasoning
error* where it read it right (the paper's error study); that needs a `reading` column.

The *honesty check* asks what a policy does with a corrupted picture where it does not need one: the
accuracy, with corrupted pictures, on questions that the text alone answers. A policy that looks is
as good at them as before training. One that has learned to recognise corrupted pictures, and to
answer those differently because the perception KL pays for it, gets them wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from papo_fast.config import Config
from papo_fast.consoles import warn
from papo_fast.data.corruption import PromptCorruption, prompt_seed
from papo_fast.data.encoder import PLACEHOLDER, PromptEncoder
from papo_fast.data.prompts import Prompt, PromptDataset
from papo_fast.errors import InputError
from papo_fast.model.choice import load_encoder, load_policy
from papo_fast.parallel import pick_device, rank
from papo_fast.report import print_summary
from papo_fast.rewards.reading import reading
from papo_fast.rewards.scorer import Scorer
from papo_fast.rollout.engines import make_engine
from papo_fast.rollout.sampler import Sampler
from papo_fast.run.progress import Progress
from papo_fast.samples import Group

VISION, TEXT = "vision_dependent", "text_leaning"
"""Kinds of question. What stands behind a comma in a kind says more of it: `text_leaning, hint
absent`. It has a line of its own in the tables, and counts as the kind before the comma."""


@dataclass(frozen=True)
class Evaluation:
    """Shares of all samples. Errors are of vision-dependent samples; None without readings."""

    accuracy: dict[str, float]
    perception_errors: float | None
    reasoning_errors: float | None
    groups: list[Group]

    def summary(self, when: str) -> dict:
        """Its entries of summary.json; `when` is `before` or `after`."""
        return {
            f"accuracy_{when}": self.accuracy,
            f"perception_errors_{when}": self.perception_errors,
            f"reasoning_errors_{when}": self.reasoning_errors,
        }

    def corrupted_summary(self, when: str) -> dict:
        """Its entries of summary.json where the pictures were corrupted."""
        entries = {f"accuracy_{when}_corrupted": self.accuracy}
        right = [s.is_right for g in self.groups if main_kind(g.prompt.kind) == TEXT
                 for s in g.samples]  # fmt: skip
        if right:
            entries[f"honesty_{when}"] = sum(right) / len(right)
        return entries


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    config: Config,
    advance: Callable[[int], None],
    *,
    samples: int | None = None,
) -> Evaluation:
    """Mean@k on `prompts`.

    Args:
        advance: called with the number of this rank's prompts that are done since the last call.
        samples: k; None takes `config.eval.samples`.
    """
    groups = sampler.sample(
        prompts,
        samples or config.eval.samples,
        temperature=config.eval.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=config.seed + 1 + 1_000_003 * rank(),
        advance=advance,
    )
    by_kind: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        by_kind[group.prompt.kind or "all"] += [s.score.accuracy for s in group.samples]
    perception, reasoning = error_shares(groups, sampler.encoder.prompt_end)
    return Evaluation(
        accuracy={kind: sum(v) / len(v) for kind, v in by_kind.items()},
        perception_errors=perception,
        reasoning_errors=reasoning,
        groups=groups,
    )


def main_kind(kind: str) -> str:
    """A kind without what stands behind a comma."""
    return kind.partition(",")[0]


def error_shares(
    groups: Sequence[Group], prompt_end: str = ""
) -> tuple[float | None, float | None]:
    """Shares of vision-dependent samples that are perception errors and reasoning errors.

    Args:
        prompt_end: how the prompts end (`PromptEncoder.prompt_end`), which may have opened <think>.
    """
    judged = [
        (sample, group.prompt.reading)
        for group in groups
        if main_kind(group.prompt.kind) == VISION and group.prompt.reading is not None
        for sample in group.samples
    ]
    if not judged:
        return None, None
    wrong = [(sample, truth) for sample, truth in judged if not sample.is_right]
    misread = sum(reading(sample.text, prompt_end) != truth for sample, truth in wrong)
    return misread / len(judged), (len(wrong) - misread) / len(judged)


def held_out(config: Config, encoder: PromptEncoder, corrupt: PromptCorruption) -> list[Prompt]:
    """The questions of `config.data.test`; none where it is empty. No model is needed to read them.

    Raises `InputError` where they cannot be read, or lack a column that the corruption needs.
    """
    if not config.data.test:
        return []
    looks = config.eval.corrupted
    check = corrupt.check_row if looks else None
    dataset = PromptDataset(config.data.test, config.data, encoder, split="test", check=check)
    if looks:
        corrupt.check(dataset.columns)
    return limit_per_kind(dataset, config.eval.limit)


class Evaluator:
    """Evaluates one policy again and again on the same questions, `held_out`, and corruptions."""

    def __init__(
        self,
        config: Config,
        sampler: Sampler,
        corrupt: PromptCorruption,
        prompts: Sequence[Prompt],
        progress: Progress,
    ):
        self.config = config
        self.sampler = sampler
        self.corrupt = corrupt
        self.prompts = prompts
        self.progress = progress

    def run(self, label: str, corrupted: bool = False) -> Evaluation | None:
        """Mean@k with real or corrupted pictures; None where there are no held-out questions."""
        if not self.prompts:
            return None
        prompts = [self._corrupted(p) for p in self.prompts] if corrupted else self.prompts
        with self.progress.task(label, total=len(prompts)) as advance:
            return evaluate(self.sampler, prompts, self.config, advance)

    def _corrupted(self, prompt: Prompt) -> Prompt:
        return self.corrupt.prompt(prompt, self.corruption_seed(prompt))

    def corruption_seed(self, prompt: Prompt) -> int:
        return prompt_seed(self.config.seed, 0, prompt.index)

    def examples(self, when: str, result: Evaluation) -> list[dict]:
        """Rows for the report: the first sample of each of the first questions, with pictures."""
        n = self.config.eval.examples
        return [
            {
                "when": when,
                "problem": prompt.problem.replace(PLACEHOLDER, "").strip(),
                "kind": prompt.kind,
                "answer": prompt.answer,
                "reading": prompt.reading,
                "prompt_end": self.sampler.encoder.prompt_end,
                "response": sample.text,
                "reward": sample.score.reward,
                "accuracy": sample.score.accuracy,
                "image": prompt.images[0] if prompt.images else None,
                "corrupted": self.corrupt.picture(prompt, self.corruption_seed(prompt)),
            }
            for prompt, sample in ((g.prompt, g.samples[0]) for g in result.groups[:n])
        ]


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
    """Mean@k of the checkpoint `config.model.path` on `config.data.test`; prints a table.

    Args:
        config: resolved.

    Raises `InputError` where there are no held-out questions.
    """
    if not config.data.test:
        raise InputError("data.test is empty: pass --data.test FILE, the questions to evaluate on")
    torch.manual_seed(config.seed)
    with ExitStack() as held:
        scorer = held.enter_context(Scorer(config.reward))
        encoder = load_encoder(config.model, config.data)
        corrupt = PromptCorruption(config.corruption, encoder)
        prompts = held_out(config, encoder, corrupt)
        device = pick_device(config.device)
        policy = load_policy(config, encoder, device)
        # a server of its own keeps its log and its weights there
        folder = Path(held.enter_context(TemporaryDirectory(prefix="papo_fast_eval_")))
        engine = held.enter_context(closing(make_engine(config, policy, encoder, folder)))
        engine.load_weights(policy)
        sampler = Sampler(engine, encoder, scorer)
        evaluator = Evaluator(config, sampler, corrupt, prompts, Progress(console))
        result = evaluator.run("evaluating")
        summary = {"samples_per_question": config.eval.samples} | result.summary("after")
        if config.eval.corrupted:
            corrupted = evaluator.run("with corrupted images", corrupted=True)
            summary |= corrupted.corrupted_summary("after")
        for alarm in scorer.alarms():
            warn(console, alarm)
    print_summary(summary, console)
    return summary
