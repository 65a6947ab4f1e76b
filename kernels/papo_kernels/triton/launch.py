"""Launch sizes of the Triton kernels, and operands as the kernels want them."""

import functools
import os
from dataclasses import dataclass

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Rows of a tile, which share their choice of words; BLOCK_N of every kernel.
TILE = 64
# A weight of at least so many features counts as wide.
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


# The key is the architecture, the bytes of an operand's element, and whether the weight is wide;
# "any" and None stand for what has no line of its own. `bench/gpu.sh` measures lines to paste here.
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
    """A device's name in LAUNCHES: "sm_90", "gfx942", and "any" for what is no GPU."""
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


@dataclass(frozen=True)
class KernelOperands:
    """The operands of a call in one dtype, and what the kernels want to know about them.

    Without a second stream or a bias another tensor stands in, which no kernel then reads.
    """

    full: torch.Tensor  # (N, D)
    aug: torch.Tensor  # (N, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor  # (V,)
    two: bool
    has_bias: bool
    launch: Launch

    @property
    def n(self):
        return self.full.shape[0]

    @property
    def d(self):
        return self.full.shape[1]

    @property
    def v(self):
        return self.weight.shape[0]

    @property
    def upcast(self):
        """Whether kernels upcast: the interpreter's arithmetic in 16 bits is wrong."""
        return INTERPRETED and self.full.dtype.itemsize == 2

    @property
    def stored(self):
        """Dtype of gradients of logits: the interpreter truncates where it should round."""
        return torch.float32 if self.upcast else self.full.dtype

    def strides(self):
        return (*self.full.stride(), *self.aug.stride(), *self.weight.stride())


def kernel_operands(call):
    """Operands of a `rows.Call`, promoted to their widest dtype."""
    dtype = torch.promote_types(call.hidden.dtype, call.weight.dtype)
    if call.aug_hidden is not None:
        dtype = torch.promote_types(dtype, call.aug_hidden.dtype)
    if dtype == torch.float64:
        raise ValueError("hidden, aug_hidden or weight is float64; backend='triton' has none")
    full, weight = call.hidden.to(dtype), call.weight.to(dtype)
    return KernelOperands(
        full,
        full if call.aug_hidden is None else call.aug_hidden.to(dtype),
        weight,
        weight if call.bias is None else call.bias.contiguous(),
        call.aug_hidden is not None,
        call.bias is not None,
        launch_of(call.hidden.device, dtype.itemsize, call.hidden.shape[1]),
    )
