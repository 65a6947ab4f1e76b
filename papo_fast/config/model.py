"""The model, and how processes share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """Local checkpoint directory (or hub name) of an image-text-to-text model (docs/models.md)."""
    dtype: Dtype = "bfloat16"
    """Dtype of the forward pass. Weights and optimizer stay in float32, where an update of 1e-6 is
    not rounded away, unless weights_dtype says otherwise."""
    weights_dtype: Dtype = "float32"
    """Dtype in which trained weights are kept. In bfloat16, updates are rounded up or down at
    random, so that they are right on average, or made to a float32 copy (train.master_weights).
    bfloat16 is for a single process."""
    reference_dtype: Dtype = "float32"
    """Dtype in which the reference model's weights are kept; in bfloat16 it also computes so."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: under LoRA, linear layers of decoder and vision blocks are frozen in 4 bits (QLoRA);
    needs bitsandbytes. They are computed in `dtype`."""
    save_dtype: Dtype = "float32"
    """Dtype of the weights in the saved model."""
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
    forward: Literal["auto", "fast", "plain"] = "auto"
    """`fast`: a group's prompt runs once, for the families that allow it; `plain`: each response is
    a padded sequence of its own, for any family; auto: fast where it is possible."""
    trust_remote_code: bool = False
    """Let transformers run code that ships with the checkpoint. Leave off unless you trust it."""


@dataclass(frozen=True)
class ParallelConfig:
    """How torchrun's processes share the model, and what lies in the CPU's memory instead."""

    replicas: int = 1
    """Groups of processes that each hold the whole model (HSDP); 1 shards over all of them."""
    offload: bool = False
    """Keep weights, gradients and optimizer in the CPU's memory, a layer at a time on the GPU."""
    offload_optimizer: bool = False
    """Keep the optimizer's state alone in the CPU's memory, a piece at a time on the GPU; for a
    single process."""
    offload_activations: bool = False
    """Keep what gradient checkpointing stores of each layer in the CPU's memory."""
