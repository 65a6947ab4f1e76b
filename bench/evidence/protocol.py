"""The protocol's numbers. They are fixed, and committed, before the first test seed runs.

What stands here decides what is compared; `docs/evidence.md` says it in words.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.evidence.arms import ARMS, PRESET, Arm, Setting
from papo_fast.run.hack_alarms import KL_BOUND

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "evidence"

TASKS = {
    "digits": (),
    # six cells, hint by kind, of 128 questions
    "digits-shortcut": ("--digits.task", "digits-shortcut", "--digits.test-questions", "768"),
}
WITHOUT_ENTROPY = ("digits-shortcut",)
"""Tasks on which the arms with double entropy do not run, because runs are dear."""
TUNED_ON = "digits"
"""Settings are chosen on this task alone; `digits-shortcut` takes what was chosen here."""
DEVELOPMENT_SEEDS = (10,)
"""With the handwriting of the split `dev`: no question and no picture of the test is seen."""
SWEEP_SEEDS = (10,)
"""The development seed, for γ beyond what may be chosen."""
TEST_SEEDS = tuple(range(100, 110))
"""Seeds that nobody has looked at. Ten, because four pairs from before (official against GRPO)
differ by 2.4 points with a standard deviation of 1.8: eight such pairs give a p of .007, which
fourteen arms multiply to .1, and ten give .002."""

STEPS = 200
"""Of every run, to 0 in its learning rate; the default job has 320 and is flat from 200 on
(docs/log.md). It is what makes as many runs affordable."""
LAST = 20
"""Steps that the final reward is the mean of; the warm start's is that of the first `FIRST`."""
FIRST = 5
KL_WINDOW = 10
"""Steps that the largest KL is a mean of."""
RESAMPLES = 10_000
HONEST = 0.03
"""A policy is as honest as GRPO where its honesty check is at most this far below."""
STAGES = ("development", "sweep", "test")


@dataclass(frozen=True)
class Cell:
    """One training run."""

    stage: str
    task: str
    arm: Arm
    setting: Setting
    seed: int

    @property
    def path(self) -> Path:
        """Its result, under `RESULTS`."""
        if self.stage == "test":
            return Path(self.task, self.arm.name, f"seed{self.seed}.json")
        place = Path("development", self.task, self.arm.name, self.setting.name)
        return place / f"seed{self.seed}.json"

    @property
    def words(self) -> tuple[str, ...]:
        """Preset and options of `papo-fast train`."""
        held_out = () if self.stage == "test" else ("--digits.held-out", "dev")
        seed = ("--seed", str(self.seed))
        steps = ("--train.steps", str(STEPS))
        options = (
            *seed,
            *steps,
            *TASKS[self.task],
            *held_out,
            *self.arm.words,
            *self.setting.words,
        )
        return (PRESET, *options)

    @property
    def command(self) -> str:
        return "papo-fast train " + shlex.join(self.words)

    def __str__(self) -> str:
        return f"{self.task} {self.arm.name} {self.setting.name} seed {self.seed}"


def cells(
    stage: str,
    tasks: tuple[str, ...],
    arms: tuple[str, ...],
    seeds: tuple[int, ...],
    chosen: dict[str, str],
) -> Iterator[Cell]:
    """The runs of one stage, seed by seed, so that all arms have the same seeds at any time.

    Args:
        tasks, arms, seeds: which of them; empty: all of this stage.
        chosen: each arm's setting, for the test; arms without one are left out.
    """
    known = {"development": DEVELOPMENT_SEEDS, "sweep": SWEEP_SEEDS, "test": TEST_SEEDS}[stage]
    if stage != "test":
        tasks = tuple(t for t in tasks or (TUNED_ON,) if t == TUNED_ON)
    for seed in seeds or known:
        for task in tasks or TASKS:
            for name in arms or ARMS:
                arm = ARMS[name]
                if name not in arms_of(task):
                    continue
                if stage == "test":
                    settings = (arm.setting(chosen[name]),) if name in chosen else ()
                else:
                    settings = arm.settings if stage == "development" else arm.beyond
                yield from (Cell(stage, task, arm, setting, seed) for setting in settings)


def arms_of(task: str) -> tuple[str, ...]:
    """Names of the arms that run on a task."""
    left_out = "-entropy" if task in WITHOUT_ENTROPY else None
    return tuple(name for name in ARMS if left_out is None or not name.endswith(left_out))


def seeds_outside(stage: str, seeds: tuple[int, ...]) -> list[int]:
    """Seeds that the protocol does not give to this stage."""
    known = TEST_SEEDS if stage == "test" else DEVELOPMENT_SEEDS
    return [seed for seed in seeds if seed not in known]


def collapse(rows: list[dict]) -> str | None:
    """Why a run counts as collapsed, from its rows of metrics, or None.

    Its final reward is below its warm start's, or its perception KL went beyond `KL_BOUND`.
    """
    rewards = [row["reward"] for row in rows]
    first, last = mean(rewards[:FIRST]), mean(rewards[-LAST:])
    if last < first:
        return f"final reward {last:.3f} below the warm start's {first:.3f}"
    largest = largest_kl(rows)
    if largest is not None and largest > KL_BOUND:
        return f"perception KL {largest:.2f} nats, beyond {KL_BOUND:g}"
    return None


def largest_kl(rows: list[dict]) -> float | None:
    """The largest mean of `KL_WINDOW` steps in a row; None without a perception KL."""
    values = [row["kl_prcp"] for row in rows if row.get("kl_prcp") is not None]
    starts = range(max(1, len(values) - KL_WINDOW + 1))
    return max(mean(values[i : i + KL_WINDOW]) for i in starts) if values else None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
