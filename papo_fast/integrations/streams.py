"""Both streams of a padded batch through a HuggingFace model, to per-token statistics.

The hooks into other trainers share these functions. `papo_fast.model.policy` runs prompts and
pictures once per group; other trainers hand over whole sequences, one row each, and these functions
take those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from papo_fast.errors import InputError
from papo_kernels import TokenStats, token_stats

IGNORED = -100
"""The label of a token without statistics: exact zeros, no gradient, no cost."""

_LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


@dataclass(frozen=True)
class AugStream:
    """The same tokens given corrupted pictures."""

    pixel_values: Tensor | None
    """Of the shape of the full stream's; None for a batch without pictures, whose streams are
    equal."""
    gradient: bool = True
    """Let the gradient flow into this stream; False: it is a constant in every gradient, as in the
    authors' code."""


def two_streams(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    *,
    aug: AugStream | None = None,
    temperature: float = 1.0,
    grad_budget: float = 3e-3,
    keep_dtype: bool = False,
) -> tuple[TokenStats, Tensor]:
    """Statistics of the tokens `labels`, and the last hidden states of the full stream.

    To be called inside the model's own `forward`, so that DDP, FSDP and hooks see one forward pass.
    Each stream is a call of `model.base_model`. Dropout would make the streams differ by more than
    the picture: turn it off.

    Args:
        model: `...ForConditionalGeneration` or `...ForCausalLM` of transformers, not its wrapper.
        inputs: keyword arguments of its backbone (`input_ids`, `attention_mask`, `pixel_values`,
            `mm_token_type_ids`, …).
        labels: (B, S) int64, the token that follows each position, or -100.
        aug: the corrupted stream; None: the full stream only.
        temperature: divides the logits.
        grad_budget: see `papo_kernels.token_stats`.
        keep_dtype: multiply in the dtypes that hidden states and output embedding have, also under
            autocast.

    Returns:
        `TokenStats` of (B, S) float32 tensors, zero where the label is -100, and (B, S, D).

    Raises:
        InputError: the model's output embedding cannot be used as it is.
    """
    hidden = _hidden_states(model, inputs)
    aug_hidden = None
    if aug is not None and aug.pixel_values is None:
        aug_hidden = hidden if aug.gradient else hidden.detach()
    elif aug is not None:
        with torch.set_grad_enabled(aug.gradient and torch.is_grad_enabled()):
            aug_hidden = _hidden_states(model, {**inputs, "pixel_values": aug.pixel_values})
    return stats_of(
        model,
        hidden,
        labels,
        aug_hidden=aug_hidden,
        aug_constant=aug is not None and not aug.gradient,
        temperature=temperature,
        grad_budget=grad_budget,
        keep_dtype=keep_dtype,
    ), hidden


def stats_of(
    model: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    *,
    aug_hidden: Tensor | None = None,
    aug_constant: bool = False,
    temperature: float = 1.0,
    grad_budget: float = 3e-3,
    keep_dtype: bool = False,
) -> TokenStats:
    """As `two_streams`, from the (B, S, D) hidden states of one or both streams.

    Args:
        aug_constant: the corrupted stream is a constant in every gradient.
    """
    weight, bias = _output_embedding(model)
    operands: dict[str, Any] = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "aug_hidden": aug_hidden,
    }
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and not keep_dtype:
        dtype = torch.get_autocast_dtype(device)
        operands = {k: None if x is None else x.to(dtype) for k, x in operands.items()}
    flat = {
        k: x.flatten(0, -2) if k in ("hidden", "aug_hidden") and x is not None else x
        for k, x in operands.items()
    }
    stats = token_stats(
        targets=labels.to(hidden.device).flatten(),
        temperature=temperature,
        softcap=_softcap(model),
        ignore_index=IGNORED,
        grad_budget=grad_budget,
        aug_constant=aug_constant,
        **flat,
    )
    return TokenStats._make(None if x is None else x.view(labels.shape) for x in stats)


def _hidden_states(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def _output_embedding(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    head = model.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise InputError(
            "lm_head carries an adapter: statistics come from its weight, so the adapter would "
            "never be trained; remove 'lm_head' from target_modules"
        )
    if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.numel() == 0:
        raise InputError(
            "lm_head.weight is not whole here (DeepSpeed ZeRO-3 and FSDP outside the root's "
            "forward leave it empty); use FSDP2 or ZeRO-2, and call from the model's own forward"
        )
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in (head.weight, head.bias)]
    return whole[0], whole[1]


def _softcap(model: PreTrainedModel) -> float | None:
    config = model.config.get_text_config()
    for name in _LOGIT_SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"{type(model).__name__} scales its logits ({name} = {getattr(config, name)}), "
                "which token_stats does not; scale hidden states and call token_stats yourself"
            )
    return getattr(config, "final_logit_softcapping", None)
