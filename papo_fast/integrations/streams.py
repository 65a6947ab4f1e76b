"""Both streams of a padded batch through a HuggingFace model, to per-token statistics.

The hooks into other trainers share these functions. `papo_fast.model.policy` runs prompts and
pictures once per group; other trainers hand over whole sequences, one row each, and these functions
take those.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from papo_fast.errors import InputError
from papo_kernels import TokenStats, token_stats

IGNORED = -100
"""The label of a token without statistics: exact zeros, no gradient, no cost."""

_LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")

_STATS_METHOD = "papo_token_stats"
"""Name under which an output embedding that FSDP2 shards alone gets `_stats_of_head`."""


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
            `mm_token_type_ids`, …). With pictures a model of multimodal positions needs
            `mm_token_type_ids`, or `position_ids` of (3, B, S): time, height and width.
        labels: (B, S) int64, the token that follows each position, or -100.
        aug: the corrupted stream; None: the full stream only.
        temperature: divides the logits.
        grad_budget: see `papo_kernels.token_stats`.
        keep_dtype: multiply in the dtypes that hidden states and output embedding have, also under
            autocast.

    Returns:
        `TokenStats` of (B, S) float32 tensors, zero where the label is -100, and (B, S, D).

    Raises:
        InputError: the model or its output embedding cannot be used as it is, or
            `mm_token_type_ids` is missing.
    """
    check_model(model)
    if inputs.get("output_router_logits"):
        raise _router_loss(model)
    _check_positions(model, inputs)
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

    Where FSDP2 shards the output embedding as a unit of its own, this is a forward of that unit.

    Args:
        aug_constant: the corrupted stream is a constant in every gradient.

    Raises:
        InputError: labels have another shape, or the output embedding cannot be used as it is.
    """
    if labels.shape != hidden.shape[:-1]:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}: expected {tuple(hidden.shape[:-1])}, one "
            "for each hidden state"
        )
    head = _output_embedding(model)
    run = functools.partial(_stats_of_head, head)
    if isinstance(head, FSDPModule) and isinstance(head.weight, DTensor):
        # FSDP2 shards the head as a unit of its own and gathers it in the head's forward, which is
        # not called here: this call takes its place. FSDP2 then also reduces the gradient.
        if not hasattr(head, _STATS_METHOD):
            setattr(head, _STATS_METHOD, types.MethodType(_stats_of_head, head))
            register_fsdp_forward_method(head, _STATS_METHOD)
        run = getattr(head, _STATS_METHOD)
    stats = run(
        hidden.flatten(0, -2),
        None if aug_hidden is None else aug_hidden.flatten(0, -2),
        labels.to(hidden.device).flatten(),
        keep_dtype=keep_dtype,
        temperature=temperature,
        softcap=_softcap(model),
        ignore_index=IGNORED,
        grad_budget=grad_budget,
        aug_constant=aug_constant,
    )
    return TokenStats._make(None if x is None else x.view(labels.shape) for x in stats)


def check_model(model: PreTrainedModel) -> None:
    """Raise `InputError` for a model whose statistics or loss would not be its own here."""
    if hasattr(model, "get_base_model"):
        raise InputError(
            f"model is a {type(model).__name__}, peft's wrapper: pass model.get_base_model(), "
            "which holds the adapters too"
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise _router_loss(model)
    _softcap(model)


def _router_loss(model: PreTrainedModel) -> InputError:
    return InputError(
        f"{type(model).__name__} returns router logits for an auxiliary loss, which is not "
        "computed here: set output_router_logits=False in its text config"
    )


def whole(parameter: Tensor) -> Tensor:
    """The values of a parameter that is sharded over ranks, on every rank; others as they are.

    Its gradient is averaged over the ranks that hold shards, as FSDP2 averages gradients. (A bare
    `full_tensor()` takes each rank's gradient for the whole one: all but its own data are lost.)
    Ranks that see the same tokens (tensor parallel) have equal gradients, and so the same average.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _stats_of_head(
    head: nn.Linear,
    hidden: Tensor,
    aug_hidden: Tensor | None,
    targets: Tensor,
    *,
    keep_dtype: bool,
    **options: Any,
) -> TokenStats:
    """`token_stats` of (N, D) hidden states with the weights that `head` holds when it runs."""
    operands: dict[str, Any] = {
        "hidden": hidden,
        "weight": whole(head.weight),
        "bias": None if head.bias is None else whole(head.bias),
        "aug_hidden": aug_hidden,
    }
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and not keep_dtype:
        dtype = torch.get_autocast_dtype(device)
        operands = {k: None if x is None else x.to(dtype) for k, x in operands.items()}
    return token_stats(targets=targets, **operands, **options)


def _hidden_states(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def _check_positions(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Without token types some families place picture tokens like text, and say nothing."""
    if inputs.get("pixel_values") is None or inputs.get("mm_token_type_ids") is not None:
        return
    positions = inputs.get("position_ids")
    # time, height and width, and in transformers perhaps the text's positions before them
    if positions is not None and positions.ndim == 3 and len(positions) in (3, 4):
        return
    if "mm_token_type_ids" in inspect.signature(model.base_model.forward).parameters:
        raise InputError(
            "mm_token_type_ids is missing next to pixel_values: picture tokens would get the "
            "positions of text; pass the processor's, with zeros for the response"
        )


def _output_embedding(model: PreTrainedModel) -> nn.Linear:
    head: Any = model.get_output_embeddings()
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
    return head


def _softcap(model: PreTrainedModel) -> float | None:
    config = model.config.get_text_config()
    for name in _LOGIT_SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"{type(model).__name__} scales its logits ({name} = {getattr(config, name)}), "
                "which token_stats does not; scale hidden states and call token_stats yourself"
            )
    return getattr(config, "final_logit_softcapping", None)
