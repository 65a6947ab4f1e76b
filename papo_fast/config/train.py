"""Updates and evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps AdamW's moments in 8 bits, in blocks of 256 with a scale each, in place of
    32; needs bitsandbytes."""
    master_weights: bool = False
    """With bfloat16 weights: the optimizer has a float32 copy, which updates are made to."""
    fused: Literal["auto", "on", "off"] = "auto"
    """PyTorch's fused AdamW, without a temporary copy of all weights; auto: on GPUs."""
    lr: float = 1e-6
    """Learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """After the warm-up: constant (the paper), or falling linearly to 0 at the last update."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decay rates."""
    grad_clip: float = 1.0
    """Largest global gradient norm."""
    update_prompts: int = 128
    """Global batch of one update, in prompts; a rollout makes rollout.prompts / this updates."""
    max_tokens: int = 16_384
    """Tokens per forward and backward pass: prompts with their pictures, once for the responses
    they share, and responses, in both streams. A group that is larger is split."""
    epochs: int = 2
    """Passes over the training data."""
    steps: int = 0
    """Rollouts to train for; 0: what `epochs` gives."""
    checkpoint_every: int = 0
    """Steps between checkpoints, from which --resume continues, the first after step 1 and the last
    after the last step; 0: one only when something stops the run (SIGTERM, Ctrl-C, an error)."""
    keep_checkpoints: int = 2
    """Latest checkpoints that stay; the one with the best reward stays besides."""
    max_bad_updates: int = 3
    """Updates in a row with a gradient that is not finite (skipped, counted) that end the run."""


@dataclass(frozen=True)
class EvalConfig:
    samples: int = 8
    """k of mean@k: samples per question."""
    limit: int = 0
    """Questions per kind; 0: all."""
    temperature: float = 1.0
    """Sampling temperature of the evaluation."""
    corrupted: bool = True
    """Also evaluate with corrupted images: a model that looks must get worse."""
    examples: int = 12
    """Questions whose pictures and first responses are kept for the report."""
