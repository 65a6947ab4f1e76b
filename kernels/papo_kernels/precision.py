"""The precision of float32 products and convolutions: a setting of the process."""

import threading
from contextlib import contextmanager, nullcontext

import torch

# What decides about the products of a device. On CPUs that multiply bfloat16 or TF32 matrices,
# oneDNN takes fewer bits too, after `torch.set_float32_matmul_precision("medium")`.
_OF_PRODUCTS = {"cpu": torch.backends.mkldnn.matmul, "cuda": torch.backends.cuda.matmul}

_lock = threading.Lock()
_inside = {}  # flags: how many are inside, and the setting that the first one found


@contextmanager
def exact_float32(flags):
    """float32 operands are multiplied in float32 inside it, and as before after it.

    TF32, which a user may have set and cuDNN takes by default, has 10 bits of 23. Threads may be
    inside at the same time: the last one to leave brings back what was before the first.

    Args:
        flags: `torch.backends.cuda.matmul`, `.mkldnn.matmul` or `.cudnn.conv`.
    """
    with _lock:
        count, before = _inside.get(flags, (0, flags.fp32_precision))
        _inside[flags] = count + 1, before
        flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        with _lock:
            count, before = _inside.pop(flags)
            if count > 1:
                _inside[flags] = count - 1, before
            else:
                flags.fp32_precision = before


def exact_products(device):
    """As `exact_float32`, for all matrix products on a `torch.device`."""
    flags = _OF_PRODUCTS.get(device.type)
    return nullcontext() if flags is None else exact_float32(flags)
