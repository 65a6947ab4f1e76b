"""Launch sizes of the Triton kernels, and operands as the kernels want them."""

import os
from dataclasses import dataclass

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Blocks:
    """Launch sizes: rows, words and features of a block, warps, and stages of the load pipeline."""

    n: int
    v: int
    d: int
    warps: int
    stages: int


# By bytes of an operand. float32 products run on plain units, and want smaller blocks.
BLOCKS = {2: Blocks(64, 128, 64, 8, 3), 4: Blocks(64, 64, 32, 8, 2)}
DZ = {2: Blocks(64, 64, 64, 8, 3), 4: Blocks(64, 32, 32, 8, 2)}
D_HIDDEN = {2: Blocks(64, 64, 128, 8, 3), 4: Blocks(64, 32, 64, 8, 2)}
D_WEIGHT = {2: Blocks(64, 64, 128, 8, 3), 4: Blocks(64, 32, 64, 8, 2)}
if INTERPRETED:
    BLOCKS = DZ = D_HIDDEN = D_WEIGHT = dict.fromkeys((2, 4), Blocks(64, 512, 32, 4, 1))
# Rows of a tile, which shares its choice of columns.
TILE = BLOCKS[2].n


class Operands:
    """Operands of one dtype, and what the kernels want to know about them."""

    def __init__(self, hidden, aug_hidden, weight, bias):
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        if aug_hidden is not None:
            dtype = torch.promote_types(dtype, aug_hidden.dtype)
        if dtype == torch.float64:
            raise ValueError("hidden, aug_hidden or weight is float64; backend='triton' has none")
        self.two = aug_hidden is not None
        self.x, self.w = hidden.to(dtype), weight.to(dtype)
        self.xa = aug_hidden.to(dtype) if self.two else self.x
        self.b = self.w if bias is None else bias.contiguous()
        self.has_bias = bias is not None
        self.dtype, self.size = dtype, dtype.itemsize
        self.upcast = INTERPRETED and self.size == 2
        # The interpreter truncates where it should round to 16 bits.
        self.stored = torch.float32 if self.upcast else dtype
        self.n, self.d, self.v = len(hidden), hidden.shape[1], len(weight)

    def strides(self):
        return (*self.x.stride(), *self.xa.stride(), *self.w.stride())


def kept_first(targets, ignore_index):
    """(N,) rows with the kept ones first, in order, and (1,) their count; without synchronising."""
    ignored = targets == ignore_index
    return ignored.to(torch.int8).argsort(stable=True), (~ignored).sum()[None]
