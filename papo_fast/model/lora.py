"""Low-rank adapters in place of weights, through peft, and the model beneath them as a reference.

Everything but the adapters is frozen. Their second factor starts at zero, so the policy starts as
the model it was loaded from; with the adapters passed over it is that model again, which makes a
reference policy that takes no memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from papo_fast.config import ModelConfig
from papo_fast.errors import InputError

ADAPTER = "default"
BASE = ".base_layer"


def add_adapters(model: nn.Module, config: ModelConfig) -> None:
    """Freeze `model` and give its linear layers adapters, in place.

    Every rank draws the same values, on an empty (meta) model none; the global random numbers are
    left as they were.

    Raises `InputError` where `lora_targets` names no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = _targets(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        inject_adapter_in_model(
            LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha or 2 * config.lora_rank,
                target_modules=names,
                lora_dropout=0.0,
                bias="none",
            ),
            model,
            adapter_name=ADAPTER,
        )


def freeze_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights in the dtype that they are computed with; adapters stay float32.

    No update of theirs can be rounded away, so half of their memory is free.
    """
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)


def _targets(model: nn.Module, config: ModelConfig) -> list[str]:
    """Full names of the linear layers that get adapters."""
    parts = [model.get_decoder().layers]
    if config.train_vision:
        tower = model.get_encoder("image")
        parts.append(getattr(tower, "blocks", tower))
    inside = {id(m) for part in parts for m in part.modules()}
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]
    known = {name.rpartition(".")[2] for name in found}
    if unknown := sorted(set(config.lora_targets) - known):
        raise InputError(
            f"model.lora_targets names {', '.join(unknown)}: the layers that can have adapters are "
            + ", ".join(sorted(known))
        )
    wanted = set(config.lora_targets) or known
    return [name for name in found if name.rpartition(".")[2] in wanted]


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with adapters by their names; none where there are no adapters."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model as it was before it had adapters."""
    layers = adapted_layers(model).values()
    # not peft's own switch: it also turns requires_grad off and on, and a parameter that FSDP
    # gathers for the first time while it is off never gets a gradient
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return f".{ADAPTER}." in name


def merged_weight(
    layer: nn.Module, weight: Tensor, whole: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """W + scale B A of an adapted layer, in float32.

    Args:
        whole: makes whole tensors of the layer's parameters.
    """
    a, b = (whole(getattr(layer, f"lora_{x}")[ADAPTER].weight).detach() for x in "AB")
    return _merge(layer, whole(weight), a, b)


def _merge(layer: nn.Module, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return weight.float() + layer.scaling[ADAPTER] * (b.float() @ a.float())


def merged(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A whole state dict of `model` as that of a model without adapters, in float32.

    Names become those of the checkpoint that was loaded. Without adapters nothing changes.
    """
    state = dict(state)
    if layers := adapted_layers(model):
        wide: dict[int, Tensor] = {}  # tied weights stay one
        for name, value in state.items():
            if value.data_ptr() not in wide:
                wide[value.data_ptr()] = value.float()
            state[name] = wide[value.data_ptr()]
    for name, layer in layers.items():
        a, b = (state.pop(f"{name}.lora_{x}.{ADAPTER}.weight") for x in "AB")
        key = f"{name}{BASE}.weight"
        state[key] = _merge(layer, state[key], a, b)
    return {name.replace(BASE, ""): value for name, value in state.items()}
