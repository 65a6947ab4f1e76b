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
# A sum over the vocabulary and its recomputation differ by rounding, of about this size where the
# sum is of probabilities. It counts as if it were gradient that is left out.
ROUNDING = 4e-6
# The levels' bounds are on probabilities that were rounded too.
LEVEL_SLACK = 1.001

# ---- What was dropped, for those who ask

_recorders = []


@dataclass(eq=False)  # one that is empty is not another empty one
class Certificate:
    """What the backward passes inside one `record_certificates()` left out.

    kept: columns kept, over those of a dense backward, in [0, 1]; dense_rows: rows done densely;
    largest_share: the largest sum |dz| that a row dropped in a stream, over what it is a share of:
    see `token_stats(budget_of=...)`. Never above the call's `grad_budget`.
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


class Beyond(NamedTuple):
    """What the levels say about the words that are no candidates, of every row and stream.

    Numbers, or (T, 1) tensors for the rows of T tiles. Unlike a sum less the candidates' part, they
    are as exact relative to their own size as any float.
    """

    mass: float | torch.Tensor  # a bound on sum p
    information: float | torch.Tensor  # a bound on sum p |log p|


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
        (level, beyond, worth), of (T,) tensors: int64; Beyond of float64; whether the tile has no
        more than `most` words up to that level.
    """
    levels = torch.arange(LEVELS, dtype=torch.float64, device=counts.device)
    mass = counts * torch.exp(levels / -LEVELS_PER_NAT)
    # p |log p| is largest at p = 1 / e, and so is its bound for the levels before that.
    information = mass * (levels / LEVELS_PER_NAT).clamp_min(1)
    beyond, information = (_after(x) for x in (mass, information))
    last = (counts.cumsum(1) <= most).sum(1) - 1
    # Beyond it log p < -entropy: p (log p + entropy) has one sign, and its sum is its size.
    first = (LEVELS_PER_NAT * highest_entropy).ceil().nan_to_num(LEVELS).clamp(max=LEVELS).long()
    level = torch.maximum(first, (beyond * tightness > budget / 2).sum(1))
    if not known:
        level = torch.where(last >= first, torch.minimum(level, last), level)
    at = level.clamp(max=LEVELS - 1)[:, None]
    found = (LEVEL_SLACK * x.gather(1, at).squeeze(1) for x in (beyond, information))
    return level, Beyond(*found), level <= last


def beyond_lists(counts, least_log_prob):
    """Beyond, of (T,) tensors, for words that are less likely than exp(`least_log_prob`).

    counts: (T, 256), words of each level. least_log_prob: below -1.
    """
    levels = torch.arange(LEVELS, dtype=torch.float64, device=counts.device)
    log_p = (levels / -LEVELS_PER_NAT).clamp_max(least_log_prob)
    mass = LEVEL_SLACK * counts * log_p.exp()
    return Beyond(mass.sum(1), -(mass * log_p).sum(1))


def _after(x):
    """(T, 256): what (T, 256) `x` adds up to from the next level on, without cancellation."""
    if x.device.type == "cuda":  # whose cumsum has no deterministic form for floats
        return x @ torch.ones(LEVELS, LEVELS, dtype=x.dtype, device=x.device).tril(-1)
    shifted = torch.nn.functional.pad(x[:, 1:], (0, 1))
    return shifted.flip(1).cumsum(1).flip(1)


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


def outside(sums, s, g, wanted, beyond, head):
    """Bounds on sum |dz| of the words that are not candidates, at states @ weight.T + bias.

    Whole-vocabulary sums less those of the candidates, and rounding; or what the levels say, where
    that is less. All other words have log p < -H, so that the terms p (log p + H), which sum to 0
    over all words, are negative there. To dz + dz_aug a KL adds its own non-negative terms, less
    p KL or q KL: of second order where q is close to p.

    Args:
        sums: CandidateSums of a tile.
        s, g: RowStats and Upstream of the tile's rows, (R, 1) each.
        beyond: Beyond.
        head: rows.Head, whose slope is 1 / temperature at most.

    Returns:
        Three (R, 1): of both streams and of their sum; None where that is not wanted.
    """
    mass = None if sums.full.mass is None else _least(_left(1, sums.full.mass), beyond.mass)
    aug_mass = None if sums.aug.mass is None else _least(_left(1, sums.aug.mass), beyond.mass)
    own = own_aug = full = aug = net = None
    kl, reverse = (None if x is None else x.abs() for x in (g.kl_prcp, g.kl_reverse))
    if kl is not None:
        terms = _terms_outside(s.kl_prcp, sums.kl_terms)
    if reverse is not None:
        aug_terms = _terms_outside(s.kl_reverse, sums.kl_reverse_terms)
        if aug_mass is None:
            aug_mass = torch.zeros_like(mass) + beyond.mass
    if wanted.full:
        full = own = _own_outside(mass, sums.full, s.full, g.full, beyond)
        if kl is not None:
            ratio = _log_ratio_outside(
                s.log_ratio, sums.log_ratio, s.logit_gap, sums.logit_gap, s, mass
            )
            full = full + kl * (_least(ratio, _by_terms(terms, mass)) + s.kl_prcp.abs() * mass)
        if reverse is not None:
            full = full + reverse * _prob_gap_outside(sums, s, mass, aug_mass, beyond)
    if wanted.aug:
        aug = own_aug = _own_outside(aug_mass, sums.aug, s.aug, g.aug, beyond)
        if kl is not None:
            aug = aug + kl * _prob_gap_outside(sums, s, mass, aug_mass, beyond)
        if reverse is not None:
            ratio = _log_ratio_outside(
                s.aug_log_ratio, sums.aug_log_ratio, s.aug_logit_gap, sums.aug_logit_gap, s,
                aug_mass,
            )  # fmt: skip
            ratio = _least(ratio, _by_terms(aug_terms, aug_mass))
            aug = aug + reverse * (ratio + s.kl_reverse.abs() * aug_mass)
    if wanted.net:
        net = own + own_aug
        if kl is not None:
            net = net + kl * (terms + s.kl_prcp.abs() * mass)
        if reverse is not None:
            net = net + reverse * (aug_terms + s.kl_reverse.abs() * aug_mass)
    return tuple(None if x is None else x / head.temperature for x in (full, aug, net))


def _least(x, y):
    """The smaller of a tensor and of another or a number; NaN where the tensor is NaN."""
    return x.clamp_max(y) if isinstance(y, float) else torch.minimum(x, y.to(x.dtype))


def _left(whole, part):
    """(R, 1): what is left of a sum over the vocabulary beside the candidates' part, at most."""
    return (whole - part).clamp_min(0) + ROUNDING * (1 + whole)


def _own_outside(mass, sums, s, g, beyond):
    """(R, 1) bound on one stream's sum |dz| but for the KL's part."""
    bound = torch.zeros_like(mass)
    if g.logprobs is not None:
        bound += g.logprobs.abs() * mass
    if g.entropy is not None:
        own = sums.own.clamp_min(0) + ROUNDING * (1 + s.entropy)
        bound += g.entropy.abs() * _least(own, beyond.information)
    return bound


def _terms_outside(kl, terms):
    """(R, 1) bound on a KL's non-negative terms; their rounding is the logits' times the ratio."""
    return (kl - terms).clamp_min(0) + ROUNDING * (2 * kl.abs()).sqrt() + ROUNDING * kl.abs()


def _by_terms(terms, mass):
    """(R, 1) bound on sum p |x| by that on sum p (e^x - 1 - x), where x = log q - log p.

    The latter is at least p x^2 / 3 for x > -1 and p |x| / e for the others. The former is then at
    most sqrt(3 terms mass), by Cauchy and Schwarz.
    """
    return (3 * terms * mass).sqrt() + math.e * terms


def _log_ratio_outside(ratio, sums, logit_gap, logit_sums, s, mass):
    """(R, 1) bound on sum p |log p - log q|; mass: of the policy that the KL averages over."""
    if ratio is not None:
        return _left(ratio, sums)
    return _left(logit_gap, logit_sums) + normaliser_gap(s) * mass


def _prob_gap_outside(sums, s, mass, aug_mass, beyond):
    """(R, 1) bound on sum |q - p|; it is <= p + q, and <= max(p, q) |log q - log p|."""
    both = _least(mass + aug_mass, beyond.mass)
    if s.prob_gap is not None:
        return _least(_left(s.prob_gap, sums.prob_gap), both)
    gap = _left(s.logit_gap, sums.logit_gap) + _left(s.aug_logit_gap, sums.aug_logit_gap)
    return _least(gap + normaliser_gap(s) * both, both)


def normaliser_gap(s):
    """|lse - lse_aug|: |log p - log q| is at most this more than |z - z_aug|."""
    return ((s.full.peak - s.aug.peak) + (s.full.log_sum - s.aug.log_sum)).abs()
