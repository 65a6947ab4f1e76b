"""A model as a HuggingFace checkpoint: adapters merged, weights whole, in the dtype asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from papo_fast.model.four_bit import four_bit_layers
from papo_fast.model.lora import BASE, adapted_layers, is_adapter, merged, merged_weight
from papo_fast.parallel import whole


def write_checkpoint(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype,
    generation: GenerationConfig,
) -> None:
    """Write config, weights (safetensors) and sampling options under `path`.

    Args:
        state: the model's whole state dict, on the CPU.
        dtype: of the weights that are written.
        generation: the checkpoint's own sampling options, written as they came: transformers
            refuses to save some that published checkpoints carry.
    """
    path.mkdir(parents=True, exist_ok=True)
    four_bits = {f"{name}.weight": x.weight.cpu() for name, x in four_bit_layers(model).items()}
    weights = in_dtype(merged({**state, **four_bits}, model), dtype)
    model.save_pretrained(path, state_dict=weights)
    # transformers writes the dtype of what is in memory
    file = path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config = _with_dtype(config, str(dtype).removeprefix("torch."))
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    settings = generation.to_json_string(use_diff=True)
    (path / "generation_config.json").write_text(settings, encoding="utf-8")


def in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict in another dtype; tied weights stay one."""
    made: dict[int, Tensor] = {}
    return {
        name: made.setdefault(x.data_ptr(), x.to(dtype)) if x.is_floating_point() else x
        for name, x in state.items()
    }


def _with_dtype(config: Any, dtype: str) -> Any:
    """The same settings, those of the parts included, with this dtype where one stands."""
    if not isinstance(config, dict):
        return config
    return {k: dtype if k == "dtype" else _with_dtype(v, dtype) for k, v in config.items()}


def whole_shapes(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of `whole_weights`, in the same order, with nothing gathered."""
    published = _published(model)

    def known(name: str, *shape: int) -> tuple[str, tuple[int, ...]]:
        name, weight = published(name, torch.empty(shape, device="meta"))
        return name, tuple(weight.shape)

    for name, weight in model.named_parameters():
        if not is_adapter(name):
            yield known(name.replace(BASE, ""), *weight.shape)
    for name, four_bits in four_bit_layers(model).items():
        shape = (four_bits.out_features, four_bits.in_features)
        yield known(f"{name.removesuffix(BASE)}.weight", *shape)


def whole_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as in checkpoints, whole and in `dtype`, one at a time, for a sampler.

    Adapters are merged. Every rank of a sharded model takes part, from the first weight to the
    last.
    """

    def detached(weight: Tensor) -> Tensor:
        return whole(weight.detach())

    layers = adapted_layers(model)
    published = _published(model)
    for name, weight in model.named_parameters():
        layer = layers.get(name.partition(BASE)[0])
        if is_adapter(name):
            continue
        if layer is not None and name.endswith(f"{BASE}.weight"):
            weight = merged_weight(layer, weight, detached)
        else:
            weight = detached(weight.to(dtype))
        yield published(name.replace(BASE, ""), weight.to(dtype))
    for name, four_bits in four_bit_layers(model).items():
        layer = layers.get(name.removesuffix(BASE))
        weight = four_bits.weight
        if layer is not None:
            weight = merged_weight(layer, weight, detached)
        yield published(f"{name.removesuffix(BASE)}.weight", weight.to(dtype))


def _published(model: nn.Module) -> Callable[[str, Tensor], tuple[str, Tensor]]:
    """What turns a weight of `model` and its name into those of published checkpoints.

    Where transformers 5 has others, it changes them as it loads a file, and vLLM knows the file's.
    """

    def under(kind: str) -> tuple[str, ...]:
        def is_one(module: nn.Module) -> bool:  # FSDP derives a class of its own
            return any(base.__name__ == kind for base in type(module).__mro__)

        return tuple(f"{name}." for name, module in model.named_modules() if is_one(module))

    towers, experts = under("SiglipVisionModel"), under("Qwen3VLMoeTextExperts")

    def published(name: str, weight: Tensor) -> tuple[str, Tensor]:
        for tower in filter(name.startswith, towers):
            name = f"{tower}vision_model.{name.removeprefix(tower)}"
        if name.startswith(experts):
            weight = weight.transpose(1, 2).contiguous()
        return name, weight

    return published
