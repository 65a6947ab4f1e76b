"""Row statistics and levels of a chunk's logits in C++."""

import torch

from papo_kernels import chunked_forward
from papo_kernels.certificate import LEVELS_PER_NAT
from papo_kernels.cpu import library
from papo_kernels.rows import BY_PROBABILITY, statistics_names


def usable(call):
    """Whether this way can do the forward: it needs float32 logits, and enough of them."""
    return library.usable(call.logits, call.targets.device, call.head.dtype)


def forward(call, keep_levels):
    """See `chunked_forward.forward`."""
    return chunked_forward.forward(call, keep_levels, logits, row_statistics, find_levels)


def logits(head, states, weight, bias, out):
    """As `Head.logits`; in bfloat16, torch would round the products to 16 bits."""
    added = bias if head.softcap is None else None
    if not library.product(states, weight, out, added):
        return head.logits(states, weight, bias, out)
    return head.finish(out, bias if added is None else None)


def row_statistics(logits):
    """(3 or 11, R) statistics of one or two (R, V) `logits`."""
    names = statistics_names(len(logits), BY_PROBABILITY)
    return library.statistics(logits[0], logits[1] if len(logits) == 2 else None, len(names))


def find_levels(logits, order, s, tile):
    """(ceil(R / tile), V) uint8 levels of one or two (R, V) `logits`; 0 where a row holds NaN.

    order: (R,) rows in the order in which tiles are cut. s: RowStats of (R, 1).
    """
    streams = [x for x in (s.full, s.aug) if x is not None]
    normalisers = torch.stack([x.squeeze(1) for s in streams for x in (s.peak, s.log_sum)])
    return library.levels(logits, order, normalisers, tile, LEVELS_PER_NAT)
