"""The equations on (R, V) logits, elementwise and by row.

All is finite for banned tokens (log p = LOG_ZERO, p = 0) and NaN in the rows that hold a NaN.
"""

from typing import NamedTuple

import torch

from papo_kernels import cpu_kernels
from papo_kernels.reference import LOG_ZERO

# Rows of eager work at a time: 0.5 MiB of float32 stays in a core's cache through all passes.
EAGER_ELEMENTS = 1 << 17


class Upstream(NamedTuple):
    """Gradients of the loss by output, each (R, 1) or None."""

    logprobs: torch.Tensor | None
    entropy: torch.Tensor | None
    aug_logprobs: torch.Tensor | None = None
    aug_entropy: torch.Tensor | None = None
    kl_prcp: torch.Tensor | None = None


class RowStats(NamedTuple):
    """What a row's log-probabilities and gradients need besides its logits, each (R,) or (R, 1).

    log p = (z - peak) - log_sum: the two are kept apart because their sum loses bits at |z| = 1e4.
    """

    peak: torch.Tensor
    log_sum: torch.Tensor
    entropy: torch.Tensor
    aug_peak: torch.Tensor | None = None
    aug_log_sum: torch.Tensor | None = None
    aug_entropy: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    gap: torch.Tensor | None = None  # sum |q - p|
    ratio: torch.Tensor | None = None  # sum p |log q - log p|

    def columns(self):
        return RowStats(*(x if x is None else x[:, None] for x in self))


def log_probs(z, peak, log_sum):
    return ((z - peak) - log_sum).clamp_min(LOG_ZERO)


def q_minus_p(p, q, log_ratio):
    """q - p with a small relative error where q is close to p, which subtraction would lose."""
    x = log_ratio
    if x.dtype == torch.float64:
        return torch.where(x.abs() < 0.25, p * torch.expm1(x), q - p)
    # Taylor to x^6: below 5e-8 relative for |x| < 1/4, and several times faster than expm1.
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return torch.where(x.abs() < 0.25, p * series, q - p)


def _normaliser(z):
    # Finite where a shard of the vocabulary is banned as a whole; NaN stays NaN.
    peak = z.amax(-1, keepdim=True).clamp_min(LOG_ZERO)
    return peak, (z - peak).exp().sum(-1, keepdim=True).log()


def _entropy(p, log_p):
    return -(p * log_p).sum(-1)


def one_stream(z):
    """(3, R): the first three fields of RowStats."""
    peak, log_sum = _normaliser(z)
    log_p = log_probs(z, peak, log_sum)
    return torch.stack([peak.squeeze(-1), log_sum.squeeze(-1), _entropy(log_p.exp(), log_p)])


def two_streams(z, z_aug):
    """(9, R): the fields of RowStats.

    The KL is summed as p (log p - log q) + (q - p): the additional terms add up to 0 and make every
    term non-negative, so that first-order errors cancel where q is close to p.
    """
    peak, log_sum = _normaliser(z)
    aug_peak, aug_log_sum = _normaliser(z_aug)
    log_p = log_probs(z, peak, log_sum)
    log_q = log_probs(z_aug, aug_peak, aug_log_sum)
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_q - log_p
    gap = q_minus_p(p, q, log_ratio)
    drift = p * log_ratio
    sums = [(gap - drift).sum(-1), gap.abs().sum(-1), drift.abs().sum(-1)]
    full = [peak.squeeze(-1), log_sum.squeeze(-1), _entropy(p, log_p)]
    aug = [aug_peak.squeeze(-1), aug_log_sum.squeeze(-1), _entropy(q, log_q)]
    return torch.stack(full + aug + sums)


def slope(z, temperature, softcap):
    """d(logits) / d(x @ weight.T + bias) at the logits z."""
    if softcap is None:
        return 1 / temperature
    return (1 - (z * (temperature / softcap)).square()) / temperature


def d_logits_(z, z_aug, s, g, full, aug, temperature, softcap):
    """Overwrites logits (R, V) with gradients of x @ weight.T + bias, but for the label's own +1.

    Args:
        z, z_aug: (R, V); None where nothing needs that stream. full, aug: which to overwrite.
        s: RowStats of (R, 1); g: Upstream.
    """
    log_p = p = log_q = q = None
    if z is not None:
        log_p = log_probs(z, s.peak, s.log_sum)
        p = log_p.exp()
    if z_aug is not None:
        log_q = log_probs(z_aug, s.aug_peak, s.aug_log_sum)
        q = log_q.exp()
    dz, dz_aug = d_log_probs(log_p, p, log_q, q, s, g, full, aug)
    if full:
        z.copy_(dz * slope(z, temperature, softcap))
    if aug:
        z_aug.copy_(dz_aug * slope(z_aug, temperature, softcap))


def d_log_probs(log_p, p, log_q, q, s, g, full, aug):
    """Gradients (R, V) of both streams' logits, but for the label's own +1; None if not asked."""
    log_ratio = None if g.kl_prcp is None else log_q - log_p
    dz = dz_aug = None
    if full:
        dz = _own(log_p, p, s.entropy, g.logprobs, g.entropy)
        if g.kl_prcp is not None:
            dz = _plus(dz, -g.kl_prcp * p * (log_ratio + s.kl))
    if aug:
        dz_aug = _own(log_q, q, s.aug_entropy, g.aug_logprobs, g.aug_entropy)
        if g.kl_prcp is not None:
            dz_aug = _plus(dz_aug, g.kl_prcp * q_minus_p(p, q, log_ratio))
    return dz, dz_aug


def _own(log_p, p, entropy, g_logprobs, g_entropy):
    dz = None
    if g_logprobs is not None:
        dz = -g_logprobs * p
    if g_entropy is not None:
        dz = _plus(dz, -g_entropy * p * (log_p + entropy))
    return dz


def _plus(x, y):
    return y if x is None else x + y


def row_statistics(logits, elements):
    """(9 or 3, R): the fields of RowStats, from one or two (R, V) `logits`.

    elements: logits of the whole call; they decide whether the C++ is used.
    """
    if cpu_kernels.usable(elements, *logits):
        return cpu_kernels.statistics(logits[0], logits[1] if len(logits) == 2 else None)
    function = two_streams if len(logits) == 2 else one_stream
    size = max(1, EAGER_ELEMENTS // logits[0].shape[-1])
    starts = range(0, len(logits[0]), size)
    return torch.cat([function(*(z[n : n + size] for z in logits)) for n in starts], dim=-1)


def in_place(function, z, z_aug, s, g, *options):
    """`d_logits_` over blocks of rows that stay in cache."""
    some = z if z is not None else z_aug
    size = max(1, EAGER_ELEMENTS // some.shape[1])
    for n in range(0, len(some), size):
        block = slice(n, n + size)
        z_block, aug_block = (None if x is None else x[block] for x in (z, z_aug))
        s_block, g_block = (type(t)(*(None if x is None else x[block] for x in t)) for t in (s, g))
        function(z_block, aug_block, s_block, g_block, *options)
