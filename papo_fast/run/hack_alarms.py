"""Alarms of runs that look well: the perception KL is hacked, or there is nothing to learn from.

The signs of `papo_fast.run.alarms` are of a run that is falling. A policy that hacks the perception
KL can keep its reward: it learns to recognise a corrupted picture, and to say with certainty what
it would not say of a real one. The KL then grows and nothing is seen. A run whose groups are all of
one reward does not fall either: its advantages are zero.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

KL_BOUND = 5.0
"""Nats per token: with the corrupted picture a token that was sampled then has probability .007 on
average, the tokens that no picture decides included. Of the runs of the default job that still
answered from the text when they had to, the highest ended at 3.5."""


@dataclass
class HackMonitor:
    """Alarms for a perception KL that is earned by recognising corrupted pictures.

    Who cannot see is uncertain. A policy that looks is therefore *less* certain with a corrupted
    picture than with the real one, by more as it learns. The signs, taken from means of `window`
    rows and compared with the run's first `window` rows:

    - certain of something else: the entropy with the corrupted picture is below `entropy_share` of
      its start (or below `entropy_floor`), while the perception KL is `kl_growth` times its start
      and `kl_rise` nats above it;
    - beyond its bound: the perception KL is above `kl_bound` nats per token; or, where each token's
      is clipped, above `clip_share` of the clip, so that nearly every token has reached it, those
      that no picture decides included.

    Neither waits for the reward. A sign that was reported is quiet for `quiet` rows, and what to
    try is said once. Rows without a perception KL are passed over, and so is the first sign where
    an entropy is missing. Low entropies are what the double entropy loss asks for, so the first
    sign alone is no proof; the honesty check of the evaluation is (`papo_fast.evaluate`).
    """

    kl_clip: float | None = None
    """`objective.kl_prcp_clip`, to which the KL in the rows is cut."""
    window: int = 5
    """Rows per mean."""
    entropy_share: float = 0.1
    """Of the entropy with the corrupted picture at the start, below which it counts as near 0."""
    entropy_floor: float = 0.02
    """Nats below which that entropy counts as near 0 wherever it started."""
    kl_growth: float = 2.0
    """Factor by which the perception KL must have grown."""
    kl_rise: float = 0.5
    """Nats by which the perception KL must have grown."""
    kl_bound: float = KL_BOUND
    clip_share: float = 0.9
    """Of the clip; see above."""
    quiet: int = 40
    """Rows after an alarm in which its sign is not repeated."""
    _first: list[tuple[float, float]] = field(default_factory=list, init=False)
    _last: deque[tuple[float, float]] = field(init=False)
    _quiet: dict[str, int] = field(default_factory=dict, init=False)
    _advised: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._last = deque(maxlen=self.window)

    def update(self, row: Mapping[str, Any], response: str = "") -> list[str]:
        """Take one metrics row, in order of steps; the alarms it sets off, mostly none."""
        kl, entropy = row.get("kl_prcp"), row.get("aug_entropy")
        if not _is_number(kl):
            return []
        entropy = entropy if _is_number(entropy) else math.nan
        if len(self._first) < self.window:
            self._first.append((kl, entropy))
            return []
        self._last.append((kl, entropy))
        self._quiet = {sign: left - 1 for sign, left in self._quiet.items() if left > 1}
        if len(self._last) < self.window:
            return []
        start_kl, start_entropy = (fmean(values) for values in zip(*self._first, strict=True))
        kl, entropy = (fmean(values) for values in zip(*self._last, strict=True))
        found = {
            "certain": self._certain(start_kl, start_entropy, kl, entropy),
            "bound": self._beyond(kl),
        }
        alarms = []
        for sign, alarm in found.items():
            if alarm and sign not in self._quiet:
                self._quiet[sign] = self.quiet
                advice = "" if self._advised else f". {_advice(row)}"
                self._advised = True
                alarms.append(f"{alarm} (means of {self.window} steps){advice}")
        return alarms

    def _certain(
        self, start_kl: float, start_entropy: float, kl: float, entropy: float
    ) -> str | None:
        near_zero = max(self.entropy_floor, self.entropy_share * start_entropy)
        least_kl = max(self.kl_growth * start_kl, start_kl + self.kl_rise)
        if not (entropy <= near_zero and kl >= least_kl):  # NaN: no entropy is known
            return None
        return (
            "the policy has become certain of something else wherever the picture is corrupted: "
            f"the entropy there fell from {start_entropy:.3g} to {entropy:.3g} nats while the "
            f"perception KL rose from {start_kl:.3g} to {kl:.3g}. That is how a policy looks which "
            "recognises corrupted pictures instead of looking at real ones"
        )

    def _beyond(self, kl: float) -> str | None:
        if self.kl_clip is not None and kl > self.clip_share * self.kl_clip:
            return (
                f"the perception KL is {kl:.3g} nats per token, of at most {self.kl_clip:g} that "
                "objective.kl_prcp_clip leaves it: nearly every token has reached that bound, also "
                "those that no picture decides"
            )
        if kl > self.kl_bound:
            return (
                f"the perception KL is {kl:.3g} nats per token, more than {self.kl_bound:g}: that "
                "is more than the picture explains"
            )
        return None


@dataclass
class StandstillMonitor:
    """Alarms for a run that cannot learn, with one of its responses.

    After `patience` rows in a row without a group whose rewards differ, or with every response cut
    at the length limit. What was reported is quiet for `quiet` rows.
    """

    patience: int = 3
    quiet: int = 20
    _rows: dict[str, int] = field(default_factory=dict, init=False)
    """How long each sign has stood, less the rows in which it is quiet."""

    def update(self, row: Mapping[str, Any], response: str = "") -> list[str]:
        """Take one metrics row, in order of steps; the alarms it sets off, mostly none."""
        alarms = []
        for sign, stands in (
            ("equal", row.get("groups_differ") == 0),
            ("truncated", row.get("truncated") == 1),
        ):
            self._rows[sign] = self._rows.get(sign, 0) + 1 if stands else 0
            if self._rows[sign] == self.patience:
                self._rows[sign] = self.patience - self.quiet
                alarms.append(self._alarm(sign, row, response))
        return alarms

    def _alarm(self, sign: str, row: Mapping[str, Any], response: str) -> str:
        if sign == "truncated":
            found = (
                f"every response of the last {self.patience} steps was cut at the length limit: "
                "raise rollout.max_new_tokens, or see why the policy does not end"
            )
        else:
            found = (
                f"no group of the last {self.patience} steps had two different rewards (mean "
                f"reward {row.get('reward', math.nan):.3g}): every advantage is 0, so the run "
                "learns nothing from them. "
            ) + (
                "Every answer is right: these questions are solved"
                if row.get("accuracy") == 1
                else "The questions may be too hard, or the answers may not be found in the text"
            )
        return f"{found}. One response: {_shown(response)}" if response else found


def _advice(row: Mapping[str, Any]) -> str:
    coef = row.get("kl_prcp_coef")
    now = "" if coef is None else f" (now {coef:g})"
    return (
        f"Try a lower objective.kl_prcp_coef{now}, or no gradient into the corrupted stream; the "
        "honesty check after training says whether the policy still answers from the text"
    )


def _shown(response: str, width: int = 160) -> str:
    """`response` on one line, its middle left out where it is long."""
    if len(response) > width:
        response = f"{response[: width // 2]} … {response[-width // 2 :]}"
    return repr(response)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
