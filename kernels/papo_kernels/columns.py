"""Which columns of the vocabulary a tile's backward keeps, and the certificate of what it drops.

The forward stores, per tile of rows and column, an upper bound on that column's probability over
the tile's rows and both streams, as a byte: level l for p, q <= exp(-l / 8) throughout.
The backward takes the columns up to a level, computes their gradients exactly, knows what all the
other columns hold by subtraction from totals that the forward summed, and then drops the least of
what it has, while every row stays within its budget.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from papo_kernels import cpu_kernels

TILE_ROWS = 16
LEVELS_PER_NAT = 8
# A sum over the vocabulary and its recomputation differ by rounding, which is no dropped gradient.
ROUNDING = 4e-6

_recorders = []


@dataclass
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


def record(rows, kept, vocab, share):
    """share: largest dropped share of these rows, or None where they were done densely."""
    for c in _recorders:
        c.rows += rows
        c.columns_kept += rows * kept
        c.columns_all += rows * vocab
        if share is None:
            c.dense_rows += rows
        else:
            c.shares.append(share)


def find_levels(logits, order, normalisers, elements, tile):
    """Levels (ceil(R / tile), V) uint8 of one or two (R, V) `logits`; 0 where a row holds NaN.

    order: (R,) rows in the order in which tiles are cut. normalisers: peak and log_sum of each
    stream, (R, 1) each. elements: as for `row_statistics`.
    """
    if cpu_kernels.usable(elements, *logits):
        return cpu_kernels.levels(logits, order, normalisers, tile, LEVELS_PER_NAT)
    highest = highest_of_two if len(logits) == 2 else highest_of_one
    return torch.stack([highest(rows, *logits, *normalisers) for rows in order.split(tile)])


def highest_of_one(order, z, peak, log_sum):
    """(R, V) logits and the positions of a tile's rows to (V,) levels."""
    return _level(((z[order] - peak[order]) - log_sum[order]).amax(0))


def highest_of_two(order, z, z_aug, peak, log_sum, aug_peak, aug_log_sum):
    log_p = (z[order] - peak[order]) - log_sum[order]
    log_q = (z_aug[order] - aug_peak[order]) - aug_log_sum[order]
    return _level(torch.maximum(log_p, log_q).amax(0))


def _level(highest):
    level = (highest * -LEVELS_PER_NAT).clamp(0, 255)
    return torch.where(level.isnan(), 0, level).to(torch.uint8)


class LevelGuess:
    """Learns over the tiles of one backward how far below its bound the dropped gradient lies.

    The bound on a row's dropped mass, the sum of exp(-level / 8) over columns left out, holds for
    all rows at once and so is loose by a factor that differs little from tile to tile.
    """

    def __init__(self):
        self.tightness = None

    def level(self, levels, budget, highest_entropy, most):
        """(level to try, its bound), or None where more than `most` columns would be needed."""
        counts = torch.bincount(levels, minlength=256).double()
        bound = counts * torch.exp(torch.arange(256.0, dtype=torch.float64) / -LEVELS_PER_NAT)
        beyond = (bound.flip(0).cumsum(0).flip(0) - bound).clamp_min(0)
        last = int((counts.cumsum(0) <= most).sum()) - 1
        # Beyond it log p < -entropy: p (log p + entropy) has one sign, and its sum is its size.
        first = math.ceil(LEVELS_PER_NAT * highest_entropy)
        tightness = self.tightness or 1 / 16
        level = max(first, int((beyond * tightness > budget / 2).sum()))
        if level > last and (self.tightness is not None or last < first):
            return None
        level = min(level, last)
        return level, float(beyond[level])

    def learn(self, dropped, bound, enough):
        """dropped: largest share of a row's gradient outside the candidates of this bound.

        enough: whether these candidates were; if not, the next level should be clearly lower.
        """
        if bound > 0 and math.isfinite(dropped):
            seen = max(dropped / bound, 1e-6)
            before = seen if self.tightness is None else self.tightness
            self.tightness = math.sqrt(seen * before) if enough else 2 * max(seen, before)


def drop_least(sizes, allowances):
    """Columns of candidates to keep.

    Args:
        sizes: per stream, (R, K) |dz| of the candidates.
        allowances: per stream, (R, 1) sum |dz| that a row may still drop, >= 0.

    Returns:
        (keep, dropped): sorted (K',) int64 positions, and per stream the (R, 1) sums dropped.
    """
    need = None
    for size, allowance in zip(sizes, allowances, strict=True):
        worst = (size / allowance.clamp_min(1e-38)).amax(0)
        need = worst if need is None else torch.maximum(need, worst)
    order = need.argsort()
    sums = [size[:, order].cumsum(1) for size in sizes]
    fits = [(c <= a).all(0) for c, a in zip(sums, allowances, strict=True)]
    count = int(torch.stack(fits).all(0).sum())
    dropped = [c[:, count - 1 : count] if count else torch.zeros_like(c[:, :1]) for c in sums]
    return order[count:].sort().values, dropped
