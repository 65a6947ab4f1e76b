"""PAPO (Perception-Aware Policy Optimization) for vision-language models, exact and fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from papo_fast.config import Config

__version__ = "0.1.0"


def train(config: Config, *arguments: Any, **functions: Any) -> Path:
    """`papo_fast.launch.train`, which is imported when it is called: this package is light."""
    from papo_fast import launch

    return launch.train(config, *arguments, **functions)
