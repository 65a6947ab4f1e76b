"""One training run of the comparison, and the record that is kept of it.

It is the run that `papo-fast train` makes of the same words: same loop, same random numbers, same
figures. What differs is what is paid once instead of once per run: warm starts and evaluations
before training are shared by all arms of a seed, the interpreter and the processes that compare
answers by all runs of a worker, and no model, picture or example is written.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from bench.evidence.measures import Measures
from bench.evidence.protocol import FIRST, LAST, ROOT, Cell, collapse, largest_kl, mean
from papo_fast.config import Config, CorruptionConfig
from papo_fast.config_checks import resolve
from papo_fast.data.corruption import PromptCorruption
from papo_fast.data.prompts import Prompt
from papo_fast.digits.warmstart import cache_folder, prepare
from papo_fast.presets import PRESETS
from papo_fast.rewards.scorer import Scorer
from papo_fast.run.clock import Clock
from papo_fast.run.files import METRICS
from papo_fast.run.folder import git_commit, write_json
from papo_fast.run.metrics import Row, json_line, read_metrics
from papo_fast.run.progress import Progress
from papo_fast.run.stop import StopRequest
from papo_fast.trainer import Trainer

CURVES = ("reward", "kl_prcp", "kl_ref", "entropy", "aug_entropy", "response_length")
CURVE_STEPS = 10
"""Steps that a point of a curve is the mean of."""
MEASURED_WITH = CorruptionConfig()
"""The corruption of the honesty check and the ruler, whatever an arm trains with."""
CODE = ("papo_fast", "kernels", "bench/evidence")
"""What a result depends on."""


def configure(cell: Cell, scratch: Path) -> Config:
    """The resolved configuration that the command line makes of the cell's words.

    Args:
        scratch: where runs and warm starts are kept.
    """
    preset, *options = cell.words
    default = PRESETS[preset][1]
    config = tyro.cli(Config, args=options, default=default)
    config = dataclasses.replace(config, out=str(scratch / "runs"), overwrite=True)
    digits = dataclasses.replace(config.digits, cache=str(scratch / "digits"))
    return resolve(dataclasses.replace(config, digits=digits))


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`; yields False where another process has it and `wait` is False.

    The lock is the system's, so it ends with the process that holds it, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class EvidenceTrainer(Trainer):
    """The trainer, whose evaluation measures more and is made before training once per seed."""

    shared: Path
    """Where the evaluation before training is kept for the other arms."""
    measured: dict[str, dict]
    laps: dict[str, float]

    def evaluate(self, when: str) -> dict:
        started = time.perf_counter()
        found = self.evaluate_once() if when == "before" else Measures(self).take(when)
        self.measured[when] = found["measures"]
        self.laps[f"evaluation_{when}"] = time.perf_counter() - started
        return found["summary"]

    def evaluate_once(self) -> dict:
        """The evaluation before training: made by the first arm of a seed, read by the others."""
        with locked(self.shared.with_suffix(".lock")):
            if not self.shared.is_file():
                write_json(self.shared, Measures(self).take("before"))
            return json.loads(self.shared.read_text())

    def finish(self, before: dict) -> Path:
        self.load_sampler()
        # not called `summary.json`: a folder without a model is no finished run
        write_json(self.folder / "evidence.json", self.summary(before, self.evaluate("after")))
        return self.folder


def remember_prompts(trainer: Trainer, config: Config) -> None:
    """Encode a row of the training data once for all runs of this process on the same data."""
    data = trainer.train_data
    key = (config.data.train, repr(config.data), repr(config.corruption))
    if key not in _prompts:
        _prompts.clear()
    data._prompt = partial(_remembered, _prompts.setdefault(key, {}), data._prompt)


_prompts: dict[tuple, dict[int, Prompt]] = {}


def _remembered(known: dict[int, Prompt], make: Callable[[int], Prompt], index: int) -> Prompt:
    if index not in known:
        known[index] = make(index)
    return known[index]


def shared_file(config: Config, scratch: Path) -> Path:
    """The evaluation before training: of one warm start, by these settings of the evaluation."""
    settings = [config.eval, MEASURED_WITH, config.rollout.max_new_tokens, config.reward]
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    return scratch / "before" / f"{cache_folder(config).name}-{key}.json"


def train(cell: Cell, config: Config, scratch: Path, scorer: Scorer) -> dict:
    """Run it, and return its record."""
    started = time.perf_counter()
    torch.set_num_threads(config.threads or 1)
    progress, clock, laps = Progress(Console(quiet=True)), Clock(), {}
    with locked(scratch / "digits" / f"{cache_folder(config).name}.lock"):
        config = prepare(config, progress)
    laps["warm_start"] = time.perf_counter() - started
    scorer.timeouts = scorer.failures = 0
    scorer.alarms()
    folder = scratch / "runs" / cell.path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS).unlink(missing_ok=True)  # of a run that was killed
    trainer = EvidenceTrainer(config, folder, scorer, progress, clock)
    trainer.evaluator.corrupt = PromptCorruption(MEASURED_WITH, trainer.encoder)
    laps["loading"] = time.perf_counter() - started - laps["warm_start"]
    trainer.shared, trainer.measured, trainer.laps = shared_file(config, scratch), {}, laps
    remember_prompts(trainer, config)
    with closing(trainer.engine):
        trainer.run(StopRequest())
    rows, _ = read_metrics(folder / METRICS)
    summary = json.loads((folder / "evidence.json").read_text())
    for phase in ("rollout", "experience", "update"):
        laps[phase] = sum(row[f"{phase}_seconds"] for row in rows)
    laps["all"] = time.perf_counter() - started
    return record(cell, config, rows, summary, trainer.measured, laps)


def record(
    cell: Cell,
    config: Config,
    rows: list[Row],
    summary: Mapping[str, Any],
    measured: Mapping[str, dict],
    laps: Mapping[str, float],
) -> dict:
    """What is kept of a run: enough to make it again, and all that the report reads."""
    last = rows[-LAST:]
    why = collapse(rows)
    kept = {
        "stage": cell.stage,
        "task": cell.task,
        "arm": cell.arm.name,
        "setting": cell.setting.name,
        "seed": cell.seed,
        "words": list(cell.words),
        "command": cell.command,
        **code_version(),
        "machine": machine(),
        "summary": {k: v for k, v in summary.items() if k not in ("seconds", "git_commit")},
        "measures": dict(measured),
        "reward_first": mean([row["reward"] for row in rows[:FIRST]]),
        "reward_last": mean([row["reward"] for row in last]),
        "kl_prcp_largest": largest_kl(rows),
        **{f"{name}_last": _mean_of(last, name) for name in CURVES[1:]},
        "collapsed": why is not None,
        "why": why,
        "alarms": [[row["step"], alarm] for row in rows for alarm in row["alarms"]],
        "curves": {name: curve(rows, name) for name in CURVES},
        "seconds": {name: round(value, 1) for name, value in laps.items()},
        "config": settings_of(config),
    }
    return json.loads(json_line(kept))


def settings_of(config: Config) -> dict:
    """The configuration without what is a place on this machine."""
    settings = dataclasses.asdict(config)
    for section, name in (("model", "path"), ("data", "train"), ("data", "test")):
        del settings[section][name]
    del settings["digits"]["cache"], settings["out"], settings["overwrite"]
    return settings


def curve(rows: list[Row], name: str) -> list[float | None]:
    """Means of `CURVE_STEPS` steps in a row."""
    parts = [rows[i : i + CURVE_STEPS] for i in range(0, len(rows), CURVE_STEPS)]
    return [_mean_of(part, name) for part in parts]


def _mean_of(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return round(mean(values), 5) if values else None


def code_version() -> dict:
    """The commit, and whether what results depend on was changed since."""
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", *CODE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {"git_commit": git_commit(), "changed_since": bool(changed.stdout.strip())}


def machine() -> dict:
    """What a result may depend on beyond the code: kind of processor, torch, device."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
