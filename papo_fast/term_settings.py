"""Loss terms of the user's own, as `objective.terms` names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from papo_fast.errors import InputError
from papo_fast.user_function import load_function, split_weight

OF_AUG = ("aug_logprobs", "aug_entropy", "kl_prcp", "kl_reverse")
OF_SECOND = ("second_logprobs",)
OF_REFERENCE = ("ref_logprobs", "ref_kl")
ALWAYS = ("entropy", "correct")
"""Vectors of a `TokenBatch` that a term may need besides those that are never missing."""


@dataclass(frozen=True)
class OwnTerm:
    """One entry of `objective.terms`."""

    name: str
    """FILE.py:name or python:NAME."""
    coef: float
    values: Callable[..., Any]
    needs: tuple[str, ...]

    @property
    def metric(self) -> str:
        return f"term_{self.name.rpartition(':')[2]}"


def own_terms(entries: Sequence[str]) -> tuple[OwnTerm, ...]:
    """The terms that `entries` name, each with the coefficient behind it, or 1.

    Raises `InputError` where one cannot be loaded, needs what there is not, or is named twice.
    """
    found: list[OwnTerm] = []
    for entry in entries:
        name, coef = split_weight(entry, "objective.terms")
        function = load_function(name, "objective.terms")
        needs = getattr(function, "needs", ())
        known = (*ALWAYS, *OF_AUG, *OF_SECOND, *OF_REFERENCE)
        if not isinstance(needs, tuple) or not set(needs) <= set(known):
            raise InputError(
                f"objective.terms: {name} has needs = {needs!r}, expected a tuple of names out of "
                + ", ".join(known)
            )
        term = OwnTerm(name, 1.0 if coef is None else coef, function, needs)
        if any(other.metric == term.metric for other in found):
            raise InputError(
                f"objective.terms: {entry!r} would be logged as {term.metric}, which is taken: "
                "give the function another name"
            )
        found.append(term)
    return tuple(found)
