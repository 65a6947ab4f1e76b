"""One line for each step, in columns of at most 99 characters, with a header from time to time."""

from __future__ import annotations

from collections import deque

from papo_fast.run.metrics import Row

HEADER_EVERY = 20
"""Lines from one header to the next."""
_OVER = 10
"""Steps that the time left is guessed from."""
_PHASES = ("sync", "rollout", "experience", "update")
# metric, heading, width, decimals
_COLUMNS = (
    ("reward", "reward", 6, 3),
    ("accuracy", "acc", 5, 3),
    ("groups_kept", "kept", 4, 2),
    ("kl_prcp", "KL_prcp", 7, 3),
    ("kl_ref", "KL_ref", 6, 4),
    ("entropy", "H", 5, 3),
    ("aug_entropy", "H_aug", 5, 3),
    ("clip_fraction_high", "clip", 5, 3),
    ("grad_norm", "grad", 5, 2),
    ("response_length", "length", 6, 1),
    ("truncated", "trunc", 5, 2),
)


class StepLines:
    """The lines of one process of a run."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_OVER)
        self._since_header = HEADER_EVERY

    def of(self, row: Row, steps: int) -> list[str]:
        """The line of a step's metrics, with the header above it where one is due."""
        self._seconds.append(sum(row.get(f"{phase}_seconds", 0) for phase in _PHASES))
        left = sum(self._seconds) / len(self._seconds) * (steps - row["step"])
        count = f"{row['step']}/{steps}"
        width = max(9, 2 * len(str(steps)) + 1)
        cells = [f"{count:>{width}}"]
        cells += [_number(row.get(name), wide, digits) for name, _, wide, digits in _COLUMNS]
        cells += [_number(self._seconds[-1], 6, 1), f"{time_left(left):>6}"]
        lines = [" ".join(cells)]
        if self._since_header >= HEADER_EVERY:
            heads = [f"{'step':>{width}}"]
            heads += [f"{head:>{wide}}" for _, head, wide, _ in _COLUMNS]
            lines.insert(0, " ".join([*heads, f"{'s':>6}", f"{'left':>6}"]))
            self._since_header = 0
        self._since_header += 1
        return lines


def _number(value: float | None, width: int, decimals: int) -> str:
    """As many of the decimals as fit."""
    if value is None:
        return f"{'–':>{width}}"
    for digits in range(decimals, -1, -1):
        text = f"{value:.{digits}f}"
        if len(text) <= width:
            return f"{text:>{width}}"
    return f"{value:>{width}.0e}"


def time_left(seconds: float) -> str:
    """At most six characters: `45s`, `12m`, `3h05m`, `2d04h`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f}s"
    if minutes < 100:
        return f"{minutes}m"
    hours = round(seconds / 3600)
    if minutes < 48 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    return f"{hours // 24}d{hours % 24:02}h"
