"""The backward in C++."""

from dataclasses import replace

import torch

from papo_kernels import chunked_backward
from papo_kernels.cpu import library, tiles


def usable(call):
    """Whether this way can do the backward: operands must be float32 or bfloat16 too."""
    if call.head.dtype != torch.float32:
        return False
    dtypes = [x.dtype for x in (call.hidden, call.aug_hidden, call.weight) if x is not None]
    return library.usable(call.logits, call.targets.device, *dtypes)


def backward(call, saved, upstream, needs):
    """See `chunked_backward.backward`."""
    if call.weight.stride(1) != 1:
        call = replace(call, weight=call.weight.contiguous())
    return chunked_backward.backward(call, saved, upstream, needs, tiles)
