"""The model, and how processes share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Local checkpoint directory (or hub name) of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the forward pass. Weights and optimizer stay in float32, where an update of 1e-6 is
    not rounded away."""
    train_vision: bool = True
    """Train the vision tower; False freezes it."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass to save memory."""
    lora_rank: int = 0
    """Train adapters of this rank and freeze everything else (LoRA); 0 trains the weights. The
    reference policy is then the model without its adapters and takes no memory."""
    lora_alpha: float = 0.0
    """LoRA's scale is lora_alpha / lora_rank; 0: twice the rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the linear layers that get adapters, such as q_proj v_proj; empty: all of the
    decoder layers, and with train_vision of the vision blocks."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's kernels for RMSNorm and SwiGLU; auto: where there is a GPU and liger-kernel."""
    trust_remote_code: bool = False
    """Let transformers run code that ships with the checkpoint. Leave off unless you trust it."""


@dataclass(frozen=True)
class ParallelConfig:
    """How torchrun's processes share the model; a single process holds all of it."""

    replicas: int = 1
    """Groups of processes that each hold the whole model (HSDP); 1 shards over all of them."""
    offload: bool = False
    """Keep weights, gradients and optimizer in the CPU's memory, a layer at a time on the GPU."""
