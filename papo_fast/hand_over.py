"""Functions that a Python program hands to a run, written into its configuration by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from papo_fast.config import Config
from papo_fast.errors import InputError
from papo_fast.user_function import is_given, name_given, split_weight

Given = str | Callable[..., Any] | tuple[str | Callable[..., Any], float]
"""A function or the name of one, alone or with its weight."""


def hand_over(
    config: Config,
    *,
    reward: Given | Sequence[Given] | None = None,
    corruption: Callable[..., Any] | str | None = None,
    token_weight: Callable[..., Any] | str | Sequence[Callable[..., Any] | str] | None = None,
    terms: Given | Sequence[Given] | None = None,
) -> Config:
    """`config` with these functions; what is None stays as it is.

    Args:
        reward: in place of `reward.functions`; names of it, such as "accuracy", may stand beside
            functions.
        corruption: in place of `corruption.kind`.
        token_weight: in place of `objective.token_weights`.
        terms: in place of `objective.terms`.

    Raises `InputError` for what is neither a function nor a text, or has no number as its weight.
    """
    goal = config.objective
    kept = {  # what stays in each setting, whose names are taken
        "reward": () if reward is not None else config.reward.functions,
        "corruption": () if corruption is not None else (config.corruption.kind,),
        "token_weight": () if token_weight is not None else goal.weight_names,
        "terms": () if terms is not None else goal.terms,
    }
    entries = (split_weight(x, setting)[0] for setting, of in kept.items() for x in of)
    taken = {name for name in (*entries, config.corruption.second) if is_given(name)}
    if reward is not None:
        functions = tuple(_entry(x, "reward", taken) for x in _several(reward))
        config = replace(config, reward=replace(config.reward, functions=functions))
    if corruption is not None:
        kind = _name(corruption, "corruption", taken)
        config = replace(config, corruption=replace(config.corruption, kind=kind))
    if token_weight is not None:
        names = [_name(x, "token_weight", taken) for x in _several(token_weight)]
        goal = replace(goal, token_weights=",".join(names))
    if terms is not None:
        goal = replace(goal, terms=tuple(_entry(x, "terms", taken) for x in _several(terms)))
    return replace(config, objective=goal)


def _several(given: Any) -> Sequence[Any]:
    """One entry, which may be a pair of function and weight, or many."""
    if isinstance(given, tuple) and len(given) == 2 and not callable(given[1]):
        return [given] if not isinstance(given[1], str | tuple) else given
    return given if isinstance(given, list | tuple) else [given]


def _entry(given: Any, argument: str, taken: set[str]) -> str:
    if not isinstance(given, tuple):
        return _name(given, argument, taken)
    if len(given) != 2 or isinstance(given[1], bool) or not isinstance(given[1], Real):
        raise InputError(f"{argument}: {given!r} is not a pair of a function and its weight")
    return f"{_name(given[0], argument, taken)}={float(given[1])!r}"


def _name(given: Any, argument: str, taken: set[str]) -> str:
    """The name of a function; two of one name get different ones, as all lambdas have."""
    if isinstance(given, str):
        return given
    if not callable(given):
        raise InputError(
            f"{argument} is {given!r:.100}: expected a function, or a text such as FILE.py:name"
        )
    name = name_given(given, taken)
    taken.add(name)
    return name
