"""What a run writes down as it goes: metrics, alarms, checkpoints, the evaluation before.

Every rank keeps a journal, the main one writes. A run that was killed goes on from its journal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from papo_fast.config import Config
from papo_fast.consoles import say, warn
from papo_fast.parallel import is_main, wait_for_all
from papo_fast.run.alarms import CollapseMonitor, mismatch_alarm
from papo_fast.run.checkpoint import CheckpointStore, refuse_if_not_finite
from papo_fast.run.clock import Clock
from papo_fast.run.files import METRICS
from papo_fast.run.folder import write_json
from papo_fast.run.hack_alarms import HackMonitor, StandstillMonitor
from papo_fast.run.metrics import MetricsLog, Row, json_line, read_metrics
from papo_fast.run.resume import check_that_nothing_is_lost, rows_until
from papo_fast.run.step_lines import StepLines
from papo_fast.run.stop import StopRequest
from papo_fast.run.trackers import Tracking
from papo_fast.whole_files import written_whole

BEFORE = "before.json"


class Journal:
    """The record of one run.

    Attributes:
        done: steps that have ended.

    Args:
        clock: its seconds are kept in checkpoints.
        console: gets a line for each step, and warnings.
    """

    def __init__(self, config: Config, folder: Path, clock: Clock, console: Console):
        self.config = config
        self.folder = folder
        self.clock = clock
        self.console = console
        self.done = 0
        self._store = CheckpointStore(folder / "checkpoints", config.train.keep_checkpoints)
        kl_clip = config.objective.kl_prcp_clip
        self._monitors = (CollapseMonitor(), HackMonitor(kl_clip=kl_clip), StandstillMonitor())
        self._rewards: list[float] = []  # since the last checkpoint
        self._log: MetricsLog | None = None
        self._lines = StepLines()
        self._tracking: Tracking | None = None
        self._state: dict[str, Any] = {}
        self._weights_moved = False  # since the last step ended
        self._tried = 0  # the step whose checkpoint was written last, or failed
        self._stop: StopRequest | None = None

    def watch(self, optimizer: torch.optim.Optimizer, stop: StopRequest) -> None:
        """Know when weights change, see that they stay finite, and hear requests to stop."""
        self._stop = stop
        weights = [p for group in optimizer.param_groups for p in group["params"]]

        def before(*_: object) -> None:
            self._weights_moved = True

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(lambda *_: refuse_if_not_finite(weights))

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Go back to the last checkpoint; its state, or None where there is none."""
        saved = self._store.load(model, optimizer)
        self.done = saved["step"] if saved else 0
        path = self.folder / METRICS
        rows = read_metrics(path)[0] if path.is_file() else []
        if saved is None:
            again = check_that_nothing_is_lost(
                rows, self.config.train.checkpoint_every, self.folder
            )
            if again:
                warn(self.console, again)
            else:
                say(self.console, f"nothing to resume in {self.folder}: the run starts at step 1")
        else:
            checkpoint = self._store.folder / f"step-{self.done}"
            say(self.console, f"resuming {self.folder} after step {self.done}, from {checkpoint}")
        rows = rows_until(rows, self.done, path)
        wait_for_all()  # everybody has read the rows
        if is_main():  # steps after the checkpoint will be made again
            with written_whole(path) as partial:
                partial.write_text("".join(json_line(row) + "\n" for row in rows), encoding="utf-8")
        for row in rows:
            for monitor in self._monitors:
                monitor.update(row)
        if saved:
            self.clock.go_on_from(saved["seconds"])
        return saved

    def open(self, state: dict[str, Any]) -> None:
        """Begin to write; `state` is that of the step that was done last."""
        self._state = state
        if is_main():
            self._log = MetricsLog(self.folder / METRICS, resume=self.config.resume)
            self._tracking = Tracking(self.config.track, self.folder, asdict(self.config))

    def close(self) -> None:
        """Nothing more is written."""
        if self._tracking is not None:
            self._tracking.close()

    def alarms(self, row: Row, response: str = "") -> list[str]:
        """What a row, before it is entered, should warn the user of; `response` is one of it."""
        found = [alarm for monitor in self._monitors for alarm in monitor.update(row, response)]
        return [*found, *mismatch_alarm(row)]

    def enter(self, row: Row, state: dict[str, Any], steps: int) -> None:
        """A step has ended.

        Args:
            state: what a checkpoint of it keeps besides weights and optimizer; plain values.
            steps: of the whole run.
        """
        if self._log is not None:
            self._log.append(row)
        if self._tracking is not None:
            self._tracking.log(row)
        self._rewards.append(row["reward"])
        self.done, self._state, self._weights_moved = row["step"], state, False
        for line in self._lines.of(row, steps):
            say(self.console, line)
        for alarm in row["alarms"]:
            warn(self.console, alarm)

    def checkpoint(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the step that has just ended."""
        rewards, self._rewards = self._rewards, []
        self._tried = self.done
        if self._log is not None:
            self._log.sync()  # a checkpoint without its rows could not be resumed
        self._store.save(
            self.done,
            model,
            optimizer,
            {
                "step": self.done,
                "score": sum(rewards) / len(rewards),
                "seconds": self.clock.seconds,
                **self._state,
            },
        )

        if self._stop is not None:
            self._stop.raise_if_requested()

    def keep_last_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep the step that ended last, if it is not kept yet and the weights are still its own.

        Every rank calls this, or none.
        """
        saved = {saved.step for saved in self._store.saved()}
        if self.done not in (0, self._tried, *saved) and not self._weights_moved:
            self._stop = None
            self.checkpoint(model, optimizer)

    def evaluated_before(self, evaluate: Callable[[], dict]) -> dict:
        """Entries of the summary; kept in a file, since a resumed run has another model by now."""
        path = self.folder / BEFORE
        if self.done and path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        entries = evaluate()
        if is_main():
            write_json(path, entries)
        if self._stop is not None:
            self._stop.raise_if_requested()
        return entries
