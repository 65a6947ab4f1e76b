"""Settings of the reward: its functions with their weights, and how long they may take."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from papo_fast.errors import InputError
from papo_fast.user_function import FORM, load_function, split_weight

REWARD_NAMES = ("accuracy", "format")
"""Rewards that come with the package."""

OFFERED = ("response", "answer", "reference", "prompt", "images")
"""What a reward function may ask for besides the columns of the row."""

_TAKEN = ("timeouts", "failures")


@dataclass(frozen=True)
class RewardConfig:
    functions: tuple[str, ...] = REWARD_NAMES
    """What is rewarded: accuracy, format, functions of your own as FILE.py:name, and services as
    http://HOST:PORT/PATH, each with =WEIGHT behind it. Without one accuracy and format have the
    two weights below, and others 1."""
    accuracy_weight: float = 0.9
    """Weight of a right answer."""
    format_weight: float = 0.1
    """Weight of the <think>…</think> … \\boxed{…} format."""
    timeout: float = 5.0
    """Seconds of CPU time that comparing one answer, or one call of a function, may take; then it
    gives 0 and is counted."""
    workers: int = 2
    """Processes that compare answers, and as many that call reward functions."""
    http_timeout: float = 30.0
    """Seconds in which a service must answer a request."""
    http_retries: int = 2
    """Requests that follow one that failed."""
    http_parallel: int = 8
    """Requests to a service at a time."""
    overlong_buffer: int = 0
    """DAPO's soft overlong penalty: tokens before the limit over which it grows from 0 to -1."""
    overlong_coef: float = 1.0
    """Weight of the overlong penalty."""


@dataclass(frozen=True)
class Rewarded:
    """One entry of `reward.functions`."""

    name: str
    """`accuracy`, `format`, FILE.py:name, python:NAME or a URL."""
    label: str
    """Short, for the metrics."""
    weight: float

    @property
    def is_service(self) -> bool:
        return self.name.startswith(("http://", "https://"))

    @property
    def is_own(self) -> bool:
        """Whether it is a function, and neither built in nor a service."""
        return self.name not in REWARD_NAMES and not self.is_service


def rewarded(config: RewardConfig) -> tuple[Rewarded, ...]:
    """The entries of `config.functions`, in order.

    Raises `InputError` for one that is not of a form the setting takes, and for two of one label.
    """
    builtin = {"accuracy": config.accuracy_weight, "format": config.format_weight}
    found: list[Rewarded] = []
    for entry in config.functions:
        name, weight = split_weight(entry, "reward.functions")
        if weight is None:
            weight = builtin.get(name, 1.0)
        elif "?" in name and "=" not in re.split("[?&]", name)[-1]:
            raise InputError(
                f"reward.functions: the number in {entry!r} may be a part of the URL, or a weight: "
                f"write {entry}=1, or {name}=={weight:g}"
            )
        one = Rewarded(name, _label(name), weight)
        if any(other.label == one.label for other in found) or one.label in _TAKEN:
            raise InputError(
                f"reward.functions: {entry!r} would be logged as reward_{one.label}, which is "
                "taken: give the function another name"
            )
        found.append(one)
    return tuple(found)


def _checked(url: str) -> SplitResult:
    """The parts of a service's URL; raises `InputError` where no request could be sent to it."""
    try:
        parts = urlsplit(url)
        fits = parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:  # a port of letters, a bracket left open
        fits = False
    if not fits or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(
            f"reward.functions: {url!r} is not of the form http://HOST:PORT/PATH (other characters "
            "than those of ASCII are written as %XX, and names and passwords are not sent)"
        )
    return parts


def _label(name: str) -> str:
    if name in REWARD_NAMES:
        return name
    if name.startswith(("http://", "https://")):
        parts = _checked(name)
        last = parts.path.rstrip("/").rpartition("/")[2] or str(parts.hostname)
        return re.sub(r"\W", "_", last)
    if ":" not in name or "://" in name:
        raise InputError(
            f"reward.functions: {name!r} is neither {', '.join(REWARD_NAMES)}, nor {FORM}, nor "
            "http://HOST:PORT/PATH, with or without =WEIGHT"
        )
    return name.rpartition(":")[2]


def check_rewards(config: RewardConfig) -> None:
    """Raise `InputError` where an entry of `config.functions` cannot be used."""
    if not config.functions:
        raise InputError("reward.functions is empty: nothing would be rewarded; name accuracy")
    for one in rewarded(config):
        if one.is_own:
            parameters_of(one.name)


def parameters_of(name: str) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    """What a reward function asks for by name: what it must get, what it may get; and whether it
    takes all there is.

    Raises `InputError` where it cannot be loaded, or wants an argument without a name.
    """
    function = load_function(name, "reward.functions")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function of C, which does not say
        return (), (), True
    nameless = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if nameless:
        raise InputError(
            f"reward.functions: {name} takes {nameless[0]} by its place alone; arguments are given "
            f"by their names: {', '.join(OFFERED)} and the columns of the data"
        )
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return (
        tuple(p.name for p in named if p.default is p.empty),
        tuple(p.name for p in named if p.default is not p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )
