"""When a step's responses are sampled: before its update, or while the one before it trains.

Sampled ahead, they come from the weights before the update that runs meanwhile: one step off the
policy. The policy loss is corrected by truncated importance weights, or its ratio is taken to the
sampler's own log-probs; `config_checks` asks for one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from papo_fast.data.prompts import PromptStream
from papo_fast.experience import Collector
from papo_fast.parallel import Collectives
from papo_fast.samples import Group

Batch = tuple[list[Group], dict[str, float]]


@dataclass
class Rollouts:
    """One rollout after the other, each when it is asked for.

    Args:
        collector: what samples and scores.
        stream: where its prompts come from.
        last: the last step of the run.
    """

    collector: Collector
    stream: PromptStream
    last: int

    def settle(self) -> None:
        """Return when nothing is being sampled, so that the engine may take new weights."""

    def take(self, step: int, advance: Callable[[int], None]) -> Batch:
        """The groups of `step` and their metrics (see `Collector.collect`)."""
        return self.collector.collect(self.stream, step, advance)

    def position(self) -> dict[str, Any]:
        """Where in the stream a resumed run goes on after the step that has ended."""
        return self.stream.state_dict()


@dataclass
class _Ahead:
    """A rollout in a thread, and what came of it."""

    position: dict[str, Any]
    """The stream's, before it gave this rollout its prompts."""
    thread: threading.Thread | None = None
    batch: Batch | None = None
    error: BaseException | None = None


@dataclass
class OverlappedRollouts(Rollouts):
    """The next rollout is begun when one is taken, with the weights that the engine then has.

    Every rank has one. What the ranks tell each other from its thread goes through a process group
    of its own, since messages of the update are on their way at the same time.
    """

    _ahead: _Ahead | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._collectives = Collectives()

    def settle(self) -> None:
        """Wait for the rollout that was begun, and raise what ended it, if anything did."""
        ahead = self._ahead
        if ahead is None:
            return
        ahead.thread.join()
        if ahead.error is not None:
            raise ahead.error

    def take(self, step: int, advance: Callable[[int], None]) -> Batch:
        """See `Rollouts.take`; begins the rollout of the next step."""
        self.settle()
        ahead, self._ahead = self._ahead, None
        # the first one of a process has nothing to be begun beside
        batch = super().take(step, advance) if ahead is None else ahead.batch
        if step < self.last:
            self._begin(step + 1)
        return batch

    def position(self) -> dict[str, Any]:
        """See `Rollouts.position`. The prompts of a rollout under way come again."""
        return super().position() if self._ahead is None else self._ahead.position

    def _begin(self, step: int) -> None:
        ahead = self._ahead = _Ahead(self.stream.state_dict())
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def collect() -> None:
            if device is not None:
                torch.cuda.set_device(device)  # each thread has its own
            try:
                with self._collectives.of_this_thread():
                    ahead.batch = self.collector.collect(self.stream, step, lambda n: None)
            except BaseException as error:  # `settle` raises it in the main thread
                ahead.error = error

        # a daemon: a run that ends by an error waits for no rollout that it will not use
        ahead.thread = threading.Thread(target=collect, name=f"rollout {step}", daemon=True)
        ahead.thread.start()
