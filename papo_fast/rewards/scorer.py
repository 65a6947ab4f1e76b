"""Rewards of responses: a right answer in \\boxed{}, and the <think>…</think> format.

Answers are read first (`papo_fast.rewards.answers`). Those that need algebra are compared by
math-verify in worker processes with a limit of CPU time, if they are neither too long nor too large
(`9^{9^{9^{9}}}` never returns from C code). One that exceeds the limit is ended and replaced. The
workers are plain programs and not a multiprocessing pool: `spawn` would run the trainer's main
module, and with it torch, in every one of them, again after each kill.
"""

from __future__ import annotations

import json
import os
import queue
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Literal

from papo_fast.config import RewardConfig
from papo_fast.errors import InputError
from papo_fast.rewards import answer_check
from papo_fast.rewards.answers import Algebra, judge
from papo_fast.rewards.reading import tight

START_LIMIT = 600.0
"""Seconds a worker may take to start; a busy machine imports sympy slowly."""
WALL_FACTOR = 10.0
"""A worker that uses no CPU time, so that its own limit never comes, is killed after this many
times the limit."""
PATIENCE = 4
"""Timeouts of one call of `score` after which each further one costs `LOWERED` of the limit."""
LOWERED = 0.1
"""The share of the time limit that is left for an answer after `PATIENCE` timeouts."""

Verdict = Literal["right", "wrong", "timeout", "failure"]

_BOX = re.compile(r"\\boxed\s*\{")
_JOINED = re.compile(r"[\s$]*(?:,|;|\band\b|\bor\b|\\text\s*\{\s*(?:and|or)\s*\})?[\s$]*")
_BRACE_OR_ESCAPE = re.compile(r"\\.|[{}]", re.S)


@dataclass(frozen=True)
class Score:
    """What one response earned."""

    reward: float
    """accuracy_weight × accuracy + format_weight × format."""
    accuracy: float
    """1 if the last \\boxed{} equals the reference, else 0."""
    format: float
    """1 if the response has the asked-for format, else 0."""
    timed_out: bool
    """The comparison exceeded its time limit, or would have: the answer was too long or too large a
    number. Accuracy is 0."""


class Scorer:
    """Scores responses; a context manager, which ends its processes. They start when first needed.

    Attributes:
        timeouts: comparisons that used more than `config.timeout` seconds of CPU time, and answers
            beyond the limits of size in `answer_check`, which are not compared at all. The limit is
            on CPU time, so that a busy machine gives the same rewards. After `PATIENCE` of them in
            one call of `score`, `LOWERED` of it is left to each further answer of that call.
        failures: comparisons in which math-verify raised, ran out of memory or crashed; they score
            0. `last_failure` says how.
        prompt_end: how the prompts end, in text, for the check of the format: a chat template may
            have opened <think> already.
    """

    def __init__(self, config: RewardConfig):
        self.config = config
        self.timeouts = 0
        self.failures = 0
        self.last_failure = ""
        self.prompt_end = ""
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes; a later `score` starts new ones."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._idle = queue.SimpleQueue()

    def alarms(self) -> list[str]:
        """What the user should hear since the last call."""
        failure, self.last_failure = self.last_failure, ""
        return [f"an answer could not be compared: {failure}"] if failure else []

    def score(self, responses: Sequence[str], answers: Sequence[str]) -> list[Score]:
        """Scores of `responses` against the reference `answers`, one for each.

        A reference may be plain, in `$…$` or in \\boxed{}; several boxes are one answer of several
        parts, in a response too where only `and`, `or` or a comma stands between them. Raises
        `InputError` for an empty one and where the numbers differ; `RuntimeError` if the workers
        cannot start.
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
        compared = self._compare(list(dict.fromkeys(undecided.values())))
        verdicts.update((pair, compared[algebra]) for pair, algebra in undecided.items())
        self.timeouts += sum(verdicts[pair] == "timeout" for pair in pairs)
        self.failures += sum(verdicts[pair] == "failure" for pair in pairs)
        return [
            self._score(response, verdicts[pair])
            for response, pair in zip(responses, pairs, strict=True)
        ]

    def _score(self, response: str, verdict: Verdict) -> Score:
        accuracy, format_ = float(verdict == "right"), float(has_format(response, self.prompt_end))
        reward = self.config.accuracy_weight * accuracy + self.config.format_weight * format_
        return Score(reward, accuracy, format_, verdict == "timeout")

    def _compare(self, pairs: list[Algebra]) -> dict[Algebra, Verdict]:
        if not pairs:
            return {}
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.config.workers, "answer-check")
            self._workers = [_Worker(self.config.timeout) for _ in range(self.config.workers)]
            for worker in self._workers:
                self._idle.put(worker)
        late = [False] * len(pairs)

        def limit(timeouts: int) -> float:
            return self.config.timeout * (LOWERED if timeouts >= PATIENCE else 1.0)

        def ask(i: int) -> tuple[Verdict, str, float]:
            worker = self._idle.get()
            try:
                worker.timeout = limit(sum(late[:i]))
                verdict, reason = worker.compare(*pairs[i])
                late[i] = verdict == "timeout"
                return verdict, reason, worker.seconds
            finally:
                self._idle.put(worker)

        results = list(self._threads.map(ask, range(len(pairs))))
        # What an answer is allowed follows from the ones before it, all of them, and not from those
        # that had ended when it started: a score does not depend on the number of workers.
        verdicts: dict[Algebra, Verdict] = {}
        timeouts = 0
        for pair, (verdict, reason, seconds) in zip(pairs, results, strict=True):
            if verdict == "failure":
                self.last_failure = reason
            elif seconds > limit(timeouts):
                verdict = "timeout"
            timeouts += verdict == "timeout"
            verdicts[pair] = verdict
        return verdicts


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


class _Worker:
    """One process that runs `answer_check`, started again after each time it had to be killed."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        """Seconds of CPU time for the next answer."""
        self.seconds = 0.0
        """What the last one took, if it was compared."""
        self.process: subprocess.Popen[bytes] | None = None

    def compare(self, reference: str, candidate: str) -> tuple[Verdict, str]:
        """The verdict and, for a failure, its reason."""
        process = self.process or self._start()
        self.seconds = 0.0
        request = json.dumps([reference, candidate, self.timeout]).encode() + b"\n"
        try:
            stdin, _ = _pipes(process)
            stdin.write(request)
            stdin.flush()
            line = _read_line(process, WALL_FACTOR * self.timeout)
        except BrokenPipeError:
            line = b""
        if line is None:
            self.kill()
            return "timeout", ""
        if not line:
            status = process.wait()
            self.kill()
            if status == -answer_check.LIMIT_SIGNAL:
                return "timeout", ""
            return "failure", f"the worker died with exit status {status}"
        reply = json.loads(line)
        self.seconds = reply["seconds"]
        if "error" in reply:
            return "failure", reply["error"]
        return ("right" if reply["right"] else "wrong"), ""

    def kill(self) -> None:
        """End the process at once, if there is one."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        stdin, stdout = _pipes(self.process)
        stdout.close()
        with suppress(BrokenPipeError):  # part of a request was still buffered; its reader is dead
            stdin.close()
        self.process = None

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: the package's own folder on sys.path would shadow other libraries' modules.
        command = [sys.executable, "-P", answer_check.__file__]
        # Sets of strings inside sympy would otherwise be visited in another order each time.
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        self.process = process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        line = _read_line(process, START_LIMIT)
        reply = json.loads(line) if line else {}
        if not reply.get("ready"):
            self.kill()
            reason = reply.get("error", "it ended or hung while starting, see its message above")
            raise RuntimeError(
                f"cannot start a process that checks answers: {reason}. It needs math-verify: "
                "pip install 'math-verify[antlr4_13_2]'"
            )
        return process


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """Its stdin and stdout."""
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _read_line(process: subprocess.Popen[bytes], limit: float) -> bytes | None:
    """One line of its output, b"" if it has ended, None if `limit` seconds pass first."""
    stdout, deadline, line = _pipes(process)[1].fileno(), time.monotonic() + limit, b""
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stdout], [], [], left)[0]:
            return None
        chunk = os.read(stdout, 65536)
        if not chunk:
            return b""
        line += chunk
    return line
