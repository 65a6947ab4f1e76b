"""How little of its gradient a sparse backward leaves out, and how that is known.

The forward stores, per tile of rows and word, an upper bound on that word's probability over the
tile's rows and both streams, as a byte: level l stands for p, q <= exp(-l / 8) throughout.
The backward takes a tile's words up to a level as candidates and computes their gradients exactly.
What all the other words hold is known by subtraction, from totals that the forward summed. It then
drops the candidates that matter least, while every row stays within its budget.

Everything here is torch over (R, 1) columns of row statistics, in whatever dtype they are given,
and serves every way. `docs/kernels.md` explains the mathematics.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

LEVELS_PER_NAT = 8
LEVELS = 256
# Candidate sets that are tried, each learning from the one before, until a tile is done densely.
ATTEMPTS = 3
# A tile that keeps more of the vocabulary than this gains nothing from gathering the weight.
DENSE_SHARE = 1 / 2
# Candidates worth dropping: for fewer, gathering the others costs more than it saves.
WORTH_DROPPING = 0.1
# The part of `grad_budget` that is spent. Shares add up to errors of .5 to 1.7 of them (aug_entropy
# alone, SmolLM2 at 1.3 nats), and 4e-3 is promised at a budget of 3e-3.
RESERVE = 0.65
# A sum over the vocabulary and its recomputation differ by rounding, which is no dropped gradient.
ROUNDING = 4e-6

# ---- What was dropped, for those who ask

_recorders = []


@dataclass(eq=False)  # one that is empty is not another empty one
class Certificate:
    """What the backward passes inside one `record_certificates()` left out.

    kept: columns kept, over those of a dense backward, in [0, 1]; dense_rows: rows done densely;
    largest_share: the largest sum |dz| that a row dropped in a stream, over the larger of that
    row's own sum |dz| and the mean row's. Never above the call's `grad_budget`.
    """

    rows: int = 0
    dense_rows: int = 0
    columns_kept: float = 0.0
    columns_all: float = 0.0
    shares: list = field(default_factory=list)

    @property
    def kept(self):
        return self.columns_kept / self.columns_all if self.columns_all else 0.0

    @property
    def largest_share(self):
        return max((float(s) for s in self.shares), default=0.0)


@contextmanager
def record_certificates():
    """Collects the certificates of all `token_stats` backward passes inside it.

    Yields:
        Certificate, filled as they run. A backward outside it computes nothing more than it needs.
    """
    certificate = Certificate()
    _recorders.append(certificate)
    try:
        yield certificate
    finally:
        _recorders.remove(certificate)


def recording():
    """Whether anybody collects certificates: to know what to record may cost a synchronisation."""
    return bool(_recorders)


def record(rows, kept, vocab, share):
    """Tells every collector about some rows that kept `kept` of `vocab` columns.

    share: the largest share of a row's gradient that was dropped; None where they were done
    densely.
    """
    for c in _recorders:
        c.rows += rows
        c.columns_kept += rows * kept
        c.columns_all += rows * vocab
        if share is None:
            c.dense_rows += rows
        else:
            c.shares.append(share)


# ---- Which words are candidates


def choose_levels(counts, highest_entropy, tightness, known, budget, most):
    """The level up to which each of T tiles takes words as candidates.

    The bound on a row's dropped mass, the sum of exp(-level / 8) over the words left out, holds for
    all rows at once and so is loose by a factor, the tightness, which differs little between tiles.

    Args:
        counts: (T, 256), words of each level.
        highest_entropy: (T,), the highest entropy of a row, in either stream.
        tightness: number or (T, 1), what rows are expected to drop over that bound.
        known: whether the tightness was seen. If it is only assumed, a tile for which it asks too
            many words tries the most that is worth trying.
        budget: share of a row's gradient that may be dropped.
        most: words beyond which a sparse backward is not worth it.

    Returns:
        (level, bound, worth), (T,) each: int64; float64, the bound at that level; whether the tile
        has no more than `most` words up to that level.
    """
    levels = torch.arange(LEVELS, dtype=torch.float64, device=counts.device)
    mass = counts * torch.exp(levels / -LEVELS_PER_NAT)
    beyond = (mass.flip(1).cumsum(1).flip(1) - mass).clamp_min(0)
    last = (counts.cumsum(1) <= most).sum(1) - 1
    # Beyond it log p < -entropy: p (log p + entropy) has one sign, and its sum is its size.
    first = (LEVELS_PER_NAT * highest_entropy).ceil().nan_to_num(LEVELS).clamp(max=LEVELS).long()
    level = torch.maximum(first, (beyond * tightness > budget / 2).sum(1))
    if not known:
        level = torch.where(last >= first, torch.minimum(level, last), level)
    bound = beyond.gather(1, level.clamp(max=LEVELS - 1)[:, None]).squeeze(1)
    return level, bound, level <= last


def learn_tightness(before, dropped, bound, enough):
    """The tightness after a tile whose rows dropped at most the share `dropped` under that bound.

    before: the tightness so far, None at first. enough: whether the candidates were; if they were
    not, the next level should be clearly lower.
    """
    if bound <= 0 or not math.isfinite(dropped):
        return before
    seen = max(dropped / bound, 1e-6)
    before = seen if before is None else before
    return math.sqrt(seen * before) if enough else 2 * max(seen, before)


# ---- What the other words hold


class StreamSums(NamedTuple):
    """One stream's sums over a tile's candidates, (R, 1) each; None where not needed."""

    mass: torch.Tensor | None = None  # p
    own: torch.Tensor | None = None  # p (log p + entropy)
    size: torch.Tensor | None = None  # |dz|


class CandidateSums(NamedTuple):
    """Sums over a tile's candidates, (R, 1) each or None.

    Those of `rows.RowStats` by the same name are over the whole vocabulary.
    """

    full: StreamSums
    aug: StreamSums = StreamSums()
    prob_gap: torch.Tensor | None = None
    log_ratio: torch.Tensor | None = None
    aug_log_ratio: torch.Tensor | None = None
    logit_gap: torch.Tensor | None = None
    aug_logit_gap: torch.Tensor | None = None
    kl_terms: torch.Tensor | None = None  # p (log p - log q) + (q - p)
    kl_reverse_terms: torch.Tensor | None = None  # q (log q - log p) - (q - p)
    net_size: torch.Tensor | None = None  # |dz + dz_aug|

    def sizes(self):
        """sum |dz| of both streams and of their sum."""
        return self.full.size, self.aug.size, self.net_size


def certified(wanted):
    """Which of both streams and their sum the certificate is about: positions in (0, 1, 2)."""
    return [i for i, asked in enumerate((wanted.full, wanted.aug, wanted.net)) if asked]


def typical_sizes(s, g, count):
    """Of both streams and their sum, the root mean square over rows of sum |dz|, about.

    It is computed from the statistics alone: exactly for a log-prob, and from below for an entropy,
    2 p_max (log p_max + H), and for the KLs.

    Args:
        s, g: RowStats and Upstream of all rows, (N,) each.
        count: number of rows that are not ignored; the others have statistics of 0.

    Returns:
        Three scalar tensors.
    """
    full, aug, net = _own_size(s.full, g.full), 0, 0
    if s.aug is not None:
        aug = _own_size(s.aug, g.aug)
        own, own_aug = full, aug
        for kl, up, sizes in (
            (s.kl_prcp, g.kl_prcp, _kl_sizes),
            (s.kl_reverse, g.kl_reverse, _kl_reverse_sizes),
        ):
            if up is not None:
                of_full, of_aug = sizes(s)
                net = net + up.abs() * kl.abs()
                full, aug = full + up.abs() * of_full, aug + up.abs() * of_aug
        net = net + own + own_aug
    return tuple(
        (
            torch.as_tensor(x, dtype=s.full.peak.dtype).nan_to_num(0, 0, 0).square().sum() / count
        ).sqrt()
        for x in (full, aug, net)
    )


def _own_size(s, g):
    """(N,) sum |dz| of one stream but for the KL's part; 0 where it has no upstream gradient."""
    size = 0
    if g.logprobs is not None:
        size = size - 2 * g.logprobs.abs() * torch.expm1(s.logprobs)
    if g.entropy is not None:
        top = (-s.log_sum).exp()
        size = size + 2 * g.entropy.abs() * top * (s.entropy - s.log_sum).clamp_min(0)
    return size


def _kl_sizes(s):
    """(N,) lower bounds on sum |p (log p - log q - KL)| and on sum |q - p|, or near to them."""
    if s.log_ratio is not None:
        return (s.log_ratio - s.kl_prcp).clamp_min(0), s.prob_gap
    size = (s.logit_gap - _normaliser_gap(s) - s.kl_prcp).clamp_min(0)
    return size, size.clamp_max(2)


def _kl_reverse_sizes(s):
    """(N,) as `_kl_sizes`: sum |p - q| and sum |q (log q - log p - KL)| of KL(q || p)."""
    if s.aug_log_ratio is not None:
        return s.prob_gap, (s.aug_log_ratio - s.kl_reverse).clamp_min(0)
    size = (s.aug_logit_gap - _normaliser_gap(s) - s.kl_reverse).clamp_min(0)
    return torch.minimum(size, _kl_sizes(s)[1]), size


def outside(sums, s, g, wanted):
    """Bounds on sum |dz| over the words that are not candidates.

    Whole-vocabulary sums less those of the candidates. All other words have log p < -H, so that the
    terms p (log p + H), which sum to 0 over all words, are negative there. To dz + dz_aug a KL
    adds its own non-negative terms, less p KL or q KL: of second order where q is close to p. Their
    rounding is the logits' times |log q - log p|.

    Args:
        sums: CandidateSums of a tile.
        s, g: RowStats and Upstream of the tile's rows, (R, 1) each.

    Returns:
        Three (R, 1): of both streams and of their sum; None where that is not wanted.
    """
    mass = None if sums.full.mass is None else _left(1, sums.full.mass)
    aug_mass = None if sums.aug.mass is None else _left(1, sums.aug.mass)
    own = own_aug = full = aug = net = None
    kl, reverse = (None if x is None else x.abs() for x in (g.kl_prcp, g.kl_reverse))
    if wanted.full:
        full = own = _own_outside(mass, sums.full, g.full)
        if kl is not None:
            full = full + kl * _log_ratio_outside(sums, s, mass)
        if reverse is not None:
            full = full + reverse * _prob_gap_outside(sums, s, mass, aug_mass)
    if wanted.aug:
        aug = own_aug = _own_outside(aug_mass, sums.aug, g.aug)
        if kl is not None:
            aug = aug + kl * _prob_gap_outside(sums, s, mass, aug_mass)
        if reverse is not None:
            aug = aug + reverse * _aug_log_ratio_outside(sums, s, aug_mass)
    if wanted.net:
        net = own + own_aug
        if kl is not None:
            net = net + kl * _terms_outside(s.kl_prcp, sums.kl_terms, mass)
        if reverse is not None:
            net = net + reverse * _terms_outside(s.kl_reverse, sums.kl_reverse_terms, aug_mass)
    return full, aug, net


def _left(whole, part):
    """(R, 1): what is left of a sum over the vocabulary beside the candidates' part."""
    return (whole - part - ROUNDING).clamp_min(0)


def _own_outside(mass, sums, g):
    """(R, 1) bound on one stream's sum |dz| but for the KL's part."""
    bound = torch.zeros_like(mass)
    if g.logprobs is not None:
        bound += g.logprobs.abs() * mass
    if g.entropy is not None:
        bound += g.entropy.abs() * _left(sums.own, 0)
    return bound


def _terms_outside(kl, terms, mass):
    """(R, 1) bound on what a KL adds to sum |dz + dz_aug|; mass: of the policy that it averages."""
    left = kl - terms - ROUNDING * (2 * kl.abs()).sqrt()
    return left.clamp_min(0) + kl.abs() * mass


def _log_ratio_outside(sums, s, mass):
    """(R, 1) bound on sum |p (log p - log q - KL(p || q))|."""
    if s.log_ratio is not None:
        return _left(s.log_ratio, sums.log_ratio) + s.kl_prcp.abs() * mass
    gap = _left(s.logit_gap, sums.logit_gap)
    return gap + (_normaliser_gap(s) + s.kl_prcp.abs()) * mass


def _aug_log_ratio_outside(sums, s, aug_mass):
    """(R, 1) bound on sum |q (log q - log p - KL(q || p))|."""
    if s.aug_log_ratio is not None:
        return _left(s.aug_log_ratio, sums.aug_log_ratio) + s.kl_reverse.abs() * aug_mass
    gap = _left(s.aug_logit_gap, sums.aug_logit_gap)
    return gap + (_normaliser_gap(s) + s.kl_reverse.abs()) * aug_mass


def _prob_gap_outside(sums, s, mass, aug_mass):
    """(R, 1) bound on sum |q - p|; it is <= p + q, and <= max(p, q) |log q - log p|."""
    if s.prob_gap is not None:
        return _left(s.prob_gap, sums.prob_gap)
    gap = _left(s.logit_gap, sums.logit_gap)
    aug_gap = _left(s.aug_logit_gap, sums.aug_logit_gap)
    both = mass + aug_mass
    return torch.minimum(both, gap + aug_gap + _normaliser_gap(s) * both)


def _normaliser_gap(s):
    """|lse - lse_aug|: |log p - log q| is at most this more than |z - z_aug|."""
    return ((s.full.peak - s.aug.peak) + (s.full.log_sum - s.aug.log_sum)).abs()
