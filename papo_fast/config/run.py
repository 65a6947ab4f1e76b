"""A whole run: its sections, and what several of them decide together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from papo_fast.config.data import DataConfig
from papo_fast.config.digits import DigitsConfig
from papo_fast.config.model import ModelConfig, ParallelConfig
from papo_fast.config.objective import ObjectiveConfig
from papo_fast.config.rollout import RolloutConfig
from papo_fast.config.train import EvalConfig, TrainConfig
from papo_fast.corruption_settings import CorruptionConfig
from papo_fast.reward_settings import RewardConfig

LogprobSource = Literal["sampler", "pass", "update"]


@dataclass(frozen=True)
class Config:
    preset: str = ""
    """Name of the preset this configuration started from."""
    name: str = ""
    """Name of the run; empty: the preset and the seed."""
    out: str = "runs"
    """Folder of all runs; this one writes to OUT/NAME."""
    seed: int = 0
    """Seed of everything random. The same seed gives the same metrics, bit for bit on the CPU."""
    device: str = "auto"
    """`auto`: cuda where there is one, else cpu."""
    threads: int = 0
    """CPU threads for torch; 0: leave as it is."""
    overwrite: bool = False
    """Replace the run of the same name if there is one."""
    resume: bool = False
    """Continue the run of the same name from its last checkpoint, or start it if it has none."""
    track: Literal["none", "auto", "wandb", "tensorboard", "trackio"] = "none"
    """Also log the metrics to a tracker that is installed; auto: the first of these three."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    digits: DigitsConfig = field(default_factory=DigitsConfig)

    @property
    def run_name(self) -> str:
        return self.name or f"{self.preset or 'run'}-seed{self.seed}"

    @property
    def updates_per_rollout(self) -> int:
        return self.rollout.prompts // self.train.update_prompts

    @property
    def old_logprobs_from(self) -> LogprobSource:
        """Whose log-probs the policy ratio is taken to.

        `sampler`: those that the sampler reported. `update`: where a rollout makes a single update,
        that update's own. `pass`: those of a pass of the trainer before the first update.
        """
        if self.rollout.old_logprobs == "sampler":
            return "sampler"
        return "update" if self.updates_per_rollout == 1 else "pass"

    @property
    def weighs_by_sampler(self) -> bool:
        """Whether the policy loss gets importance weights of the trainer over the sampler.

        It does not where old log-probs are the sampler's: the policy ratio then is that of the
        trainer over the sampler already. Nor with `hf`, whose sampler is the trainer's model, nor
        in the authors' objective.
        """
        rollout = self.rollout
        return (
            rollout.importance_cap > 0
            and rollout.engine != "hf"
            and rollout.old_logprobs == "recompute"
            and self.objective.parity != "official"
        )

    @property
    def corrects_for_sampler(self) -> bool:
        """Whether the policy loss knows that another policy may have sampled, by either way."""
        return self.weighs_by_sampler or self.old_logprobs_from == "sampler"
