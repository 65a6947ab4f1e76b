"""The outcomes of a run, as numbers that are compared between arms; all are shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.evidence.arms import ADDED, ARMS, BASELINE, PAIRS
from bench.evidence.protocol import RESAMPLES, TEST_SEEDS, Cell
from bench.evidence.runner import result_of
from bench.evidence.statistics import Difference, difference, holm
from papo_fast.digits.task import KINDS

VISION, TEXT = KINDS


@dataclass(frozen=True)
class Outcome:
    says: str
    of: Callable[[dict], float | None]
    """From a result of the runner."""
    good: int
    """1: higher is better; -1: lower is better."""


def _mean_of(kinds: dict[str, dict], wanted: Iterable[str], name: str) -> float | None:
    """Over the questions of these kinds, all hints of a kind being as frequent as they are."""
    some = [entry for kind, entry in kinds.items() if kind in wanted]
    questions = sum(entry["questions"] for entry in some)
    if not questions:
        return None
    return sum(entry["questions"] * entry[name] for entry in some) / questions


def _share(main: str, name: str, hint: str | None = None) -> Callable[[dict], float | None]:
    def of(result: dict) -> float | None:
        kinds = result["measures"]["after"]["by_kind"]
        ends = "" if hint is None else f", hint {hint}"
        wanted = [k for k in kinds if k.startswith(main) and k.endswith(ends)]
        return _mean_of(kinds, wanted, name)

    return of


def honesty(result: dict, when: str = "after") -> float | None:
    """Accuracy with corrupted pictures on text-leaning questions that no hint misleads."""
    accuracy = result["measures"][when]["corrupted"]["accuracy"]
    return accuracy.get(TEXT, accuracy.get(f"{TEXT}, hint absent"))


_COMMON = {
    "vision": Outcome("right, vision-dependent", _share(VISION, "accuracy"), 1),
    "text": Outcome("right, text-leaning", _share(TEXT, "accuracy"), 1),
    "misread": Outcome("misread", _share(VISION, "misread"), -1),
    "miscalculated": Outcome("read right but wrong", _share(VISION, "miscalculated"), -1),
    "honesty": Outcome("honesty check", honesty, 1),
}
_MISLED, _ALONE, _HINTED = ((VISION, "accuracy", h) for h in ("misleading", "absent", "right"))
OUTCOMES: dict[str, dict[str, Outcome]] = {
    "digits": _COMMON,
    "digits-shortcut": {
        "misled": Outcome("right where the hint misleads", _share(*_MISLED), 1),
        "alone": Outcome("right without a hint", _share(*_ALONE), 1),
        "hinted": Outcome("right where the hint is right", _share(*_HINTED), 1),
        "followed": Outcome(
            "says what a misleading hint says", _share(VISION, "followed", "misleading"), -1
        ),
        **{name: _COMMON[name] for name in ("text", "misread", "honesty")},
    },
}
"""Task → outcomes; the first one of a task is its main one. All on vision-dependent questions
where nothing else is said."""


def results_of_test(results: Path, task: str, chosen: dict[str, str]) -> dict[str, dict[int, dict]]:
    """Arm → test seed → result, of those that are there."""
    found: dict[str, dict[int, dict]] = {}
    for name, setting in chosen.items():
        arm = ARMS[name]
        for seed in TEST_SEEDS:
            cell = Cell("test", task, arm, arm.setting(setting), seed)
            result = result_of(cell, results)
            if result is not None:
                found.setdefault(name, {})[seed] = result
    return found


def by_seed(outcome: Outcome, runs: dict[int, dict]) -> dict[int, float]:
    values = {seed: outcome.of(result) for seed, result in runs.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def pair_differences(
    outcome: Outcome, results: dict[str, dict[int, dict]]
) -> dict[tuple[str, str], Difference]:
    """Pair of forms that both have runs → their paired difference, p corrected over the pairs."""
    values = {name: by_seed(outcome, runs) for name, runs in results.items()}
    found = {
        (arm, base): difference(values[arm], values[base], RESAMPLES)
        for arm, base in PAIRS
        if arm in values and base in values
    }
    return _corrected({pair: d for pair, d in found.items() if d is not None})


def _corrected(found: dict[Any, Difference]) -> dict[Any, Difference]:
    adjusted = holm({name: d.p for name, d in found.items()})
    return {name: replace(d, adjusted=adjusted[name]) for name, d in found.items()}


def differences(
    outcome: Outcome, results: dict[str, dict[int, dict]], baseline: str = BASELINE
) -> dict[str, Difference | None]:
    """Arm → its paired difference to the baseline, with p corrected over the arms.

    The arms of the addendum are corrected apart from the others.
    """
    against = by_seed(outcome, results.get(baseline, {}))
    found = {
        name: difference(by_seed(outcome, runs), against, RESAMPLES)
        for name, runs in results.items()
        if name != baseline
    }
    known = {name: d for name, d in found.items() if d is not None}
    corrected = _corrected({name: d for name, d in known.items() if name not in ADDED})
    corrected |= _corrected({name: d for name, d in known.items() if name in ADDED})
    return {name: corrected.get(name) for name in found}
