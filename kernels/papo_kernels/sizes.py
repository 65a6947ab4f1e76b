"""What the share that a sparse backward drops is a share of."""

import torch

from papo_kernels.certificate import normaliser_gap
from papo_kernels.reference import LOG_ZERO
from papo_kernels.rows import each


class Wholes:
    """What the share that a row drops is relative to, in both streams and in their sum.

    That is sum |dz| of the row's own, or the call's root mean square of it where that is larger.
    The latter is never overestimated: it begins with what the statistics prove of every row
    (`least_sizes`), and learns from the tiles as they are done.

    The gradient of the weight is a sum of dz times states. For its sake a row with long states may
    not drop more than the root mean square of sum |dz| |h|, over its own |h|.
    """

    def __init__(self, run, count):
        """run: a `chunked_backward.Backward` or its twin of Triton; count: rows that count."""
        call, wanted = run.call, run.wanted
        stats, upstream = (each(torch.Tensor.double, x) for x in (run.stats, run.upstream))
        self._least = least_sizes(stats, upstream, call.head)
        self._count = count
        self._of_token = call.options.budget_of == "token"
        # whose gradient sees dz itself, and not only dz times the states
        self._plain = wanted.bias or wanted.hidden, wanted.bias or wanted.aug_hidden, wanted.bias
        self._norms = (None, None, None)
        if wanted.weight:
            norms = [
                _norms(x) if asked else None
                for x, asked in ((call.hidden, wanted.full), (call.aug_hidden, wanted.aug))
            ]
            self._norms = (*norms, norms[0])
        self._squares = [
            (x.square().sum(), None if n is None else (x * n).square().sum())
            for x, n in zip(self._least, self._norms, strict=True)
        ]

    def of_rows(self, at, sizes):
        """Of rows `at`, whose sums |dz| over candidates are `sizes`, what shares are relative to.

        sizes, and what is returned: three tensors of the shape of `at`, or None.
        """
        return tuple(
            None if x is None else x.clamp_min(self._typical(i, at).to(x.dtype))
            for i, x in enumerate(sizes)
        )

    def _typical(self, i, at):
        if self._of_token:
            return torch.zeros_like(self._least[i][at])
        plain, weighted = ((x / self._count).sqrt() for x in self._both_squares(i))
        norms = self._norms[i]
        if norms is None:
            return plain.expand(at.shape)
        weighted = weighted / norms[at].clamp_min(1e-300)
        return torch.minimum(plain, weighted) if self._plain[i] else weighted

    def _both_squares(self, i):
        plain, weighted = self._squares[i]
        return plain, plain if weighted is None else weighted

    def learn(self, at, sizes):
        """Takes into the root mean square that rows `at` have at least `sizes`, as `of_rows`."""
        for i, x in enumerate(sizes):
            if x is None:
                continue
            before = self._least[i][at]
            after = torch.maximum(before, x.double().nan_to_num(0, 0, 0))
            self._least[i][at] = after
            more = after.square() - before.square()
            plain, weighted = self._squares[i]
            plain = plain + more.sum()
            if weighted is not None:
                weighted = weighted + (more * self._norms[i][at].square()).sum()
            self._squares[i] = plain, weighted


def _norms(states):
    """(N,) float64 norms of (N, D) states; 0 where one is not finite, whose tile goes dense."""
    return torch.linalg.vector_norm(states, dim=1, dtype=torch.float64).nan_to_num(0, 0, 0)


def least_sizes(s, g, head):
    """What sum |dz| is at least, of both streams and of their sum, by the statistics alone.

    dz is at states @ weight.T + bias. Without a soft cap its terms add up to 0, so sum |dz| is
    twice the target's |dz| or more, and twice the peak's. Where one part of dz, such as the KL's,
    outweighs the others, it is the difference. With a soft cap the target's own |dz| remains.

    Args:
        s, g: RowStats and Upstream of all rows, (N,) each.
        head: rows.Head.

    Returns:
        Three (N,) tensors, finite and >= 0.
    """
    p, q = s.full, s.aug
    y, y_aug = _at_target(s, g)
    net = torch.zeros_like(p.peak) if q is None else y + y_aug
    sizes = [2 * y.abs(), 2 * y_aug.abs(), 2 * net.abs()]
    if head.softcap is not None:
        slopes = [_slope_of_target(x, head) for x in (p, p if q is None else q)]
        sizes = [y.abs() * slopes[0], y_aug.abs() * slopes[1]]
        sizes.append((y * slopes[0] + (0 if q is None else y_aug * slopes[1])).abs())
    else:
        low, high = _own_bounds(p, g.full)
        if q is not None:
            low_aug, high_aug = _own_bounds(q, g.aug)
            kl, kl_aug = _kl_bounds(s, g)
            for i, (own_low, own_high, (kl_low, kl_high)) in enumerate(
                ((low, high, kl), (low_aug, high_aug, kl_aug))
            ):
                sizes[i] = torch.maximum(sizes[i], own_low - kl_high)
                sizes[i] = torch.maximum(sizes[i], kl_low - own_high)
            both = sum(
                2 * up.abs() * of.abs()
                for up, of in ((g.kl_prcp, s.kl_prcp), (g.kl_reverse, s.kl_reverse))
                if up is not None
            )
            sizes[2] = torch.maximum(sizes[2], low - high_aug - both)
        else:
            sizes[0] = torch.maximum(sizes[0], low)
    return tuple((x / head.temperature).nan_to_num(0, 0, 0).clamp_min(0) for x in sizes)


def _at_target(s, g):
    """(N,) dz and dz_aug of the targets."""
    p, q = s.full, s.aug
    y = _own_at(p.logprobs, p, g.full)
    if q is None:
        return y, torch.zeros_like(y)
    y_aug = _own_at(q.logprobs, q, g.aug)
    log_p, log_q = (x.logprobs.clamp_min(LOG_ZERO) for x in (p, q))
    ratio, gap = log_q - log_p, log_q.exp() - log_p.exp()
    if g.kl_prcp is not None:
        y = y - g.kl_prcp * log_p.exp() * (ratio + s.kl_prcp)
        y_aug = y_aug + g.kl_prcp * gap
    if g.kl_reverse is not None:
        y = y - g.kl_reverse * gap
        y_aug = y_aug + g.kl_reverse * log_q.exp() * (ratio - s.kl_reverse)
    return y, y_aug


def _own_at(log_p, s, g, of_target=True):
    """(N,) dz without the KLs' part of one word with log-prob `log_p`."""
    dz, log_p = torch.zeros_like(log_p), log_p.clamp_min(LOG_ZERO)
    if g.logprobs is not None:
        dz = dz - g.logprobs * (torch.expm1(log_p) if of_target else log_p.exp())
    if g.entropy is not None:
        dz = dz - g.entropy * log_p.exp() * (log_p + s.entropy)
    return dz


def _slope_of_target(s, head):
    z = s.logprobs.clamp_min(LOG_ZERO) + (s.log_sum + s.peak)
    return (1 - (z * head.temperature / head.softcap).square()).clamp(0, 1)


def _own_bounds(s, g):
    """(N,) least and most that sum |dz| of one stream is without the KLs' part."""
    least = 2 * _own_at(s.logprobs, s, g).abs()
    # Where the target is not the peak, the peak is another word, with the log-prob -log_sum.
    peak = 2 * _own_at(-s.log_sum, s, g, of_target=False).abs()
    least = torch.where(s.logprobs < -s.log_sum, torch.maximum(least, peak), least)
    most = torch.zeros_like(least)
    if g.logprobs is not None:
        most = most - 2 * g.logprobs.abs() * torch.expm1(s.logprobs)
    if g.entropy is not None:
        most = most + 2 * g.entropy.abs() * s.entropy
    return least, most


def _kl_bounds(s, g):
    """Of both streams, (N,) least and most that sum |dz| of the KLs' part is."""
    full, aug = [], []
    for up, kl, of_mean, of_gap, sums in (
        (g.kl_prcp, s.kl_prcp, full, aug, (s.log_ratio, s.logit_gap)),
        (g.kl_reverse, s.kl_reverse, aug, full, (s.aug_log_ratio, s.aug_logit_gap)),
    ):
        if up is None:
            continue
        up, kl = up.abs(), kl.abs()
        by_probability, by_logit = sums
        if by_probability is not None:  # sum p |log q - log p|, within rounding
            low = high = by_probability
            gap = s.prob_gap, s.prob_gap
        else:
            normalisers = normaliser_gap(s)
            low, high = by_logit - normalisers, by_logit + normalisers
            gap = torch.zeros_like(high), (s.logit_gap + s.aug_logit_gap + normalisers).clamp_max(2)
        of_mean.append((up * (low - kl).clamp_min(0), up * (high + kl)))
        of_gap.append((up * gap[0], up * gap[1]))
    return [_either(x, s) for x in (full, aug)]


def _either(parts, s):
    """Least and most of a sum of parts whose own least and most are given."""
    nothing = torch.zeros_like(s.full.peak)
    if not parts:
        return nothing, nothing
    most = sum(high for _, high in parts)
    least = nothing
    for low, high in parts:
        least = torch.maximum(least, low - (most - high))
    return least, most
