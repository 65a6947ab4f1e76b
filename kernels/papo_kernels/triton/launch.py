"""Launch sizes of the Triton kernels, operands as they want them, and the products beside them."""

import functools
import logging
import os
from dataclasses import dataclass

import torch
import triton

log = logging.getLogger("papo_kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Rows of a tile, which share their levels.
TILE = 32
# Products are fast where all sizes and strides are multiples of this.
EVEN = 64


# What each kernel goes by; `bench/gpu.sh` tries others.
LAUNCHES = {
    "stats": dict(BLOCK_N=1, STEPS=1, LANES=512, num_warps=16),
    "sort": dict(BLOCK_N=32, num_warps=4),
    "levels": dict(BLOCK_V=64, num_warps=4),
    "dz": dict(BLOCK_N=1, BLOCK_V=1024, num_warps=8),
    "dz_listed": dict(BLOCK_N=1, BLOCK_V=512, num_warps=4),
    "list": dict(BLOCK=2048, BLOCK_V=1024, num_warps=8),
    "drop": dict(BLOCK_N=1, BLOCK=512, num_warps=4),
    "flatten": dict(BLOCK=512, num_warps=4),
    "tally": dict(BLOCK=512, num_warps=4),
    "spread": dict(BLOCK=512, num_warps=4),
    # Blocks of features that a warp loads in whole vectors, so that no sum crosses threads.
    "d_hidden": dict(BLOCK_K=4, BLOCK_D=1024, num_warps=4),
    "d_weight": dict(BLOCK_K=4, BLOCK_D=1024, num_warps=4),
    "combine": dict(BLOCK=128, num_warps=4),
    "norms": dict(BLOCK_D=1024, num_warps=4),
    "least": dict(BLOCK=128, num_warps=4),
    "outside": dict(BLOCK=128, num_warps=4),
    "whole": dict(BLOCK=128, num_warps=4),
    "add_rows": dict(BLOCK_N=2, BLOCK_D=1024, num_warps=4),
    "count_levels": dict(BLOCK_V=2048, num_warps=4),
    "begin": dict(num_warps=4),
    "choose": dict(num_warps=4),
    "arrange": dict(num_warps=1),
    "mark": dict(BLOCK=256, num_warps=4),
    "choose_words": dict(BLOCK_T=64, BLOCK_V=128, num_warps=4),
}
if INTERPRETED:  # a small block takes it as long as a large one
    sizes = dict(BLOCK_N=64, BLOCK_V=2048, BLOCK_D=256, STEPS=2, LANES=256, BLOCK_K=16, BLOCK_T=64)
    LAUNCHES = {name: {k: sizes.get(k, v) for k, v in x.items()} for name, x in LAUNCHES.items()}


@dataclass(frozen=True)
class KernelOperands:
    """The operands of a call in one dtype. Without a bias another tensor stands in, unread."""

    full: torch.Tensor  # (N, D)
    aug: torch.Tensor | None  # (N, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor  # (V,) float32
    has_bias: bool

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
    def dtype(self):
        """Of products' operands, and so of gradients of logits."""
        return self.weight.dtype


def kernel_operands(call):
    """Operands of a `rows.Call`, promoted to their widest dtype."""
    dtype = torch.promote_types(call.hidden.dtype, call.weight.dtype)
    if call.aug_hidden is not None:
        dtype = torch.promote_types(dtype, call.aug_hidden.dtype)
    if dtype == torch.float64:
        raise ValueError("hidden, aug_hidden or weight is float64; backend='triton' has none")
    given = tuple(x.dtype for x in (call.hidden, call.aug_hidden, call.weight) if x is not None)
    if set(given) != {dtype}:
        _say_once(given, dtype)
    if INTERPRETED:  # no arithmetic in 16 bits: the interpreter truncates where it should round
        dtype = torch.float32
    weight = call.weight.to(dtype)
    return KernelOperands(
        call.hidden.to(dtype),
        None if call.aug_hidden is None else call.aug_hidden.to(dtype),
        weight,
        weight if call.bias is None else call.bias.float().contiguous(),
        call.bias is not None,
    )


@functools.cache
def _say_once(given, dtype):
    names = [str(x).removeprefix("torch.") for x in (*given, dtype)]
    log.warning(
        f"token_stats copies its operands to {names[-1]}, which is slow: hidden, aug_hidden and "
        f"weight are {', '.join(names[:-1])}; give all of them one dtype"
    )


def multiply(a, b, out):
    """Writes the float32 product of (A, K) and (K, B) of one dtype into (A, B) `out`.

    A width that is no multiple of EVEN costs cuBLAS's fast kernels: what is over is done alone.
    """
    even = b.shape[1] // EVEN * EVEN
    for part in (slice(0, even), slice(even, b.shape[1])):
        if part.start == part.stop:
            continue
        if a.dtype == torch.float32:
            torch.mm(a, b[:, part], out=out[:, part])
        else:
            torch.mm(a, b[:, part], out_dtype=torch.float32, out=out[:, part])


def multiply_add(total, a, b):
    """Adds the product of (A, K) and (K, B) of one dtype to (A, B) float32 `total`."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class Asked:
    """Numbers that the device is asked for now, and that the host waits for later.

    What is launched in between hides the wait: the device is not idle while the host is told.
    """

    def __init__(self, numbers):
        """numbers: tensor of any shape."""
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._told = None
        if numbers.is_cuda:
            self._told = torch.cuda.Event()
            self._told.record()

    def tolist(self):
        """The numbers, once the device has got to them."""
        if self._told is not None:
            self._told.synchronize()
        return self._numbers.tolist()


def places(mask, count):
    """(count,) int64: where (R,) bool `mask` holds, in order.

    The host has to know how often it does; the device is not asked.
    """
    return mask.nonzero_static(size=count).squeeze(1)


def rows_of(streams, at):
    """(S R, D) the (R,) rows `at` of each of some (N, D) tensors, one below the other."""
    found = streams[0].new_empty(len(streams) * len(at), streams[0].shape[1])
    for x, part in zip(streams, found.split(len(at)), strict=True):
        torch.index_select(x, 0, at, out=part)
    return found


def padded(rows, words, dtype, device):
    """Room for (rows, words), with rows that begin at multiples of EVEN elements."""
    return torch.empty(rows, even_up(words), dtype=dtype, device=device)[:, :words]


def even_up(words):
    """`words`, or the next multiple of EVEN."""
    return triton.cdiv(words, EVEN) * EVEN


def even_down(words):
    """`words`, or the multiple of EVEN before; EVEN at least."""
    return max(1, words // EVEN) * EVEN
