"""The equations on (R, V) logits, elementwise, by torch's operators.

All is finite for banned words (log p = LOG_ZERO, p = 0) and NaN in the rows that hold a NaN.
"""

import math
from typing import NamedTuple

import torch

from papo_kernels.reference import LOG_ZERO
from papo_kernels.rows import each

# Logits of eager work at a time: 0.5 MiB of float32 stays in a core's cache through all passes.
EAGER_ELEMENTS = 1 << 17
# Above log(1/2), by more than rounding.
LOG_HALF = math.log(0.5) + 1e-3


class TargetPlace(NamedTuple):
    """Where rows' targets stand among some words, (R, 1) each; see `rows.Shard.place`."""

    owned: torch.Tensor
    place: torch.Tensor


def log_probs(z, s):
    """(R, V) log p of logits `z`; s: StreamStats of (R, 1)."""
    return ((z - s.peak) - s.log_sum).clamp_min(LOG_ZERO)


def log_probs_again(z, s):
    """(R, V) log p of logits that were computed anew, and so are rounded unlike the forward's.

    A word with more than half of the mass is the peak, and its log p is -log_sum whatever the
    rounding. Else the gradient of a confident row, which has size 1 - p, would be that rounding.
    """
    log_p = log_probs(z, s)
    return torch.where(log_p > LOG_HALF, -s.log_sum, log_p)


def q_minus_p(p, q, log_ratio):
    """q - p with a small relative error where q is close to p, which subtraction would lose."""
    x = log_ratio
    if x.dtype == torch.float64:
        return torch.where(x.abs() < 0.25, p * torch.expm1(x), q - p)
    # Taylor to x^6: below 5e-8 relative for |x| < 1/4, and several times faster than expm1.
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return torch.where(x.abs() < 0.25, p * series, q - p)


def slope(z, head):
    """d(logits) / d(states @ weight.T + bias) at the logits `z`."""
    if head.softcap is None:
        return 1 / head.temperature
    # Within [-1, 1] but for bans, which are -inf: there the slope is 0, and 0 * inf would be NaN.
    t = (z * (head.temperature / head.softcap)).clamp_(-1, 1)
    return (1 - t.square()) / head.temperature


def d_logits(log_p, p, log_q, q, s, g, wanted, target):
    """(R, V) gradients of both streams' logits; None if not wanted.

    log_p, p, log_q, q: (R, V), or None for a stream that nothing needs. s, g: RowStats and Upstream
    of (R, 1). target: TargetPlace.
    """
    log_ratio = log_q - log_p if wanted.any_kl else None
    gap = q_minus_p(p, q, log_ratio) if wanted.kl_reverse or (wanted.kl and wanted.aug) else None
    dz = dz_aug = None
    if wanted.full:
        dz = own_part(log_p, p, s.full.entropy, g.full, target)
        if wanted.kl:
            dz = _plus(dz, -g.kl_prcp * p * (log_ratio + s.kl_prcp))
        if wanted.kl_reverse:
            dz = _plus(dz, -g.kl_reverse * gap)
    if wanted.aug:
        dz_aug = own_part(log_q, q, s.aug.entropy, g.aug, target)
        if wanted.kl:
            dz_aug = _plus(dz_aug, g.kl_prcp * gap)
        if wanted.kl_reverse:
            dz_aug = _plus(dz_aug, g.kl_reverse * q * (log_ratio - s.kl_reverse))
    return dz, dz_aug


def own_part(log_p, p, entropy, g, target):
    """(R, V) gradients of one stream's logits but for the KLs' part; None without an upstream."""
    dz = None
    if g.logprobs is not None:
        dz = -g.logprobs * p
        # 1 - p would lose the bits of a confident row
        of_target = -g.logprobs * torch.expm1(log_p.gather(1, target.place))
        of_target = torch.where(target.owned, of_target, dz.gather(1, target.place))
        dz.scatter_(1, target.place, of_target)
    if g.entropy is not None:
        dz = _plus(dz, -g.entropy * p * (log_p + entropy))
    return dz


def _plus(x, y):
    return y if x is None else x + y


def d_products_(z, z_aug, s, g, wanted, target, head):
    """Overwrites logits with the gradients of states @ weight.T + bias.

    It goes by blocks of rows that stay in a core's cache.

    z, z_aug: (R, V), None where nothing needs that stream; those that are wanted are overwritten.
    s, g: RowStats and Upstream of (R, 1). target: TargetPlace.
    """
    some = z if z is not None else z_aug
    size = max(1, EAGER_ELEMENTS // some.shape[1])
    for n in range(0, len(some), size):
        z_block, aug_block, s_block, g_block, target_block = (
            each(lambda x, rows=slice(n, n + size): x[rows], value)
            for value in (z, z_aug, s, g, target)
        )
        _d_products_of_block_(z_block, aug_block, s_block, g_block, wanted, target_block, head)


def _d_products_of_block_(z, z_aug, s, g, wanted, target, head):
    log_p = p = log_q = q = None
    if z is not None:
        log_p = log_probs_again(z, s.full)
        p = log_p.exp()
    if z_aug is not None:
        log_q = log_probs_again(z_aug, s.aug)
        q = log_q.exp()
    dz, dz_aug = d_logits(log_p, p, log_q, q, s, g, wanted, target)
    if wanted.full:
        z.copy_(dz * slope(z, head))
    if wanted.aug:
        z_aug.copy_(dz_aug * slope(z_aug, head))
