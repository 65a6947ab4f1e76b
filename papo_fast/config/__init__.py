"""Every knob of a run, as frozen dataclasses; `papo_fast.presets` fills them in.

The command line is generated from these classes, so a field's docstring is its help text. Some
fields of `ObjectiveConfig` are `None` by default and follow `parity`;
`papo_fast.config_checks.resolve` fills them in where a command starts, so that no other code meets
them. What several fields decide together stands here once, as a property. Equations and default
values: PAPO, arXiv 2507.06448, and docs/design.md.
"""

from __future__ import annotations

from papo_fast.config.data import DataConfig
from papo_fast.config.digits import DigitsConfig
from papo_fast.config.model import ModelConfig, ParallelConfig
from papo_fast.config.objective import AugRun, Average, Estimator, KLPenalty, ObjectiveConfig
from papo_fast.config.rollout import RolloutConfig
from papo_fast.config.run import Config, LogprobSource
from papo_fast.config.train import EvalConfig, TrainConfig
from papo_fast.corruption_settings import CorruptionConfig
from papo_fast.reward_settings import RewardConfig

__all__ = [
    "AugRun",
    "Average",
    "Config",
    "CorruptionConfig",
    "DataConfig",
    "DigitsConfig",
    "Estimator",
    "EvalConfig",
    "KLPenalty",
    "LogprobSource",
    "ModelConfig",
    "ObjectiveConfig",
    "ParallelConfig",
    "RewardConfig",
    "RolloutConfig",
    "TrainConfig",
]
