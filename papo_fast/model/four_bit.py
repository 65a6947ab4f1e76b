"""Linear layers whose frozen weights are kept in 4 bits (QLoRA), arXiv 2305.14314.

Codes and scales are buffers, which every process holds whole; each pass makes the weight of them
anew, in the backward pass too, and drops it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from papo_fast.blockwise import BLOCK_4, dequantize_4, quantize_4


class FourBitLinear(nn.Linear):
    """A frozen linear layer with its weight in NF4.

    Args:
        layer: whose weight it takes; an empty (meta) one gives an empty one.
        dtype: in which products are computed.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = dtype
        weight = layer.weight.detach()
        if weight.is_meta:
            numbers = weight.numel()
            codes = weight.new_empty(-(-numbers // 2), 1, dtype=torch.uint8)
            scales = weight.new_empty(-(-numbers // BLOCK_4), dtype=torch.float32)
        else:
            codes, scales = quantize_4(weight)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = None if layer.bias is None else layer.bias.requires_grad_(False)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The (out, in) weight."""
        shape = (self.out_features, self.in_features)
        return dequantize_4(self.codes, self.scales, shape, dtype)

    @property
    def weight(self) -> Tensor:
        """In float32, for whoever merges adapters or asks for its place."""
        return self.dequantized(torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        product = _Product.apply(input.to(self.dtype), self)
        return product if self.bias is None else product + self.bias.to(self.dtype)


class _Product(torch.autograd.Function):
    """x W^T with a W that is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantized(layer.dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantized(ctx.layer.dtype), None


def quantize_linears(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Put `FourBitLinear` in the place of the decoder's and the vision blocks' linear layers.

    Args:
        model: with adapters, whose own layers stay as they are.
        device: where a weight is while it is quantised, and its codes stay.
    """
    for part in (model.model.language_model.layers, model.model.visual.blocks):
        found = [
            (name, layer)
            for name, layer in part.named_modules()
            if type(layer) is nn.Linear and ".lora_" not in name
        ]
        for name, layer in found:
            parent, _, leaf = name.rpartition(".")
            there = layer if layer.weight.is_meta else layer.to(device)
            setattr(part.get_submodule(parent), leaf, FourBitLinear(there, dtype))


def four_bit_layers(model: nn.Module) -> dict[str, FourBitLinear]:
    """The layers in 4 bits by their names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FourBitLinear)}
