"""Runs that are not done yet, one after another, in as many processes as there are jobs.

A worker walks through the plan and takes each run that has no result and that no other process
holds. Nothing else divides the work, so any number of workers may start at any time, and one that
is killed leaves its run to the next. A result is written at the end, in one step.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.evidence.protocol import ROOT, Cell
from papo_fast.errors import InputError
from papo_fast.run.folder import write_json

SCRATCH = Path("runs") / "evidence"
"""Warm starts, logs, locks: what may be deleted at the price of time."""


@dataclass(frozen=True)
class Plan:
    """What is asked for, and what cannot run."""

    cells: tuple[Cell, ...]
    impossible: tuple[str, ...]

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> Plan:
        reasons = {cell.arm.name: cell.arm.missing() for cell in cells}
        lines = tuple(f"skipped: arm {name}, {why}" for name, why in reasons.items() if why)
        return cls(tuple(c for c in cells if not reasons[c.arm.name]), lines)


def result_of(cell: Cell, results: Path) -> dict | None:
    """The result of a run, or None where there is none yet.

    Raises `InputError` where the file holds a run of other words: the arm has changed since.
    """
    path = results / cell.path
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found["words"] != list(cell.words):
        raise InputError(
            f"{path} is of `papo-fast train {' '.join(found['words'])}`, and the arm now says "
            f"`{cell.command}`: delete the file to run it again"
        )
    return found


def work(
    plan: Plan,
    results: Path,
    scratch: Path,
    train: Callable[[Cell], dict],
    say: Callable[[str], None],
    jobs: int = 1,
) -> int:
    """Run what is not done and not being run by others; returns how many runs failed.

    Args:
        train: one run; gives its record. An `InputError` fails that run and no other.
        jobs: processes at work on this plan, this one included, for the time that remains.
    """
    from bench.evidence.one_run import locked

    done_here, failed, spent = 0, 0, 0.0
    for cell in plan.cells:
        if result_of(cell, results) is not None:
            continue
        lock = scratch / "locks" / f"{'-'.join(cell.path.with_suffix('').parts)}.lock"
        with locked(lock, wait=False) as mine:
            if not mine or result_of(cell, results) is not None:
                continue
            path = results / cell.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".partial").unlink(missing_ok=True)
            say(f"started: {cell}")
            started = time.monotonic()
            try:
                record = train(cell)
            except InputError as error:
                failed += 1
                say(f"failed: {cell}: {error}")
                continue
            write_json(path, record)
            done_here, spent = done_here + 1, spent + time.monotonic() - started
        left = sum(result_of(c, results) is None for c in plan.cells) - failed
        remaining = max(0, left) * spent / done_here / jobs
        say(
            f"{len(plan.cells) - left}/{len(plan.cells)} {cell}: {summed_up(record)}; "
            f"{time.monotonic() - started:.0f} s, about {remaining / 60:.0f} min left"
        )
    return failed


def summed_up(record: dict) -> str:
    accuracy = record["summary"].get("accuracy_after", {})
    parts = [f"{kind} {100 * value:.1f} %" for kind, value in accuracy.items()]
    collapsed = f"COLLAPSED ({record['why']})" if record["collapsed"] else ""
    return ", ".join(filter(None, [*parts, collapsed]))


def work_in_processes(arguments: Sequence[str], jobs: int) -> int:
    """As many workers as jobs, each `python -m bench.evidence run` with these arguments."""
    command = [sys.executable, "-m", "bench.evidence", "run", *arguments, "--worker-of", str(jobs)]
    workers = [subprocess.Popen(command, cwd=ROOT) for _ in range(jobs)]
    try:
        return max(worker.wait() for worker in workers)
    except KeyboardInterrupt:
        return 130
    finally:
        for worker in workers:
            worker.terminate()
            worker.wait()
