"""The training loop: sample, score, compare, look again with corrupted pictures, update.

Plain GRPO samples G responses to each prompt, scores them, gives each an advantage over its group,
and raises the log-probs of the good ones by a clipped policy ratio, with a KL to a reference. This
loop does the same, and differs in three places. `Collector` also makes a corrupted copy of each
prompt's pictures. `Updater` runs the policy with the real and with the corrupted pictures, in one
pass over groups that share their prompt. `objective` adds the KL between the two, which is raised,
and both entropies, which are lowered. With γ = η₁ = η₂ = 0 it is GRPO.

Sharding, engines and packing live behind `Policy`, `Sampler` and `papo_fast.model`; what a run
writes down lives in `papo_fast.run`. Nothing below needs to know of them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from papo_fast.config import Config
from papo_fast.config_checks import steps_of_epochs
from papo_fast.consoles import say, warn
from papo_fast.data.prompts import PromptDataset, PromptStream
from papo_fast.data.views import CorruptedViews
from papo_fast.evaluate import Evaluator, held_out
from papo_fast.experience import Collector, add_logprobs
from papo_fast.model.choice import load_encoder, load_policy
from papo_fast.parallel import gather, is_main, pick_device
from papo_fast.report import print_summary, save_examples, write_report
from papo_fast.rewards.scorer import Scorer
from papo_fast.rollout.engines import make_engine
from papo_fast.rollout.sampler import Sampler
from papo_fast.rollouts import OverlappedRollouts, Rollouts
from papo_fast.run.checkpoint import export_model
from papo_fast.run.clock import Clock
from papo_fast.run.files import SUMMARY
from papo_fast.run.folder import describe, write_json
from papo_fast.run.journal import Journal
from papo_fast.run.metrics import Row, mean_rows
from papo_fast.run.progress import Progress
from papo_fast.run.stop import StopRequest
from papo_fast.update import Updater


class Trainer:
    """One run: the loop comes first, and what it is made of after it."""

    def run(self, stop: StopRequest) -> Path:
        """The whole job; returns the run's folder."""
        self.load_sampler()
        before = self.journal.evaluated_before(lambda: self.evaluate("before"))
        with self.progress.task("training", total=self.steps) as advance:
            advance(self.journal.done)
            for step in range(self.journal.done + 1, self.steps + 1):
                self.journal.enter(self.step(step), self.state(), self.steps)
                stopping = any(gather(stop.requested))
                if stopping or self.checkpoint_is_due(step):
                    self.journal.checkpoint(self.policy, self.updater.optimizer)
                advance(1)
                if stopping:
                    self.say(f"stopped after step {step}; the same command with --resume goes on")
                    return self.folder
        return self.finish(before)

    def step(self, step: int) -> Row:
        """One rollout and its updates; returns its metrics."""
        rollout, clock, seconds = self.config.rollout, self.clock, {}
        clock.lap()
        self.rollouts.settle()
        waited = clock.lap()
        self.load_sampler()
        seconds["sync_seconds"] = clock.lap()
        with self.progress.task("rollout", total=rollout.prompts, transient=True) as advance:
            groups, sampled = self.rollouts.take(step, advance)
        self.engine.sleep()
        seconds["rollout_seconds"] = waited + clock.lap()
        scored = add_logprobs(groups, self.policy, self.reference, self.config)
        scored |= self.updater.weigher.measure(groups, self.policy)
        seconds["experience_seconds"] = clock.lap()
        size, updates = self.config.train.update_prompts, []
        total = len(groups) * rollout.group_size
        with self.progress.task("update", total=total, transient=True) as advance:
            for first in range(0, len(groups), size):
                batch = groups[first : first + size]
                updates.append(self.updater.update(batch, advance, first=first == 0))
        seconds["update_seconds"] = clock.lap()
        row = {
            "step": step,
            "seconds": clock.seconds,
            **seconds,
            **sampled,
            **scored,
            **mean_rows(updates),
            **self.reward_counts(),
            "skipped_samples": self.train_data.skipped.total(),
            "bad_updates": self.updater.bad_updates,
        }
        example = groups[0].samples[0].text
        row["alarms"] = [*self.journal.alarms(row, example), *self.scorer.alarms()]
        return row

    def __init__(
        self, config: Config, folder: Path, scorer: Scorer, progress: Progress, clock: Clock
    ):
        self.config, self.folder, self.scorer = config, folder, scorer
        self.progress, self.clock = progress, clock
        torch.manual_seed(config.seed)
        device, data = pick_device(config.device), config.data
        encoder = load_encoder(config.model, data)
        self.encoder = encoder
        self.views = CorruptedViews(config.corruption, encoder)
        self.train_data = PromptDataset(data.train, data, encoder, check=self.views.check_row)
        self.views.check(self.train_data.columns)
        questions = held_out(config, encoder, self.views.first)
        self.policy = load_policy(config, encoder, device)
        self.reference = self.policy.reference(config)
        self.steps = config.train.steps or steps_of_epochs(config, len(self.train_data))
        total_updates = self.steps * config.updates_per_rollout
        self.updater = Updater(config, self.policy, self.reference, total_updates)
        self.engine = make_engine(config, self.policy, encoder, folder)
        self.stream = PromptStream.of(config, self.train_data)
        sampler = Sampler(self.engine, encoder, scorer)
        collector = Collector(config, sampler, self.views, self.steps)
        kind = OverlappedRollouts if config.rollout.overlap else Rollouts
        self.rollouts = kind(collector, self.stream, self.steps)
        self.evaluator = Evaluator(config, sampler, self.views.first, questions, progress)
        self.journal = Journal(config, folder, clock, progress.console)
        self.updates_sampled: int | None = None  # whose weights the engine has
        if config.resume:
            saved = self.journal.restore(self.policy, self.updater.optimizer)
            if saved is not None:
                self.load_state(saved)
        self.journal.open(self.state())

    def say(self, line: str) -> None:
        say(self.progress.console, line)

    def checkpoint_is_due(self, step: int) -> bool:
        every = self.config.train.checkpoint_every
        # the first one at once: without any, --resume would have nothing to go on from; the last
        # one too: a run that is killed in the evaluation after would have to train again
        return every > 0 and (step in (1, self.steps) or step % every == 0)

    def load_sampler(self) -> None:
        """Sample with the weights as they are; before a step, so that a failure loses none."""
        if self.updates_sampled != self.updater.updates:
            self.engine.load_weights(self.policy)
            self.updates_sampled = self.updater.updates

    def state(self) -> dict:
        """What a checkpoint of the step that has just ended keeps besides weights and optimizer."""
        return {
            "updater": self.updater.counters(),
            "stream": self.rollouts.position(),
            "bad_rows": dict(self.train_data.bad_rows),
            **self.reward_counts(),
            "rng": torch.get_rng_state(),
        }

    def load_state(self, saved: dict) -> None:
        self.updater.restore(saved["updater"])
        self.stream.load_state_dict(saved["stream"])
        self.train_data.bad_rows.update(saved["bad_rows"])
        if is_main():  # they are added up over ranks
            self.scorer.timeouts = saved["reward_timeouts"]
            self.scorer.failures = saved["reward_failures"]
        torch.set_rng_state(saved["rng"])

    def reward_counts(self) -> dict[str, int]:
        """Answers of all ranks that could not be compared, since the start of the run."""
        counts = gather((self.scorer.timeouts, self.scorer.failures))
        timeouts, failures = (sum(x) for x in zip(*counts, strict=True))
        return {"reward_timeouts": timeouts, "reward_failures": failures}

    def evaluate(self, when: str) -> dict:
        """Entries of the summary, from real and from corrupted pictures; examples are saved."""
        result = self.evaluator.run(f"evaluating {when}")
        if result is None:
            return {}
        if is_main():
            save_examples(self.folder, self.evaluator.examples(when, result))
        entries = result.summary(when)
        if self.config.eval.corrupted:
            corrupted = self.evaluator.run("with corrupted images", corrupted=True)
            entries |= corrupted.corrupted_summary(when)
        for alarm in self.scorer.alarms():
            warn(self.progress.console, alarm)
        return entries

    def summary(self, before: dict, after: dict) -> dict:
        """What summary.json holds."""
        counts = self.reward_counts()
        facts = describe(self.config, self.steps, self.clock, self.updater.bad_updates)
        return facts | counts | before | after

    def finish(self, before: dict) -> Path:
        """Save the model, evaluate it, and report."""
        model = self.folder / "model"
        export_model(self.policy, self.encoder, model, getattr(torch, self.config.model.save_dtype))
        self.load_sampler()
        summary = self.summary(before, self.evaluate("after"))
        if not is_main():
            return self.folder
        write_json(self.folder / SUMMARY, summary)
        picture = write_report(self.folder)
        print_summary(summary, self.progress.console)
        self.say(f"picture: {picture}\nmodel:   {model}")
        return self.folder
