"""Launch sizes of the Triton kernels, and operands as the kernels want them."""

import functools
import os
from dataclasses import dataclass

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# Rows of a tile, which shares its choice of columns; BLOCK_N of every kernel.
TILE = 64
# D from which on a weight counts as wide.
WIDE = 3072


@dataclass(frozen=True)
class Blocks:
    """Launch sizes: words and features of a block, warps, and stages of the load pipeline."""

    v: int
    d: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """Blocks of each kernel. A block of `d_weight` is one of `dz`: it has its `v`."""

    forward: Blocks
    dz: Blocks
    d_hidden: Blocks
    d_weight: Blocks


# By architecture, bytes of an operand and whether the weight is wide; "any" and None stand for what
# has no line of its own. `bench/gpu.sh` measures lines to paste here.
# float32 products run on plain units, and want smaller blocks.
LAUNCHES = {
    ("any", 2, None): Launch(
        Blocks(128, 64, 8, 3), Blocks(64, 64, 8, 3), Blocks(64, 128, 8, 3), Blocks(64, 128, 8, 3)
    ),
    ("any", 4, None): Launch(
        Blocks(64, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(32, 64, 8, 2), Blocks(32, 64, 8, 2)
    ),
}
if INTERPRETED:
    LAUNCHES = {("any", size, None): Launch(*[Blocks(512, 32, 4, 1)] * 4) for size in (2, 4)}


@functools.cache
def architecture(device):
    """As in LAUNCHES: "sm_90", "gfx942"; "any" for what is no GPU."""
    if device.type != "cuda":
        return "any"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def launch_of(device, size, d):
    """The line of LAUNCHES for operands of `size` bytes an element and `d` features."""
    for key in ((architecture(device), size, d >= WIDE), (architecture(device), size, None)):
        if key in LAUNCHES:
            return LAUNCHES[key]
    return LAUNCHES["any", size, None]


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
        self.launch = launch_of(hidden.device, self.size, self.d)

    def strides(self):
        return (*self.x.stride(), *self.xa.stride(), *self.w.stride())


def kept_first(targets, ignore_index):
    """(N,) rows with the kept ones first, in order, and (1,) their count; without synchronising."""
    ignored = targets == ignore_index
    return ignored.to(torch.int8).argsort(stable=True), (~ignored).sum()[None]
