"""Paired differences between arms: intervals by bootstrap over seeds, Student's t, Holm.

Two arms that share a seed share its warm start, questions and order of the data, so their
difference is taken seed by seed. The percentile interval resamples seeds; with ten of them it is
somewhat too narrow, so whether a difference counts is decided by the paired t test, corrected by
Holm (1979) over all arms that are compared with the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """Of an arm to the baseline in one outcome, over the seeds that both have."""

    seeds: int
    mean: float
    low: float
    high: float
    """Bounds of the 95 % interval; NaN where a single seed is there."""
    p: float
    """Two-sided, of the paired t test; NaN with fewer than two seeds."""
    adjusted: float = math.nan
    """p after Holm's correction."""


def difference(
    arm: Mapping[int, float], baseline: Mapping[int, float], resamples: int = 10_000
) -> Difference | None:
    """Outcomes by seed → their paired difference; None where no seed is in both."""
    seeds = sorted(arm.keys() & baseline.keys())
    if not seeds:
        return None
    values = [arm[seed] - baseline[seed] for seed in seeds]
    low, high = bootstrap(values, resamples)
    return Difference(len(seeds), float(np.mean(values)), low, high, paired_p(values))


def bootstrap(values: Sequence[float], resamples: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean; always the same for the same values."""
    if len(values) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).choice(np.asarray(values), (resamples, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_p(values: Sequence[float]) -> float:
    """Two-sided p of the mean being 0, by Student's t; 1 where all differences are 0."""
    from scipy.stats import t as student

    n = len(values)
    if n < 2:
        return math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    mean = float(np.mean(values))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * student.sf(abs(mean) / error, n - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p of each name → p corrected for the number of names; NaNs are left out of the number."""
    ordered = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted = dict.fromkeys(p_values, math.nan)
    largest = 0.0
    for i, (p, name) in enumerate(ordered):
        largest = max(largest, min(1.0, p * (len(ordered) - i)))
        adjusted[name] = largest
    return adjusted
