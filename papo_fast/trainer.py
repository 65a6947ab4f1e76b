"""The training loop, as a story: evaluate, then sample, score, update; evaluate, report.

What is left out here on purpose: sharding, other rollout engines and packing live behind
`Policy`, `RolloutEngine` and `papo_fast.packing`; nothing below needs to know of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from papo_fast.config import Config
from papo_fast.corruption import PromptCorruptor
from papo_fast.data import PromptDataset, PromptStream
from papo_fast.device import pick_device
from papo_fast.errors import InputError
from papo_fast.evaluate import Evaluation, Evaluator
from papo_fast.experience import Collector, Experience, score_without_gradient
from papo_fast.metrics import CollapseMonitor, MetricsLog
from papo_fast.policy import Policy
from papo_fast.processing import PromptEncoder
from papo_fast.progress import Progress
from papo_fast.report import print_summary, save_examples, write_report
from papo_fast.report.run_files import is_run
from papo_fast.rewards import Scorer
from papo_fast.rollout.hf import HFRollout
from papo_fast.update import Updater


def train(config: Config, console: Console) -> Path:
    """Run the whole job; returns the run's folder (metrics, report, summary, final model)."""
    config.validate()
    run_dir = claim_run_dir(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    # the clock starts before the warm start: `seconds` is what the user waited
    started = time.perf_counter()
    progress = Progress(console)
    if config.digits.enabled:
        from papo_fast.digits.warmstart import prepare

        config = prepare(config, progress)
    with Scorer(config.reward) as scorer:
        trainer = Trainer(config, run_dir, scorer, progress, started)
        # not before everything is loaded: a folder with a config counts as a run
        write_json(run_dir / "config.json", asdict(config))
        return trainer.run()


class Trainer:
    def __init__(
        self, config: Config, run_dir: Path, scorer: Scorer, progress: Progress, started: float
    ):
        self.config = config
        self.run_dir = run_dir
        self.scorer = scorer
        self.progress = progress
        self.console = progress.console
        self.started = started
        torch.manual_seed(config.seed)
        device = pick_device(config.device)
        self.encoder = PromptEncoder(
            config.model.path, config.data, trust_remote_code=config.model.trust_remote_code
        )
        self.train_data = PromptDataset(config.data.train, config.data, self.encoder)
        self.policy = Policy.load(config.model, self.encoder.banned_token_ids, device)
        reference = self.policy.frozen_copy() if config.objective.needs_reference else None
        self.reference = reference
        self.steps = config.train.steps or self._steps_of_epochs()
        updates = self.steps * (config.rollout.prompts // config.train.update_prompts)
        self.updater = Updater(config, self.policy, reference, updates)
        self.engine = HFRollout(
            self.policy,
            self.encoder.eos_token_ids,
            self.encoder.pad_token_id,
            config.rollout.batch_size,
        )
        self.corrupt = PromptCorruptor(config.mask, self.encoder)
        rollout = config.rollout
        self.stream = PromptStream(
            self.train_data,
            rollout.filter_prompts if rollout.dynamic_filter else rollout.prompts,
            seed=config.seed,
            shuffle=config.data.shuffle,
            option="rollout.filter_prompts" if rollout.dynamic_filter else "rollout.prompts",
        )
        self.collector = Collector(config, self.engine, self.encoder, scorer, self.corrupt)
        self.evaluator = Evaluator(
            config, self.engine, self.encoder, scorer, self.corrupt, progress
        )
        self.metrics = MetricsLog(run_dir / "metrics.jsonl")
        self.monitor = CollapseMonitor()

    def run(self) -> Path:
        before = self.evaluator.run("evaluating before")
        steps = self.steps
        with self.progress.task("training", total=steps) as advance:
            for step in range(1, steps + 1):
                row = self.step(step)
                self.metrics.append(row)
                self.console.print(step_line(row, steps), soft_wrap=True)
                for alarm in row["alarms"]:
                    self.console.print(f"[yellow]warning:[/yellow] {alarm}", soft_wrap=True)
                every = self.config.train.checkpoint_every
                if every and step % every == 0 and step < steps:
                    self._save(self.run_dir / "checkpoints" / f"step-{step}")
                advance(1)
        self._save(self.run_dir / "model")
        after = self.evaluator.run("evaluating after")
        corrupted = None
        if self.config.eval.corrupted and after is not None:
            corrupted = self.evaluator.run("with corrupted images", corrupted=True)
        return self._finish(steps, before, after, corrupted)

    def step(self, step: int) -> dict:
        """One rollout and its updates; returns the metrics row."""
        config, times = self.config, {}
        clock = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            times[f"{name}_seconds"] = now - clock
            clock = now

        prompts = config.rollout.prompts
        with self.progress.task("rollout", total=prompts, transient=True) as advance:
            self.engine.progress = advance
            experience = self.collector.collect(self.stream, step)
            self.engine.progress = None
        lap("rollout")
        per_update = config.train.update_prompts * config.rollout.group_size
        slices = [
            range(i, min(i + per_update, len(experience)))
            for i in range(0, len(experience), per_update)
        ]
        score_without_gradient(
            experience,
            self.policy,
            self.reference,
            config,
            on_policy=len(slices) == 1,
        )
        lap("experience")
        updates = []
        with self.progress.task("update", total=len(experience), transient=True) as advance:
            for sequences in slices:
                updates.append(self.updater.update(experience, sequences, advance))
        lap("update")
        return self._row(experience, updates, step, times)

    def _row(
        self, experience: Experience, updates: list[dict], step: int, times: dict[str, float]
    ) -> dict:
        values = defaultdict(list)
        for update in updates:
            for name, value in update.items():
                values[name].append(value)
        row = {
            "step": step,
            "seconds": time.perf_counter() - self.started,
            **times,
            **experience.metrics,
            **{name: sum(v) / len(v) for name, v in values.items()},
            "reward_timeouts": self.scorer.timeouts,
            "skipped_samples": self.train_data.skipped.total(),
            "bad_updates": self.updater.bad_updates,
        }
        row["alarms"] = self.monitor.update(row)
        return row

    def _steps_of_epochs(self) -> int:
        steps = self.config.train.epochs * len(self.train_data) // self.config.rollout.prompts
        if steps < 1:
            raise InputError(
                f"data.train has {len(self.train_data)} rows, fewer in {self.config.train.epochs} "
                f"epoch(s) than rollout.prompts = {self.config.rollout.prompts}: lower it, or set "
                "train.steps"
            )
        return steps

    def _save(self, path: Path) -> None:
        self.policy.save(path)
        self.encoder.save_pretrained(path)

    def _finish(
        self,
        steps: int,
        before: Evaluation | None,
        after: Evaluation | None,
        corrupted: Evaluation | None,
    ) -> Path:
        config = self.config
        summary = {
            "preset": config.preset,
            "seed": config.seed,
            "git_commit": git_commit(),
            "steps": steps,
            "seconds": round(time.perf_counter() - self.started, 1),
            "samples_per_question": config.eval.samples,
            "bad_updates": self.updater.bad_updates,
            "reward_timeouts": self.scorer.timeouts,
        }
        for when, result in (("before", before), ("after", after)):
            if result is not None:
                summary |= result.summary(when)
        if corrupted is not None:
            summary["accuracy_after_corrupted"] = corrupted.accuracy
        write_json(self.run_dir / "summary.json", summary)
        examples: list[dict] = []
        for when, result in (("before", before), ("after", after)):
            if result is not None:
                examples += self.evaluator.examples(when, result)
        save_examples(self.run_dir, examples)
        picture = write_report(self.run_dir)
        print_summary(summary, self.console)
        self.console.print(f"picture: {picture}\nmodel:   {self.run_dir / 'model'}", soft_wrap=True)
        return self.run_dir


def step_line(row: dict, steps: int) -> str:
    """One line of a step's metrics."""
    parts = [f"step {row['step']:>3}/{steps}"]
    for name, label, form in (
        ("reward", "reward", ".3f"),
        ("accuracy", "acc", ".3f"),
        ("kl_prcp", "KL_prcp", ".3f"),
        ("kl_ref", "KL_ref", ".4f"),
        ("entropy", "H", ".3f"),
        ("aug_entropy", "H_aug", ".3f"),
        ("clip_fraction_high", "clip", ".3f"),
        ("grad_norm", "grad", ".2f"),
        ("response_length", "len", ".1f"),
    ):
        if row.get(name) is not None:
            parts.append(f"{label} {row[name]:{form}}")
    seconds = sum(row.get(f"{k}_seconds", 0) for k in ("rollout", "experience", "update"))
    return "  ".join([*parts, f"{seconds:.1f} s"])


def claim_run_dir(config: Config) -> Path:
    """The run's folder, made now.

    A run that was given a name is never replaced without `overwrite`; one that was not takes the
    next free name (`tiny-seed0`, `tiny-seed0-2`, ...), so that a command can simply be repeated.
    """
    path = Path(config.out) / config.run_name
    if config.overwrite and path.exists():
        if any(path.iterdir()) and not is_run(path):
            raise InputError(f"{path} is not a run (no config.json): it will not be replaced")
        shutil.rmtree(path)
    taken = 1
    while path.exists() and any(path.iterdir()):
        if config.name:
            raise InputError(
                f"{path} already holds a run: choose another --name, or pass --overwrite to "
                "replace it"
            )
        taken += 1
        path = Path(config.out) / f"{config.run_name}-{taken}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_json(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def git_commit() -> str | None:
    """Commit of the source tree, or None for an installed package."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None
