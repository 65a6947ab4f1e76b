"""Numbers in 8 and in 4 bits, in blocks with a scale each, by bitsandbytes.

8 bits are for the optimizer's moments (Dettmers et al., arXiv 2110.02861), 4 for weights that do
not change (NF4: Dettmers et al., arXiv 2305.14314). Codes and scales are plain tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK_8, BLOCK_4 = 256, 64
"""Numbers that share a scale."""


def blocks_of(columns: int) -> int:
    """Blocks of 8-bit numbers in a row, which no block reaches beyond."""
    return -(-columns // BLOCK_8)


def code_8(signed: bool, device: torch.device) -> Tensor:
    """(256,) float32, the numbers in [-1, 1] or [0, 1] that codes stand for."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=signed).to(device)


def quantize_8(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (R, C) uint8 and scales (R, blocks) float32 of (R, C) float32 values."""
    from bitsandbytes.functional import quantize_blockwise

    rows, columns = values.shape
    filled = _filled(values, BLOCK_8)
    codes, state = quantize_blockwise(filled, code=code, blocksize=BLOCK_8)
    return codes.view(filled.shape)[:, :columns], state.absmax.view(rows, -1)


def dequantize_8(codes: Tensor, scales: Tensor, code: Tensor) -> Tensor:
    """(R, C) float32 values of codes and scales."""
    from bitsandbytes.functional import dequantize_blockwise

    filled = _filled(codes, BLOCK_8)
    values = dequantize_blockwise(
        filled, absmax=scales.reshape(-1).contiguous(), code=code, blocksize=BLOCK_8
    )
    return values.view(filled.shape)[:, : codes.shape[1]]


def quantize_4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two in a byte, and scales (blocks,) float32 of a weight of any shape."""
    from bitsandbytes.functional import quantize_4bit

    blocks = _filled(weight.flatten(), BLOCK_4).view(-1, BLOCK_4)
    codes, state = quantize_4bit(blocks, blocksize=BLOCK_4, quant_type="nf4")
    return codes[: -(-weight.numel() // 2)].contiguous(), state.absmax


def dequantize_4(
    codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight of this shape and dtype that `quantize_4` made codes and scales of."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    # A row is a block: of other rows bitsandbytes 0.50 makes wrong numbers on the CPU.
    state = QuantState(
        absmax=scales, shape=torch.Size((len(scales), BLOCK_4)), blocksize=BLOCK_4,
        quant_type="nf4", dtype=dtype,
    )  # fmt: skip
    found = dequantize_4bit(_filled(codes.flatten(), BLOCK_4 // 2).view(-1, 1), state)
    return found.flatten()[: math.prod(shape)].view(shape)


def _filled(x: Tensor, size: int) -> Tensor:
    """`x` with zeros behind its last dimension, up to a multiple of `size`; contiguous."""
    spare = -x.shape[-1] % size
    return torch.nn.functional.pad(x, (0, spare)) if spare else x.contiguous()


def bytes_4(numbers: int) -> int:
    """Bytes of so many numbers in 4 bits, scales included."""
    return -(-numbers // 2) + 4 * -(-numbers // BLOCK_4)
