"""What `papo-fast plan` is asked. It loads no library, so that --help answers at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from papo_fast.config import Config
from papo_fast.errors import InputError
from papo_fast.setting_bounds import BOUNDS

VIRL39K = 38_870
"""Rows of the data set that the authors trained on."""
MFU = 0.35
"""Share of a GPU's dense bfloat16 rate that forward and backward passes are assumed to reach."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a typical prompt and response."""

    image: int = 640
    """Image tokens of a prompt; one is 28 x 28 pixels in Qwen2.5-VL, 32 x 32 in Qwen3-VL."""
    text: int = 120
    """Text tokens of a prompt."""
    response: int = 350
    """Tokens of a response."""

    @property
    def prompt(self) -> int:
        return self.image + self.text

    def tree(self, responses: float) -> float:
        """Tokens of a prompt and its responses in one stream."""
        return self.prompt + responses * self.response

    def check(self) -> None:
        """Raise `InputError` for a length that no prompt or response has."""
        most = BOUNDS["rollout.max_new_tokens"][1]
        for name, least in (("image", 0), ("text", 1), ("response", 1)):
            if not least <= getattr(self, name) <= most:
                raise InputError(
                    f"lengths.{name} is {getattr(self, name)}: it must be between {least} and "
                    f"{most}"
                )


@dataclass(frozen=True)
class PlanArguments:
    """Memory per GPU and time, before anything runs, from config.json alone."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    gpu: str = "h100"
    """GPU type: a100-40g, a100, h100, h200, b200, l40s, rtx4090 or mi300x."""
    gpu_memory: float = 0.0
    """GiB of a GPU of another type; 0: as `gpu` has."""
    gpu_tflops: float = 0.0
    """Its dense bfloat16 TFLOP/s; 0: as `gpu` has."""
    gpu_bandwidth: float = 0.0
    """Its memory's GB/s; 0: as `gpu` has."""
    gpus: int = 1
    """GPUs in all. Each has a process of its own, save those of a vLLM server."""
    rows: int = VIRL39K
    """Rows of the training data, for the time of the whole run; ViRL39K's by default."""
    mfu: float = MFU
    """Share of the GPU's dense bfloat16 rate that is assumed for the estimate of the time."""
    simulate: bool = False
    """Print instead the simulated time and MFU of a step on 1 to 64 GPUs, of `model.path` or of
    Qwen2.5-VL's 3B, 7B and 32B, beside published times."""
    lengths: Lengths = field(default_factory=Lengths)
