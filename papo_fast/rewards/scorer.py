"""Rewards of responses: a right answer in \\boxed{}, the <think>…</think> format, and others.

Answers are read first (`papo_fast.rewards.answers`). Those that need algebra are compared by
math-verify in worker processes with a limit of CPU time, if they are neither too long nor too large
(`9^{9^{9^{9}}}` never returns from C code). One that exceeds the limit is ended and replaced. The
workers are plain programs and not a multiprocessing pool: `spawn` would run the trainer's main
module, and with it torch, in every one of them, again after each kill.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from papo_fast.errors import InputError
from papo_fast.reward_settings import RewardConfig, rewarded
from papo_fast.rewards import answer_check
from papo_fast.rewards.answers import Algebra, judge
from papo_fast.rewards.functions import Question, RewardFunctions, arguments_of
from papo_fast.rewards.reading import tight
from papo_fast.rewards.workers import (
    WALL_FACTOR,
    Outcome,
    Worker,
    Workers,
    ask_in_order,
    patient,
)

Verdict = Literal["right", "wrong", "timeout", "failure"]

REMEMBERED = 100_000
"""Comparisons whose verdicts are kept, at most. They forget all at once."""

_BOX = re.compile(r"\\boxed\s*\{")
_JOINED = re.compile(r"[\s$]*(?:,|;|\band\b|\bor\b|\\text\s*\{\s*(?:and|or)\s*\})?[\s$]*")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.S)


@dataclass(frozen=True)
class Score:
    """What one response earned."""

    reward: float
    """Σ weight × value over `reward.functions`."""
    accuracy: float
    """1 if the last \\boxed{} equals the reference, else 0."""
    format: float
    """1 if the response has the asked-for format, else 0."""
    timed_out: bool
    """The comparison exceeded its time limit, or would have: the answer was too long or too large a
    number. Accuracy is 0."""
    values: Mapping[str, float] = field(default_factory=dict)
    """What functions and services gave, by the name of their metric."""


class Scorer:
    """Scores responses; a context manager, which ends its processes. They start when first needed.

    Attributes:
        timeouts: comparisons that used more than `config.timeout` seconds of CPU time, and answers
            beyond the limits of size in `answer_check`, which are not compared at all. The limit is
            on CPU time, so that a busy machine gives the same rewards. After `PATIENCE` of them in
            one call of `score`, `LOWERED` of it is left to each further answer of that call. Calls
            of reward functions that took too long count here too.
        failures: comparisons in which math-verify raised, ran out of memory or crashed; they score
            0. `last_failure` says how. Calls of reward functions that failed count here too.
        prompt_end: how the prompts end, in text, for the check of the format: a chat template may
            have opened <think> already.
    """

    def __init__(self, config: RewardConfig):
        self.config = config
        self.timeouts = 0
        self.failures = 0
        self.last_failure = ""
        self.prompt_end = ""
        self.entries = rewarded(config)
        self._functions = RewardFunctions(config, self.entries)
        self._compared: dict[Algebra, Verdict] = {}
        self._pool = Workers(lambda: _Worker(config.timeout), config.workers, "answer-check")

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; a later `score` starts new ones."""
        self._pool.close()
        self._functions.close()

    @property
    def _workers(self) -> list[_Worker]:
        return self._pool.all

    def alarms(self) -> list[str]:
        """What the user should hear since the last call."""
        failure, self.last_failure = self.last_failure, ""
        said, self._functions.said = self._functions.said, []
        return [f"an answer could not be compared: {failure}"] * bool(failure) + said

    def score(
        self,
        responses: Sequence[str],
        answers: Sequence[str],
        questions: Sequence[Question] | None = None,
    ) -> list[Score]:
        """Scores of `responses` against the reference `answers`, one for each.

        A reference may be plain, in `$…$` or in \\boxed{}; several boxes are one answer of several
        parts, in a response too where only `and`, `or` or a comma stands between them. Raises
        `InputError` for an empty one and where the numbers differ; `RuntimeError` if the workers
        cannot start.

        Args:
            questions: what reward functions may know of each response's question; None: nothing.
        """
        if len(responses) != len(answers):
            raise InputError(
                f"{len(responses)} responses and {len(answers)} answers: expected one reference "
                "answer per response"
            )
        references = [_reference(answer, i) for i, answer in enumerate(answers)]
        candidates = [_answer(response) for response in responses]
        pairs = list(zip(references, candidates, strict=True))
        verdicts: dict[tuple[str, str | None], Verdict] = {}
        undecided: dict[tuple[str, str | None], Algebra] = {}
        for pair in dict.fromkeys(pairs):
            reference, candidate = pair
            judged = judge(reference, candidate) if candidate else False
            if not isinstance(judged, Algebra):
                verdicts[pair] = "right" if judged else "wrong"
            elif any(answer_check.too_large(answer) for answer in judged):
                verdicts[pair] = "timeout"
            else:
                undecided[pair] = judged
        compared = self._compare_once(list(dict.fromkeys(undecided.values())))
        verdicts.update((pair, compared[algebra]) for pair, algebra in undecided.items())
        self.timeouts += sum(verdicts[pair] == "timeout" for pair in pairs)
        self.failures += sum(verdicts[pair] == "failure" for pair in pairs)
        own = self._own(responses, candidates, answers, questions)
        return [
            self._score(response, verdicts[pair], {name: own[name][i] for name in own})
            for i, (response, pair) in enumerate(zip(responses, pairs, strict=True))
        ]

    def _own(
        self,
        responses: Sequence[str],
        candidates: Sequence[str | None],
        answers: Sequence[str],
        questions: Sequence[Question] | None,
    ) -> dict[str, list[float]]:
        """Values of the functions that are not built in, by label."""
        functions = self._functions
        if not functions.own:
            return {}
        asked: Sequence[Question | None] = questions or [None] * len(responses)
        timeouts, failures = functions.timeouts, functions.failures
        calls = map(arguments_of, responses, candidates, answers, asked)
        values = functions.values(list(calls))
        self.timeouts += functions.timeouts - timeouts
        self.failures += functions.failures - failures
        return values

    def _score(self, response: str, verdict: Verdict, own: dict[str, float]) -> Score:
        accuracy, format_ = float(verdict == "right"), float(has_format(response, self.prompt_end))
        values = {"accuracy": accuracy, "format": format_, **own}
        reward = sum((one.weight * values[one.label] for one in self.entries), 0.0)
        return Score(reward, accuracy, format_, verdict == "timeout", own)

    def _compare_once(self, pairs: list[Algebra]) -> dict[Algebra, Verdict]:
        """`_compare` of those that were not compared before: a policy repeats its mistakes."""
        found = self._compare([pair for pair in pairs if pair not in self._compared])
        found.update((pair, self._compared[pair]) for pair in pairs if pair in self._compared)
        if len(self._compared) > REMEMBERED:
            self._compared.clear()
        # what ran out of time or memory may do better on a quieter machine
        lasting = ((pair, v) for pair, v in found.items() if v in ("right", "wrong"))
        self._compared.update(lasting)
        return found

    def _compare(self, pairs: list[Algebra]) -> dict[Algebra, Verdict]:
        if not pairs:
            return {}
        workers = self._pool

        def ask(i: int, limit: float) -> Outcome:
            worker = workers.idle.get()
            try:
                worker.timeout = limit
                verdict, reason = worker.compare(*pairs[i])
                if verdict == "timeout" or verdict == "failure":
                    return Outcome(verdict, reason=reason, late=verdict == "timeout")
                return Outcome("value", verdict, worker.seconds)
            finally:
                workers.idle.put(worker)

        limit = partial(patient, self.config.timeout)
        outcomes = ask_in_order(len(pairs), ask, limit, workers.threads)
        reasons = [outcome.reason for outcome in outcomes if outcome.kind == "failure"]
        self.last_failure = reasons[-1] if reasons else self.last_failure
        verdicts = [x.value if x.kind == "value" else x.kind for x in outcomes]
        return dict(zip(pairs, verdicts, strict=True))


def has_format(response: str, prompt: str = "") -> bool:
    """Whether the response is <think>…</think> followed by text with a \\boxed{…}.

    The same as the authors' `<think>.*</think>.*\\\\boxed\\{.*\\}.*` on all of it, save that white
    space around it does not matter, but linear: the expression backtracks for hours on some inputs.
    As in the authors' code, white space beside `<`, `>` and `/` does not count: `< think >`.

    Args:
        prompt: what the response follows, or its end. Where that opens <think>, as some chat
            templates do, the response need not.
    """
    text = tight(response).strip()
    if not text.startswith("<think>"):
        if not tight(prompt).rstrip().endswith("<think>"):
            return False
        text = "<think>" + text
    end = text.find("</think>", len("<think>"))
    box = text.find("\\boxed{", end) if end >= 0 else -1
    return box >= 0 and text.find("}", box) >= 0


def last_boxed(response: str) -> str | None:
    """What the last \\boxed{…} holds, stripped; None without one or if its braces never close."""
    boxes = list(_BOX.finditer(response))
    if not boxes:
        return None
    end = _end_of_box(response, boxes[-1].end())
    return None if end is None else response[boxes[-1].end() : end].strip()


def equal_as_text(reference: str, candidate: str) -> bool | None:
    """Whether two answers are equal where reading suffices; None where it takes algebra.

    Equal strings, two plain integers of any length, choices (`B` equals `(b)`, `\\text{B. 12 cm}`),
    numbers with different units and words are decided here. Words must be: a parser of mathematics
    reads `listen` and `silent` as the same product of variables.
    """
    judged = judge(reference, candidate)
    return judged if isinstance(judged, bool) else None


def _answer(response: str) -> str | None:
    """The last box of a response, with those before it that only `and` or a comma parts from it."""
    last = last_boxed(response)
    if not last:
        return last
    boxes = list(_BOX.finditer(response))[-10:]
    parts = [last]
    for box, following in zip(boxes[-2::-1], boxes[:0:-1], strict=False):
        end = _end_of_box(response, box.end(), following.start())
        if end is None or not (joint := _JOINED.fullmatch(response, end + 1, following.start())):
            break
        if not joint[0].strip("$ \n\t"):
            break  # nothing between them: the answer was written twice
        joiner = " or " if "or" in joint[0] else ", "
        parts.append(response[box.end() : end].strip() + joiner)
    return "".join(reversed(parts))


def _end_of_box(text: str, begin: int, stop: int | None = None) -> int | None:
    """Where the box closes whose content begins at `begin`."""
    depth = 1
    for match in _BRACE_OR_ESCAPE.finditer(text, begin, len(text) if stop is None else stop):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    return None


def reference_of(answer: str) -> str:
    """What responses are compared with: what stands in the boxes, or the whole; may be empty."""
    boxes = list(_BOX.finditer(answer))
    if boxes and last_boxed(answer) is None:
        return answer[boxes[-1].end() :].strip()  # a box that is never closed
    if boxes:
        parts = [
            answer[box.end() : end].strip()
            for box in boxes
            if (end := _end_of_box(answer, box.end())) is not None
        ]
        if len(boxes) > 1 and "\\boxed" in parts[0]:  # one box around another
            return last_boxed(answer) or ""
        return ", ".join(parts) if all(parts) else ""  # a box without content asks for nothing
    return answer.strip()


def _reference(answer: str, i: int) -> str:
    reference = reference_of(answer)
    if not reference:
        raise InputError(
            f"reference answer {i} is {answer!r}: expected text to compare responses with; remove "
            "the sample or fill in its answer"
        )
    return reference


class _Worker(Worker):
    """One process that runs `answer_check`."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        """Seconds of CPU time for the next answer."""
        self.seconds = 0.0
        """What the last one took, if it was compared."""
        super().__init__(
            # -P: the package's own folder on sys.path would shadow other libraries' modules.
            [sys.executable, "-P", answer_check.__file__],
            # Sets of strings inside sympy would otherwise be visited in another order each time.
            {"PYTHONHASHSEED": "0"},
            "cannot start a process that checks answers: {reason}. It needs math-verify: "
            "pip install 'math-verify[antlr4_13_2]'",
        )

    def compare(self, reference: str, candidate: str) -> tuple[Verdict, str]:
        """The verdict and, for a failure, its reason."""
        self.seconds = 0.0
        request = json.dumps([reference, candidate, self.timeout]).encode() + b"\n"
        reply = self.ask(request, WALL_FACTOR * self.timeout)
        if reply is None or reply == -answer_check.LIMIT_SIGNAL:
            return "timeout", ""
        if isinstance(reply, int):
            return "failure", f"the worker died with exit status {reply}"
        self.seconds = reply["seconds"]
        if "error" in reply:
            return "failure", reply["error"]
        return ("right" if reply["right"] else "wrong"), ""
