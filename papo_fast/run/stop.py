"""What ends a run early: a signal."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from papo_fast.parallel import gather

_log = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was asked to stop, and what was under way when it was is done."""


class StopRequest:
    """Whether the process was asked to stop: by SIGTERM, as clusters send it before they kill, by
    SIGHUP, as a terminal sends it that is closed, or by Ctrl-C (SIGINT). A second Ctrl-C is a
    `KeyboardInterrupt` as ever.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupted = False

    def __call__(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if not self.requested:
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            _log.warning(
                "asked to stop (%s): finishing this step, then a checkpoint%s",
                signal.Signals(number).name,
                again,
            )
        self.requested = True

    def raise_if_requested(self) -> None:
        """`Stopped` on every rank where any of them was asked to; every rank calls this."""
        if any(gather(self.requested)):
            raise Stopped


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM, SIGHUP and SIGINT into a request that the loop honours; only in the main
    thread. A SIGHUP that is ignored, as under `nohup`, stays so.
    """
    request = StopRequest()
    before: dict[int, Any] = {}
    try:
        with suppress(ValueError):  # not the main thread: whoever runs us there handles signals
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    before[number] = signal.signal(number, request)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
