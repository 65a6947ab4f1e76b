"""Row statistics and levels of a chunk's logits, by torch's operators."""

import torch

from papo_kernels import chunked_forward
from papo_kernels.certificate import LEVELS, LEVELS_PER_NAT
from papo_kernels.equations import EAGER_ELEMENTS, log_probs, q_minus_p
from papo_kernels.reference import LOG_ZERO
from papo_kernels.rows import Head, StreamStats


def forward(call, keep_levels):
    """See `chunked_forward.forward`."""
    return chunked_forward.forward(call, keep_levels, Head.logits, row_statistics, find_levels)


def row_statistics(logits):
    """(3 or 11, R) statistics of one or two (R, V) `logits`, by blocks that stay in cache."""
    function = two_streams if len(logits) == 2 else one_stream
    size = max(1, EAGER_ELEMENTS // logits[0].shape[-1])
    starts = range(0, len(logits[0]), size)
    return torch.cat([function(*(z[n : n + size] for z in logits)) for n in starts], dim=-1)


def one_stream(z):
    """(3, R): peak, log_sum and entropy of (R, V) logits."""
    s = _normaliser(z)
    log_p = log_probs(z, s)
    return torch.stack([s.peak.squeeze(-1), s.log_sum.squeeze(-1), _entropy(log_p.exp(), log_p)])


def two_streams(z, z_aug):
    """(11, R): what `rows.statistics_names` lists, of two (R, V) logits.

    KL(p || q) is summed as p (log p - log q) + (q - p), and KL(q || p) as q (log q - log p) -
    (q - p): the additional terms add up to 0 and make every term non-negative, so that first-order
    errors cancel where q is close to p.
    """
    full, aug = _normaliser(z), _normaliser(z_aug)
    log_p, log_q = log_probs(z, full), log_probs(z_aug, aug)
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_q - log_p
    gap = q_minus_p(p, q, log_ratio)
    drift, aug_drift = p * log_ratio, q * log_ratio
    kls = [(gap - drift).sum(-1), (aug_drift - gap).sum(-1)]
    sums = kls + [x.abs().sum(-1) for x in (gap, drift, aug_drift)]
    of_full = [full.peak.squeeze(-1), full.log_sum.squeeze(-1), _entropy(p, log_p)]
    of_aug = [aug.peak.squeeze(-1), aug.log_sum.squeeze(-1), _entropy(q, log_q)]
    return torch.stack(of_full + of_aug + sums)


def _normaliser(z):
    top, word = z.max(-1, keepdim=True)
    # Finite where a shard of the vocabulary is banned as a whole; NaN stays NaN.
    peak = top.clamp_min(LOG_ZERO)
    # Beside the peak's 1, a sum would lose the other terms of a confident row.
    others = (z - peak).exp().scatter_(-1, word, 0).sum(-1, keepdim=True)
    return StreamStats(peak, torch.log1p(others + ((top - peak).exp() - 1)), None)


def _entropy(p, log_p):
    return -(p * log_p).sum(-1)


def find_levels(logits, order, s, tile):
    """(ceil(R / tile), V) uint8 levels of one or two (R, V) `logits`; 0 where a row holds NaN.

    order: (R,) rows in the order in which tiles are cut. s: RowStats of (R, 1).
    """
    streams = list(zip(logits, (s.full, s.aug), strict=False))
    return torch.stack([_levels_of_tile(streams, rows) for rows in order.split(tile)])


def _levels_of_tile(streams, rows):
    """(V,) uint8: the largest log-prob of every word over some rows and all streams, as a level."""
    highest = None
    for z, s in streams:
        log_p = (z[rows] - s.peak[rows]) - s.log_sum[rows]
        highest = log_p if highest is None else torch.maximum(highest, log_p)
    level = (highest.amax(0) * -LEVELS_PER_NAT).clamp(0, LEVELS - 1)
    return torch.where(level.isnan(), 0, level).to(torch.uint8)
