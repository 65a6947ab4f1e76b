"""The training loop, as a story: evaluate, then sample, score, update; evaluate, report.

What is left out here on purpose: sharding, other rollout engines and packing live behind
`Policy`, `RolloutEngine` and `papo_fast.model.packing`; nothing below needs to know of them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from papo_fast.config import Config
from papo_fast.data.corruption import PromptCorruption
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.prompts import PromptDataset, PromptStream
from papo_fast.errors import InputError
from papo_fast.evaluate import Evaluation, Evaluator
from papo_fast.experience import Collector, Experience, score_without_gradient
from papo_fast.model.policy import Policy
from papo_fast.parallel import (
    gather,
    is_main,
    main_first,
    pick_device,
    process_group,
    wait_for_all,
)
from papo_fast.report import print_summary, save_examples, write_report
from papo_fast.rewards.scorer import Scorer
from papo_fast.rollout.engines import make_engine
from papo_fast.rollout.protocol import RolloutError
from papo_fast.run.checkpoint import CheckpointStore, StopRequest, stop_on_sigterm
from papo_fast.run.files import METRICS
from papo_fast.run.folder import claim_run_dir, find_run_dir, git_commit, write_json
from papo_fast.run.metrics import (
    CollapseMonitor,
    MetricsLog,
    json_line,
    mismatch_alarm,
    read_metrics,
)
from papo_fast.run.progress import Progress
from papo_fast.update import Updater


def train(config: Config, console: Console) -> Path:
    """Run the whole job; returns the run's folder (metrics, report, summary, final model)."""
    config.validate()
    if config.threads:
        torch.set_num_threads(config.threads)
    with process_group(pick_device(config.device)):
        return _train(config, console if is_main() else Console(quiet=True))


def _train(config: Config, console: Console) -> Path:
    run_dir = None
    if is_main():
        run_dir = find_run_dir(config) if config.resume else claim_run_dir(config)
    run_dir = gather(run_dir)[0]
    # the clock starts before the warm start: `seconds` is what the user waited
    started = time.perf_counter()
    progress = Progress(console)
    if config.digits.enabled:
        from papo_fast.digits.warmstart import prepare

        with main_first():  # the others then find what it made
            config = prepare(config, progress)
    with Scorer(config.reward) as scorer:
        trainer = Trainer(config, run_dir, scorer, progress, started)
        # not before everything is loaded: a folder with a config counts as a run
        if is_main():
            write_json(run_dir / "config.json", asdict(config))
        with closing(trainer.engine), stop_on_sigterm() as stop:
            return trainer.run(stop)


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
        bans = self.encoder.banned_token_ids
        self.policy = Policy.load(config.model, bans, device, config.parallel)
        self.reference = self.policy.reference(config)
        self.steps = config.train.steps or self._steps_of_epochs()
        updates = self.steps * (config.rollout.prompts // config.train.update_prompts)
        self.updater = Updater(config, self.policy, self.reference, updates)
        self.engine = make_engine(config, self.policy, self.encoder, run_dir)
        self.corrupt = PromptCorruption(config.corruption, self.encoder)
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
        self.monitor = CollapseMonitor()
        self.store = CheckpointStore(run_dir / "checkpoints", config.train.keep_checkpoints)
        self.rewards_since: list[float] = []
        self.done = self._restore() if config.resume else 0
        self.metrics = MetricsLog(run_dir / METRICS, resume=config.resume) if is_main() else None
        self.updates_sampled: int | None = None  # whose weights the engine has
        self.progress_made = self._progress_made()

    def run(self, stop: StopRequest) -> Path:
        try:
            return self._run(stop)
        except InputError as error:
            # nothing of the failed step has happened yet: keep what came before it
            before_it = isinstance(error, RolloutError) or self.stream.broken
            unsaved = self.done not in (saved.step for saved in self.store.saved())
            if before_it and self.done and unsaved:
                self._checkpoint(self.done)
            raise

    def _run(self, stop: StopRequest) -> Path:
        self._sync_engine()
        before = self._evaluate_before()
        steps, every = self.steps, self.config.train.checkpoint_every
        with self.progress.task("training", total=steps) as advance:
            advance(self.done)
            for step in range(self.done + 1, steps + 1):
                row = self.step(step)
                if self.metrics is not None:
                    self.metrics.append(row)
                self.rewards_since.append(row["reward"])
                self.done, self.progress_made = step, self._progress_made()
                self.console.print(step_line(row, steps), soft_wrap=True)
                for alarm in row["alarms"]:
                    self.console.print(f"[yellow]warning:[/yellow] {alarm}", soft_wrap=True)
                stopping = any(gather(stop.requested))
                if stopping or (every and step % every == 0):
                    self._checkpoint(step)
                advance(1)
                if stopping:
                    self.console.print(
                        f"stopped after step {step}; the same command with --resume goes on"
                    )
                    return self.run_dir
        self._save(self.run_dir / "model")
        self._sync_engine()
        after = self.evaluator.run("evaluating after")
        corrupted = None
        if self.config.eval.corrupted and after is not None:
            corrupted = self.evaluator.run("with corrupted images", corrupted=True)
        return self._finish(steps, before, after, corrupted)

    def _evaluate_before(self) -> dict:
        """Entries of the summary; kept in a file, since a resumed run has another model by now."""
        path = self.run_dir / "before.json"
        if self.done and path.is_file():
            return json.loads(path.read_text())
        before = self.evaluator.run("evaluating before")
        summary = {} if before is None else before.summary("before")
        if not is_main():
            return summary
        if before is not None:
            save_examples(self.run_dir, self.evaluator.examples("before", before))
        write_json(path, summary)
        return summary

    def _checkpoint(self, step: int) -> None:
        rewards = self.rewards_since
        self.store.save(
            step,
            self.policy,
            self.updater.optimizer,
            {
                "step": step,
                "score": sum(rewards) / len(rewards),
                "seconds": time.perf_counter() - self.started,
                **self.progress_made,
            },
        )
        self.rewards_since = []

    def _progress_made(self) -> dict:
        """What a checkpoint of the step that has just ended keeps besides weights and optimizer."""
        return {
            "updater": self.updater.counters(),
            "stream": self.stream.state_dict(),
            "bad_rows": dict(self.train_data.bad_rows),
            **self._reward_counts(),
            "rng": torch.get_rng_state(),
        }

    def _restore(self) -> int:
        """Continue from the last checkpoint; the number of steps done."""
        saved = self.store.load(self.policy, self.updater.optimizer)
        path = self.run_dir / METRICS
        rows = read_metrics(path)[0] if path.is_file() else []
        done = saved["step"] if saved else 0
        wait_for_all()  # everybody has read the rows
        if is_main():  # steps after the checkpoint will be made again
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json_line(row) + "\n" for row in rows[:done]))
            partial.replace(path)
        if saved:
            self.updater.restore(saved["updater"])
            self.stream.load_state_dict(saved["stream"])
            self.train_data.bad_rows.update(saved["bad_rows"])
            if is_main():  # they are added up over ranks
                self.scorer.timeouts = saved["reward_timeouts"]
                self.scorer.failures = saved.get("reward_failures", 0)
            self.started -= saved["seconds"]
            torch.set_rng_state(saved["rng"])
        for row in rows[:done]:
            self.monitor.update(row)
        return done

    def step(self, step: int) -> dict:
        """One rollout and its updates; returns the metrics row."""
        config, times = self.config, {}
        clock = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            times[f"{name}_seconds"] = now - clock
            clock = now

        self._sync_engine()
        lap("sync")
        prompts = config.rollout.prompts
        with self.progress.task("rollout", total=prompts, transient=True) as advance:
            self.engine.progress = advance
            experience = self.collector.collect(self.stream, step)
            self.engine.progress = None
        self.engine.sleep()
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

    def _sync_engine(self) -> None:
        """Sample with the weights as they are; at once before, so that a failure loses no step."""
        if self.updates_sampled != self.updater.updates:
            self.engine.load_weights(self.policy)
            self.updates_sampled = self.updater.updates

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
            **self._reward_counts(),
            "skipped_samples": self.train_data.skipped.total(),
            "bad_updates": self.updater.bad_updates,
        }
        row["alarms"] = [*self.monitor.update(row), *mismatch_alarm(row)]
        if self.scorer.last_failure:
            row["alarms"].append(f"an answer could not be compared: {self.scorer.last_failure}")
            self.scorer.last_failure = ""
        return row

    def _reward_counts(self) -> dict[str, int]:
        """Answers of all ranks that could not be compared, since the start of the run."""
        counts = gather((self.scorer.timeouts, self.scorer.failures))
        timeouts, failures = (sum(x) for x in zip(*counts, strict=True))
        return {"reward_timeouts": timeouts, "reward_failures": failures}

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
        partial = path.with_name(path.name + ".partial")
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        self.policy.save(partial)
        if is_main():
            self.encoder.save_pretrained(partial)
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)

    def _finish(
        self,
        steps: int,
        before: dict,
        after: Evaluation | None,
        corrupted: Evaluation | None,
    ) -> Path:
        reward_counts = self._reward_counts()
        if not is_main():
            return self.run_dir
        config = self.config
        summary = {
            "preset": config.preset,
            "seed": config.seed,
            "git_commit": git_commit(),
            "steps": steps,
            "seconds": round(time.perf_counter() - self.started, 1),
            "samples_per_question": config.eval.samples,
            "bad_updates": self.updater.bad_updates,
            **reward_counts,
        }
        summary |= before
        if after is not None:
            summary |= after.summary("after")
        if corrupted is not None:
            summary["accuracy_after_corrupted"] = corrupted.accuracy
        write_json(self.run_dir / "summary.json", summary)
        examples = [] if after is None else self.evaluator.examples("after", after)
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
    phases = ("sync", "rollout", "experience", "update")
    seconds = sum(row.get(f"{phase}_seconds", 0) for phase in phases)
    return "  ".join([*parts, f"{seconds:.1f} s"])
