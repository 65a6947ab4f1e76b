"""Rewards besides accuracy and format: the user's functions, and services.

A function runs in worker processes. What it returns is its reward. A call that raises, returns
anything but a finite number, takes too long, or takes the process with it, gives 0 and is counted.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from PIL import Image

from papo_fast.errors import InputError
from papo_fast.reward_settings import OFFERED, RewardConfig, Rewarded, parameters_of
from papo_fast.rewards import function_worker
from papo_fast.rewards.function_worker import HELD
from papo_fast.rewards.service import ask_service
from papo_fast.rewards.workers import (
    LOWERED,
    WALL_FACTOR,
    Outcome,
    Worker,
    Workers,
    ask_in_order,
    patient,
)
from papo_fast.user_function import is_given, load_function, source_of

GIVE_UP = 16
"""Timeouts and crashes of one function, or failed requests to a service, in one call of `values`
after which the rest of its calls count as timeouts without being made."""


class Question(Protocol):
    """What a reward function may know of the question; `papo_fast.data.prompts.Prompt` is one."""

    problem: str
    images: list[Image.Image]
    columns: Mapping[str, Any]


def arguments_of(
    response: str, answer: str | None, reference: str, question: Question | None
) -> dict[str, Any]:
    """What a reward function is called with, by name; the row's columns stand behind the rest."""
    of_row = dict(question.columns) if question is not None else {}
    return of_row | {
        "response": response,
        "answer": answer,
        "reference": reference,
        "prompt": question.problem if question is not None else "",
        "images": question.images if question is not None else [],
    }


class RewardFunctions:
    """The entries of `reward.functions` that are not built in, in the order of `own`.

    Attributes:
        timeouts, failures: calls that gave 0, since the start.
        said: what went wrong since `said` was read last, a sentence for each function.
    """

    def __init__(self, config: RewardConfig, entries: Sequence[Rewarded]):
        self.config = config
        self.own = tuple(one for one in entries if one.is_own or one.is_service)
        self.timeouts = self.failures = 0
        self.said: list[str] = []
        functions = [one.name for one in self.own if one.is_own]
        self._wants = {name: parameters_of(name) for name in functions}
        self._numbers = {name: i for i, name in enumerate(functions)}
        pickled = pickle.dumps([_sent(name) for name in functions])
        self._workers = Workers(lambda: FunctionWorker(pickled), config.workers, "reward-function")
        self._clients: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End the worker processes; a later call starts new ones."""
        self._workers.close()
        if self._clients is not None:
            self._clients.shutdown(cancel_futures=True)
            self._clients = None

    def values(self, calls: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        """{label: a value for each of `calls`}, which are made by `arguments_of`.

        Raises `InputError` where a function asks for what the data does not have.
        """
        found = {}
        for one in self.own:
            outcomes = self._ask_service(one, calls) if one.is_service else self._ask(one, calls)
            self._count(one, outcomes)
            found[one.label] = [x.value if x.kind == "value" else 0.0 for x in outcomes]
        return found

    def _ask(self, one: Rewarded, calls: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        must, may, everything = self._wants[one.name]
        picked = []
        for call in calls:
            missing = [name for name in must if name not in call]
            if missing:
                columns = ", ".join(sorted(call.keys() - set(OFFERED))) or "no others"
                raise InputError(
                    f"reward.functions: {one.name} asks for {missing[0]}, which is neither "
                    f"{', '.join(OFFERED)} nor a column of the data, which has {columns}"
                )
            picked.append(
                dict(call) if everything else {n: call[n] for n in (*must, *may) if n in call}
            )

        def ask(i: int, seconds: float) -> Outcome:
            worker = self._workers.idle.get()
            try:
                return worker.call(self._numbers[one.name], picked[i], seconds)
            finally:
                self._workers.idle.put(worker)

        return ask_in_order(len(picked), ask, self._limit, self._workers.threads)

    def _ask_service(self, one: Rewarded, calls: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        timeout, retries = self.config.http_timeout, self.config.http_retries
        if self._clients is None:
            self._clients = ThreadPoolExecutor(self.config.http_parallel, "reward-service")

        def ask(i: int, seconds: float) -> Outcome:
            patient = seconds >= self.config.timeout
            return ask_service(
                one.name,
                calls[i],
                timeout=timeout if patient else timeout * LOWERED,
                retries=retries if patient else 0,
            )

        return ask_in_order(len(calls), ask, self._limit, self._clients)

    def _limit(self, late: int) -> float:
        return patient(self.config.timeout, late) if late < GIVE_UP else 0.0

    def _count(self, one: Rewarded, outcomes: Sequence[Outcome]) -> None:
        timeouts = sum(x.kind == "timeout" for x in outcomes)
        failures = sum(x.kind == "failure" for x in outcomes)
        self.timeouts += timeouts
        self.failures += failures
        if timeouts or failures:
            reason = next((x.reason for x in outcomes if x.reason), "it took too long")
            self.said.append(
                f"{one.name} gave no reward for {timeouts + failures} of {len(outcomes)} "
                f"responses, which count as 0: {reason}"
            )


class FunctionWorker(Worker):
    """A process that calls reward functions, each by its number in `entries`.

    Args:
        entries: a pickled list of functions, as `function_worker` reads it.
    """

    def __init__(self, entries: bytes):
        self.entries = entries
        self.pictures: Any = None
        """What the process holds: those of the call before."""
        self.calls = 0
        # The path of this process: a function may import what this program can. Not its main
        # module, which would train.
        start = f"import sys; sys.path[:] = {sys.path!r}; from {function_worker.__name__} import "
        super().__init__(
            [sys.executable, "-P", "-c", f"{start}main; main()"],
            {"PYTHONHASHSEED": "0"},
            "reward.functions: a process that calls them cannot start: {reason}",
        )

    def first_request(self) -> bytes:
        self.pictures = None
        return _framed(self.entries)

    def call(self, number: int, arguments: dict[str, Any], seconds: float) -> Outcome:
        """What function `number` makes of `arguments` in `seconds` of CPU time."""
        try:
            if self.process is None:
                self.start()
        except RuntimeError as error:
            return Outcome("failure", reason=str(error), late=True)
        pictures, sent = arguments.get("images"), None
        if pictures is not None:
            sent = HELD if pictures is self.pictures else pickle.dumps(pictures)
        rest = {name: value for name, value in arguments.items() if name != "images"}
        self.calls += 1
        request = _framed(pickle.dumps((self.calls, number, seconds, rest, sent)))
        reply = self.ask(request, WALL_FACTOR * seconds)
        self.pictures = pictures if self.process is not None else None
        if reply is None or reply == -function_worker.LIMIT_SIGNAL:
            return Outcome("timeout", late=True)
        if isinstance(reply, int):
            died = f"its process died with exit status {reply}"
            return Outcome("failure", reason=died, late=True)
        if reply.get("call") != self.calls:  # and the next replies would be of other calls, too
            self.kill()
            return Outcome("failure", reason="it wrote among its process's replies", late=True)
        if "error" in reply:
            return Outcome("failure", reason=reply["error"])
        return Outcome("value", reply["value"], reply["seconds"])


def _framed(pickled: bytes) -> bytes:
    return b"%d\n%b" % (len(pickled), pickled)


def _sent(name: str) -> bytes | tuple[str, str, bytes]:
    """A function as `function_worker` reads it: pickled, or its file's text of now."""
    if not is_given(name):
        return source_of(name, "reward.functions")
    import dill

    function = load_function(name, "reward.functions")
    try:
        # by value, with the names that it uses, where it stands in the main module
        return dill.dumps(function, recurse=True)
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"reward: {name.removeprefix('python:')} cannot be sent to the processes that call "
            f"reward functions ({what:.300}): write it into a file and name it FILE.py:name"
        ) from error
