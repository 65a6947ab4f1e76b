"""Alarms: what a row of metrics says of a run that is about to fail."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from papo_fast.run.metrics import Row

SAMPLER_MISMATCH = 0.1
"""Nats per token beyond what rounding explains; bfloat16 makes some hundredths."""


def mismatch_alarm(row: Mapping[str, Any]) -> list[str]:
    """An alarm where the policy that samples is not the one that is scored, else nothing."""
    mismatch = row.get("sampler_mismatch")
    if mismatch is None or mismatch <= SAMPLER_MISMATCH:
        return []
    return [
        f"sampler and trainer differ by {mismatch:.2g} nats per token, more than rounding does: "
        "they do not compute the same policy. --rollout.engine hf samples with the trainer's model"
    ]


@dataclass
class CollapseMonitor:
    """Alarms for the collapse signs that PAPO's paper reports for a perception term set too high.

    The means of the last `window` rows are compared with those of an earlier window, no more than
    `lookback` windows back. A change counts if it is large (the thresholds below) *and* stands out
    of the noise: more than `sigmas` standard errors, the noise of one row being estimated from the
    differences between neighbouring rows, which a steady trend leaves alone. Nothing is said
    before `warmup` windows have passed, and a sign that was reported is quiet for two windows. What
    to try is said with the first alarm of each sign.

    - perception KL against reward: since the window with the best reward, the KL has grown
      `kl_growth`-fold and by `kl_rise`, and the reward has fallen by `reward_fall`;
    - clipping: the share of tokens clipped from above reaches `clip_high_level` and is
      `clip_high_growth` times its lowest window;
    - entropies: with the real and with the corrupted image, both have grown `entropy_growth`-fold
      and by `entropy_rise` since the window with the lowest of each.

    Rows that lack a value (missing, null or not finite) are passed over for the signs that need it.
    """

    window: int = 5
    """Rows per mean."""
    warmup: int = 3
    """Windows before the first alarm."""
    lookback: int = 8
    """Windows that are remembered."""
    sigmas: float = 4.0
    """Standard errors of the difference of two windows that a change must exceed."""
    kl_growth: float = 2.0
    """Factor by which the perception KL must have grown."""
    kl_rise: float = 0.05
    """Nats by which the perception KL must have grown."""
    reward_fall: float = 0.05
    """Reward that must have been lost."""
    clip_high_level: float = 0.02
    """Share of tokens clipped from above below which nothing is said."""
    clip_high_growth: float = 3.0
    """Factor by which that share must have grown."""
    entropy_growth: float = 1.5
    """Factor by which both entropies must have grown."""
    entropy_rise: float = 0.1
    """Nats by which both entropies must have grown."""
    _history: dict[tuple[str, ...], deque[Row]] = field(default_factory=dict, init=False)
    _quiet: dict[tuple[str, ...], int] = field(default_factory=dict, init=False)
    _advised: set[tuple[str, ...]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("warmup", 2), ("lookback", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")

    def update(self, row: Mapping[str, Any], response: str = "") -> list[str]:
        """Take one metrics row, in order of steps; the alarms it sets off, mostly none."""
        alarms = []
        for keys, check in (
            (("kl_prcp", "reward"), self._kl_against_reward),
            (("clip_fraction_high",), self._clipping),
            (("entropy", "aug_entropy"), self._entropies),
        ):
            values = {key: row.get(key) for key in keys}
            if not all(isinstance(v, int | float) and math.isfinite(v) for v in values.values()):
                continue
            history = self._history.setdefault(keys, deque(maxlen=self.lookback * self.window))
            history.append(values)
            self._quiet[keys] = self._quiet.get(keys, self.warmup * self.window) - 1
            if self._quiet[keys] >= 0:
                continue
            found = check([_Series(self, key, [h[key] for h in history]) for key in keys])
            if found:
                self._quiet[keys] = 2 * self.window
                advice = "" if keys in self._advised else f". {_advice(row)}"
                self._advised.add(keys)
                alarms.append(f"{found} (means of {self.window} steps){advice}")
        return alarms

    def _kl_against_reward(self, series: Sequence[_Series]) -> str | None:
        kl, reward = series
        best = max(reward.starts(), key=reward.mean)
        rise = kl.now - kl.mean(best)
        fall = reward.mean(best) - reward.now
        if kl.grew(best, self.kl_growth, self.kl_rise) and fall >= max(
            self.reward_fall, reward.noise
        ):
            return (
                f"perception KL rose from {kl.mean(best):.3g} to {kl.now:.3g} (+{rise:.3g}) while "
                f"the reward fell from {reward.mean(best):.3f} to {reward.now:.3f}"
            )
        return None

    def _clipping(self, series: Sequence[_Series]) -> str | None:
        (clip,) = series
        lowest = min(clip.starts(), key=clip.mean)
        if clip.now >= self.clip_high_level and clip.grew(lowest, self.clip_high_growth, 0.0):
            return (
                "tokens clipped from above rose from "
                f"{clip.mean(lowest):.2%} to {clip.now:.2%} of all tokens"
            )
        return None

    def _entropies(self, series: Sequence[_Series]) -> str | None:
        lowest = [min(s.starts(), key=s.mean) for s in series]
        if all(
            s.grew(start, self.entropy_growth, self.entropy_rise)
            for s, start in zip(series, lowest, strict=True)
        ):
            real, aug = (
                f"{s.mean(start):.3g} to {s.now:.3g}"
                for s, start in zip(series, lowest, strict=True)
            )
            return f"both entropies rose: real image {real}, corrupted image {aug} nats"
        return None


@dataclass
class _Series:
    """The remembered values of one metric, the newest last."""

    monitor: CollapseMonitor
    name: str
    values: list[float]

    def starts(self) -> Iterable[int]:
        """Where windows start that do not overlap the newest one."""
        return range(len(self.values) - 2 * self.monitor.window + 1)

    def mean(self, start: int) -> float:
        return fmean(self.values[start : start + self.monitor.window])

    @property
    def now(self) -> float:
        return self.mean(len(self.values) - self.monitor.window)

    @property
    def noise(self) -> float:
        """What noise alone may change between two windows: `sigmas` standard errors."""
        pairs = zip(self.values, self.values[1:], strict=False)
        row_variance = fmean((b - a) ** 2 for a, b in pairs) / 2
        return self.monitor.sigmas * math.sqrt(2 * row_variance / self.monitor.window)

    def grew(self, start: int, factor: float, least: float) -> bool:
        """Whether the newest window is so much above the one at `start`."""
        before = self.mean(start)
        return self.now >= factor * before and self.now - before >= max(least, self.noise)


def _advice(row: Mapping[str, Any]) -> str:
    """What to try, from the ablation of PAPO's 3B model (arXiv 2507.06448, double entropy loss)."""
    coef = row.get("kl_prcp_coef")
    if coef == 0:
        return "The perception term is off: try a lower train.lr or a higher objective.kl_coef"
    now = "" if coef is None else f" (now {coef:g})"
    return (
        f"Try a lower objective.kl_prcp_coef{now}; the paper's 3B model is stable at 0.02 and "
        "collapses at 0.04. Or raise objective.entropy_coef and objective.aug_entropy_coef: 0.03 "
        "to 0.05 prevented it there, 0.01 did not"
    )
