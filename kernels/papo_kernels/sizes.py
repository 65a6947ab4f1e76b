"""What the share that a sparse backward drops is a share of."""

import functools

import torch

from papo_kernels.certificate import certified, normaliser_gap
from papo_kernels.equations import TargetPlace, d_logits, own_part, slope
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
        """run: a `chunked_backward.Backward`; count: rows that count."""
        call, wanted = run.call, run.wanted
        stats, upstream = (each(torch.Tensor.double, x) for x in (run.stats, run.upstream))
        self._least = least_sizes(stats, upstream, wanted, call.head)
        self._count = count
        self._of_token = call.options.budget_of == "token"
        self._scales = scales_of_sizes(call, wanted, torch.ones_like(stats.full.peak))
        self._squares = {
            i: [(self._least[i] * scale).square().sum() for scale in scales]
            for i, scales in self._scales.items()
        }

    def of_rows(self, at, sizes):
        """Of rows `at`, whose sums |dz| over candidates are `sizes`, what shares are relative to.

        sizes, and what is returned: three tensors of the shape of `at`, None where not certified.
        """
        return tuple(
            None if x is None else x.clamp_min(self._typical(i, at).to(x.dtype))
            for i, x in enumerate(sizes)
        )

    def _typical(self, i, at):
        if self._of_token:
            return torch.zeros_like(self._least[i][at])
        means = [
            (squares / self._count).sqrt() / scale[at].clamp_min(1e-300)
            for squares, scale in zip(self._squares[i], self._scales[i], strict=True)
        ]
        return functools.reduce(torch.minimum, means)

    def learn(self, at, sizes):
        """Takes into the root mean square that rows `at` have at least `sizes`, as `of_rows`."""
        for i, x in enumerate(sizes):
            if x is None:
                continue
            before = self._least[i][at]
            after = torch.maximum(before, x.double().nan_to_num(0, 0, 0))
            self._least[i][at] = after
            more = after.square() - before.square()
            self._squares[i] = [
                squares + (more * scale[at].square()).sum()
                for squares, scale in zip(self._squares[i], self._scales[i], strict=True)
            ]


def scales_of_sizes(call, wanted, ones):
    """{position in (0, 1, 2): one or two (N,) factors of sum |dz|} of what is certified.

    Each gives a root mean square, and the smallest counts: see `Wholes`. ones: (N,).
    """
    # The gradients of states and bias see dz itself.
    plain = wanted.bias or wanted.hidden, wanted.bias or wanted.aug_hidden, wanted.bias
    states = call.hidden, call.aug_hidden, call.hidden
    return {
        i: [ones] * (plain[i] or not wanted.weight) + [_norms(states[i])] * wanted.weight
        for i in certified(wanted)
    }


def _norms(states):
    """(N,) float64 norms of (N, D) states; 0 where one is not finite, whose tile goes dense."""
    return torch.linalg.vector_norm(states, dim=1, dtype=torch.float64).nan_to_num(0, 0, 0)


def least_sizes(s, g, wanted, head):
    """What sum |dz| is at least, of both streams and of their sum, by the statistics alone.

    dz is at states @ weight.T + bias. Without a soft cap its terms add up to 0, so sum |dz| is
    twice the target's |dz| or more, and twice the peak's. Where one part of dz, such as the KL's,
    outweighs the others, it is the difference. With a soft cap the target's own |dz| remains.

    Args:
        s, g: RowStats and Upstream of all rows, (N,) each.
        wanted: rows.Wanted.
        head: rows.Head.

    Returns:
        Three (N,) tensors, finite and >= 0.
    """
    y, y_aug = _at_target(s, g, wanted, head)
    sizes = [y.abs(), y_aug.abs(), (y + y_aug).abs()]
    if head.softcap is None:
        by_parts = [x / head.temperature for x in _by_parts(s, g)]
        sizes = [torch.maximum(2 * x, part) for x, part in zip(sizes, by_parts, strict=True)]
    return tuple(x.nan_to_num(0, 0, 0).clamp_min(0) for x in sizes)


def _at_target(s, g, wanted, head):
    """(N,) gradients of both streams' products at the targets; 0 where not wanted."""
    s, g = (each(lambda x: x[:, None], value) for value in (s, g))
    streams = [x for x in (s.full, s.aug) if x is not None]
    log_p = [x.logprobs.clamp_min(LOG_ZERO) for x in streams]
    given = [x for log in log_p for x in (log, log.exp())]
    given += [None] * (4 - len(given))
    target = _the_word(log_p[0], is_target=True)
    found = [torch.zeros_like(log_p[0])] * 2
    for i, dz in enumerate(d_logits(*given, s, g, wanted, target)):
        if dz is not None:
            z = log_p[i] + (streams[i].log_sum + streams[i].peak)
            found[i] = dz * slope(z, head)
    return [x.squeeze(1) for x in found]


def _by_parts(s, g):
    """(N,) least that sum |dz| is, of both streams and of their sum, as one part outweighs another.

    At the logits, where the terms of each part add up to 0.
    """
    low, high = _own_bounds(s.full, g.full)
    if s.aug is None:
        return low, torch.zeros_like(low), torch.zeros_like(low)
    low_aug, high_aug = _own_bounds(s.aug, g.aug)
    sizes = [
        torch.maximum(own_low - kl_high, kl_low - own_high)
        for own_low, own_high, (kl_low, kl_high) in zip(
            (low, low_aug), (high, high_aug), _kl_bounds(s, g), strict=True
        )
    ]
    net = low - high_aug
    for up, kl in ((g.kl_prcp, s.kl_prcp), (g.kl_reverse, s.kl_reverse)):
        if up is not None:
            net = net - 2 * up.abs() * kl.abs()
    return *sizes, net


def _own_bounds(s, g):
    """(N,) least and most that sum |dz| of one stream is without the KLs' part."""
    least = _own_of_word(s.logprobs.clamp_min(LOG_ZERO), s, g, is_target=True)
    # Where the target is not the peak, the peak is another word, with the log-prob -log_sum.
    peak = _own_of_word(-s.log_sum, s, g, is_target=False)
    least = torch.where(s.logprobs < -s.log_sum, torch.maximum(least, peak), least)
    most = torch.zeros_like(least)
    if g.logprobs is not None:
        most = most - 2 * g.logprobs.abs() * torch.expm1(s.logprobs)
    if g.entropy is not None:
        most = most + 2 * g.entropy.abs() * s.entropy
    return least, most


def _own_of_word(log_p, s, g, is_target):
    """(N,) twice |dz|, without the KLs' part, of a word with log-prob `log_p`."""
    if not g.given:
        return torch.zeros_like(log_p)
    g = each(lambda x: x[:, None], g)
    log_p, entropy = log_p[:, None], s.entropy[:, None]
    word = _the_word(log_p, is_target)
    return 2 * own_part(log_p, log_p.exp(), entropy, g, word).abs().squeeze(1)


def _the_word(log_p, is_target):
    """TargetPlace in (N, 1) `log_p` of one word a row, which is the target or another."""
    place = torch.zeros_like(log_p, dtype=torch.int64)
    return TargetPlace(torch.full_like(place, is_target, dtype=torch.bool), place)


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
