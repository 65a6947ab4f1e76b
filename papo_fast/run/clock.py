"""The time a run has taken, and the time that each phase of a step takes."""

from __future__ import annotations

import time


class Clock:
    """Starts when it is made. A continued run goes on from the seconds of the earlier one."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start of the run."""
        return time.perf_counter() - self._started

    def go_on_from(self, seconds: float) -> None:
        """Count `seconds` of an earlier process too."""
        self._started -= seconds

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before
