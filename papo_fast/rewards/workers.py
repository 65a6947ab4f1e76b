"""Processes that may be killed, and the time that each of their answers may take."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Generic, Literal, TypeVar

START_LIMIT = 600.0
"""Seconds a worker may take to start; a busy machine imports sympy slowly."""
WALL_FACTOR = 10.0
"""A worker that uses no CPU time, so that its own limit never comes, is killed after this many
times the limit."""
PATIENCE = 4
"""Timeouts of one call after which each further one costs `LOWERED` of the limit."""
LOWERED = 0.1
"""The share of the time limit that is left for an answer after `PATIENCE` timeouts."""


def patient(limit: float, late: int) -> float:
    """The time limit of a call after `late` timeouts of those before it."""
    return limit * (LOWERED if late >= PATIENCE else 1.0)


@dataclass(frozen=True)
class Outcome:
    """What became of one question."""

    kind: Literal["value", "timeout", "failure"]
    value: Any = None
    seconds: float = 0.0
    """Of CPU time, where there is a value."""
    reason: str = ""
    """Of a failure."""
    late: bool = False
    """It used up patience."""


def ask_in_order(
    count: int,
    ask: Callable[[int, float], Outcome],
    limit: Callable[[int], float],
    threads: ThreadPoolExecutor,
) -> list[Outcome]:
    """Outcomes of questions 0 … count − 1, many at a time.

    What a question is allowed follows from the ones before it, all of them, and not from those that
    had ended when it started: an outcome does not depend on the number of workers.

    Args:
        ask: gets the number of a question and its limit in seconds.
        limit: seconds that are left after so many late ones; 0: no more questions are asked.
    """
    late = [False] * count

    def one(i: int) -> Outcome:
        seconds = limit(sum(late[:i]))
        if seconds <= 0:
            return Outcome("timeout", late=True)
        outcome = ask(i, seconds)
        late[i] = outcome.late
        return outcome

    outcomes = []
    before = 0
    for outcome in list(threads.map(one, range(count))):
        seconds = limit(before)
        if seconds <= 0 or (outcome.kind == "value" and outcome.seconds > seconds):
            outcome = Outcome("timeout", late=True)
        before += outcome.late
        outcomes.append(outcome)
    return outcomes


class Worker:
    """One process that answers requests by JSON lines, started again after it had to be killed.

    Args:
        command: starts a program that first prints a line `{"ready": true}` or `{"error": …}`.
        environment: of the process, beside this one's.
        hint: what the user can do where it does not start.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], hint: str):
        self.command = list(command)
        self.environment = dict(environment)
        self.hint = hint
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes, wall: float) -> dict[str, Any] | int | None:
        """The reply; the exit status of a process that died; None after `wall` seconds without."""
        process = self.process or self.start()
        try:
            stdin, _ = _pipes(process)
            stdin.write(request)
            stdin.flush()
            line = _read_line(process, wall)
        except BrokenPipeError:
            line = b""
        if line is None:
            self.kill()
            return None
        if not line:
            status = process.wait()
            self.kill()
            return status
        return _parsed(line)

    def start(self) -> subprocess.Popen[bytes]:
        """Raises `RuntimeError` where the process cannot start."""
        # a group of its own, so that what it has started ends with it
        self.process = process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )
        with suppress(BrokenPipeError):
            stdin, _ = _pipes(process)
            stdin.write(self.first_request())
            stdin.flush()
        line = _read_line(process, START_LIMIT)
        reply = _parsed(line) if line else {}
        if not reply.get("ready"):
            self.kill()
            reason = reply.get("error", "it ended or hung while starting, see its message above")
            raise RuntimeError(f"{self.hint.format(reason=reason)}")
        return process

    def first_request(self) -> bytes:
        """What the process is told before it is ready."""
        return b""

    def kill(self) -> None:
        """End the process at once, if there is one."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        stdin, stdout = _pipes(self.process)
        stdout.close()
        with suppress(BrokenPipeError):  # part of a request was still buffered; its reader is dead
            stdin.close()
        self.process = None


W = TypeVar("W", bound=Worker)


class Workers(Generic[W]):
    """Workers of one kind and a thread for each, made when they are first needed."""

    def __init__(self, make: Callable[[], W], count: int, label: str):
        self.make, self.count, self.label = make, count, label
        self.all: list[W] = []
        self.idle: queue.SimpleQueue[W] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def threads(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.count, self.label)
            self.all = [self.make() for _ in range(self.count)]
            for worker in self.all:
                self.idle.put(worker)
        return self._threads

    def close(self) -> None:
        """End the processes; they start again when they are needed."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        for worker in self.all:
            worker.kill()
        self.all = []
        self.idle = queue.SimpleQueue()


def _parsed(line: bytes) -> dict[str, Any]:
    """A reply; {} for what is none, which code that the process runs has written among them."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return reply if isinstance(reply, dict) else {}


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
