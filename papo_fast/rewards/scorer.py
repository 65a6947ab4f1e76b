"""Rewards of responses: a right answer in \\boxed{}, and the <think>…</think> format.

Answers that need algebra are compared by math-verify in worker processes with a limit of CPU time.
One that exceeds it (`9^{9^{9^{9}}}` never returns from C code) is ended and replaced. The workers
are plain programs and not a multiprocessing pool: `spawn` would run the trainer's main module, and
with it torch, in every one of them, again after each kill.
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

START_LIMIT = 600.0
"""Seconds a worker may take to start; a busy machine imports sympy slowly."""
WALL_FACTOR = 10.0
"""A worker that uses no CPU time, so that its own limit never comes, is killed after this many
times the limit."""

Verdict = Literal["right", "wrong", "timeout", "failure"]

_INTEGER = re.compile(r"([+-]?)0*([0-9]+)")
_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|operatorname)\s*\{(.*)\}", re.S
)
_CHOICE = re.compile(r"\(?([A-Za-z])(?:\)[.:]?|[.:])?(?:\s.*)?", re.S)
_PROSE = re.compile(r"[A-Za-z][A-Za-z'.,\s-]*")
_WORD = re.compile(r"[A-Za-z]{3,}")
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
    """The comparison exceeded its time limit, so that accuracy is 0."""


class Scorer:
    """Scores responses; a context manager, which ends its processes. They start when first needed.

    Attributes:
        timeouts: comparisons that used more than `config.timeout` seconds of CPU time. The limit is
            on CPU time, so that a busy machine gives the same rewards.
        failures: comparisons in which math-verify raised, ran out of memory or crashed; they score
            0. `last_failure` says how.
    """

    def __init__(self, config: RewardConfig):
        self.config = config
        self.timeouts = 0
        self.failures = 0
        self.last_failure = ""
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

        A reference may be plain, in `$…$` or in \\boxed{}. Raises `InputError` for an empty one
        and where the numbers differ; `RuntimeError` if the workers cannot start.
        """
        if len(responses) != len(answers):
            raise InputError(
                f"{len(responses)} responses and {len(answers)} answers: expected one reference "
                "answer per response"
            )
        references = [_reference(answer, i) for i, answer in enumerate(answers)]
        candidates = [last_boxed(response) for response in responses]
        pairs = list(zip(references, candidates, strict=True))
        verdicts: dict[tuple[str, str | None], Verdict] = {}
        undecided: list[tuple[str, str]] = []
        for pair in dict.fromkeys(pairs):
            reference, candidate = pair
            right = equal_as_text(reference, candidate) if candidate else False
            if right is not None:
                verdicts[pair] = "right" if right else "wrong"
            elif candidate:
                undecided.append((reference, candidate))
        verdicts.update(self._compare(undecided))
        self.timeouts += sum(verdicts[pair] == "timeout" for pair in pairs)
        self.failures += sum(verdicts[pair] == "failure" for pair in pairs)
        return [
            self._score(response, verdicts[pair])
            for response, pair in zip(responses, pairs, strict=True)
        ]

    def _score(self, response: str, verdict: Verdict) -> Score:
        accuracy, format_ = float(verdict == "right"), float(has_format(response))
        reward = self.config.accuracy_weight * accuracy + self.config.format_weight * format_
        return Score(reward, accuracy, format_, verdict == "timeout")

    def _compare(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str | None], Verdict]:
        if not pairs:
            return {}
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.config.workers, "answer-check")
            self._workers = [_Worker(self.config.timeout) for _ in range(self.config.workers)]
            for worker in self._workers:
                self._idle.put(worker)

        def ask(pair: tuple[str, str]) -> tuple[Verdict, str]:
            worker = self._idle.get()
            try:
                return worker.compare(*pair)
            finally:
                self._idle.put(worker)

        results = list(self._threads.map(ask, pairs))
        for verdict, reason in results:
            if verdict == "failure":
                self.last_failure = reason
        return {pair: verdict for pair, (verdict, _) in zip(pairs, results, strict=True)}


def has_format(response: str) -> bool:
    """Whether the response is <think>…</think> followed by text with a \\boxed{…}.

    The same as the authors' `<think>.*</think>.*\\\\boxed\\{.*\\}.*` on all of it, save that white
    space around it does not matter, but linear: the expression backtracks for hours on some inputs.
    """
    text = response.strip()
    if not text.startswith("<think>"):
        return False
    end = text.find("</think>", len("<think>"))
    box = text.find("\\boxed{", end) if end >= 0 else -1
    return box >= 0 and text.find("}", box) >= 0


def last_boxed(response: str) -> str | None:
    """What the last \\boxed{…} holds, stripped; None without one or if its braces never close."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for match in _BRACE_OR_ESCAPE.finditer(response, begin):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return response[begin : match.start()].strip()
    return None


def equal_as_text(reference: str, candidate: str) -> bool | None:
    """Whether two answers are equal where reading suffices; None where it takes algebra.

    Equal strings, two plain integers of any length, a multiple choice's capital letter (`B` equals
    `(b)`, `\\text{B. 12 cm}`) and prose are decided here. Prose must be: a parser of mathematics
    reads `listen` and `silent` as the same product of variables.
    """
    if reference == candidate:
        return True
    reference, candidate = _plain(reference), _plain(candidate)
    if reference == candidate:
        return True
    integer, other_integer = _INTEGER.fullmatch(reference), _INTEGER.fullmatch(candidate)
    if integer and other_integer:
        (sign, digits), (other_sign, other_digits) = integer.groups(), other_integer.groups()
        same_sign = (sign == "-") == (other_sign == "-") or digits == "0"
        return digits == other_digits and same_sign
    if len(reference) == 1 and reference.isascii() and reference.isupper():
        choice = _CHOICE.fullmatch(candidate)
        return choice is not None and choice[1].upper() == reference
    if _is_prose(reference):
        return _words(reference) == _words(candidate)
    return None


def _reference(answer: str, i: int) -> str:
    boxed = last_boxed(answer)
    reference = (answer if boxed is None else boxed).strip()
    if not reference:
        raise InputError(
            f"reference answer {i} is {answer!r}: expected text to compare responses with; remove "
            "the sample or fill in its answer"
        )
    return reference


def _plain(answer: str) -> str:
    """Without what only sets type: $…$, \\text{…} around all of it, runs of white space."""
    text = " ".join(answer.split())
    while True:
        if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
            text = text[1:-1].strip()
        elif (wrapped := _WRAPPED.fullmatch(text)) and "}" not in wrapped[1]:
            text = wrapped[1].strip()
        else:
            return text


def _is_prose(text: str) -> bool:
    # Capitals alone may be points of a figure or several choices: ABC equals BCA there.
    return bool(_PROSE.fullmatch(text)) and any(not w.isupper() for w in _WORD.findall(text))


def _words(text: str) -> str:
    return text.casefold().rstrip(".")


class _Worker:
    """One process that runs `answer_check`, started again after each time it had to be killed."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process: subprocess.Popen[bytes] | None = None

    def compare(self, reference: str, candidate: str) -> tuple[Verdict, str]:
        """The verdict and, for a failure, its reason."""
        process = self.process or self._start()
        request = json.dumps([reference, candidate]).encode() + b"\n"
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
        command = [sys.executable, "-P", answer_check.__file__, str(self.timeout)]
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
