"""Gradients of the rows of a tile on picked columns of the vocabulary, by torch's operators."""

from typing import NamedTuple

import torch

from papo_kernels.columns import drop_least
from papo_kernels.row_math import d_log_probs, log_probs, q_minus_p, slope

# Candidates worth dropping: for fewer the second gather costs more than it saves.
WORTH_DROPPING = 0.1


class Sums(NamedTuple):
    """Sums over picked columns, (R, 1) each or None; `own` is of p (log p + entropy)."""

    mass: torch.Tensor | None = None
    own: torch.Tensor | None = None
    size: torch.Tensor | None = None  # |dz|
    aug_mass: torch.Tensor | None = None
    aug_own: torch.Tensor | None = None
    aug_size: torch.Tensor | None = None
    gap: torch.Tensor | None = None  # |q - p|
    ratio: torch.Tensor | None = None  # p |log q - log p|
    kl: torch.Tensor | None = None  # p (log p - log q) + (q - p)
    net_size: torch.Tensor | None = None  # |dz + dz_aug|


class Tile:
    """States of some rows, and their gradients on the columns of the latest `differentiate`.

    One product serves both streams: a tile alone is too thin to keep the arithmetic busy.
    """

    # Most tiles whose logits are computed in one call; most elements of those, and of finished
    # tiles' gradients that wait for those of others.
    together, most_waiting = 1, 0
    # Whether `add_gradients` can round the weight's gradient itself.
    rounds_weight = False

    def __init__(self, states, weight, bias, head, full, aug, states_too):
        """states: (R, D) of both streams, None where logits are not needed; full, aug: whose
        gradients are; states_too: whether the states' are, beside the weight's."""
        self.present = [x is not None for x in states]
        self.rows = torch.cat([x for x in states if x is not None])
        self.count = len(self.rows) // sum(self.present)
        self.weight, self.bias, self.head = weight, bias, head
        self.full, self.aug, self.states_too = full, aug, states_too
        self.cols = self.z = self.grads = None

    @staticmethod
    def logits(tiles, cols):
        """What `differentiate` takes, of each tile on its own (K,) columns."""
        return [t._logits(c) for t, c in zip(tiles, cols, strict=True)]

    def differentiate(self, cols, logits, place, valid, s, g):
        """Sums over the columns `cols` (K,), where labels stand at `place` (R,) among them.

        s, g: RowStats and Upstream of (R, 1). valid: (R,) labels that are in the vocabulary.
        """
        self.cols = cols
        z, z_aug = self.z = logits
        log_p = p = log_q = q = None
        sums = {}
        if z is not None:
            log_p = log_probs(z, s.peak, s.log_sum)
            p = log_p.exp()
            sums |= {"mass": p, "own": p * (log_p + s.entropy)}
        if z_aug is not None:
            log_q = log_probs(z_aug, s.aug_peak, s.aug_log_sum)
            q = log_q.exp()
            sums |= {"aug_mass": q, "aug_own": q * (log_q + s.aug_entropy)}
        if g.kl_prcp is not None:
            x = log_q - log_p
            gap = q_minus_p(p, q, x)
            sums |= {"gap": gap.abs(), "ratio": p * x.abs(), "kl": gap - p * x}
        dz, dz_aug = self.grads = d_log_probs(log_p, p, log_q, q, s, g, self.full, self.aug)
        for x, plus in ((dz, g.logprobs), (dz_aug, g.aug_logprobs)):
            if x is not None and plus is not None:
                x.scatter_add_(1, place[:, None], torch.where(valid[:, None], plus, torch.nan))
        if dz is not None:
            sums["size"] = dz.abs()
        if dz_aug is not None:
            sums["aug_size"] = dz_aug.abs()
        if dz is not None and dz_aug is not None:
            sums["net_size"] = (dz + dz_aug).abs()
        return Sums(**{name: x.sum(1, keepdim=True) for name, x in sums.items()})

    def _logits(self, cols):
        """(R, K) logits of the two streams; None for a stream not present."""
        z = self.head.empty(self.rows, len(cols))
        for block, weight in self.head.blocks(self.weight, cols, self.weight.dtype):
            self.head.multiply(self.rows, weight, z[:, block])
        self.head.finish(z, None if self.bias is None else self.bias[cols])
        parts = iter(z.split(self.count))
        return [next(parts) if present else None for present in self.present]

    def drop_least(self, allowances):
        """Drops the columns that matter least; what it dropped, as `allowances`.

        allowances: (R, 1) sum of |dz| that rows may drop in each stream and in the streams' sum,
        None where that is not asked.
        """
        dz, dz_aug = self.grads
        kinds = [i for i, a in enumerate(allowances) if a is not None]
        sizes = [(dz, dz_aug, dz + dz_aug if i == 2 else None)[i].abs() for i in kinds]
        keep, dropped = drop_least(sizes, [allowances[i] for i in kinds])
        if len(self.cols) - len(keep) <= WORTH_DROPPING * len(self.cols):
            return [0, 0, 0]
        self.cols = self.cols[keep]
        self.grads = [None if x is None else x[:, keep] for x in self.grads]
        if self.head.softcap is not None:  # else slopes are all the same
            self.z = [None if x is None else x[:, keep] for x in self.z]
        found = dict(zip(kinds, dropped, strict=True))
        return [found.get(i, 0) for i in range(3)]

    def finish(self):
        """From gradients of the logits to those of x @ weight.T + bias."""
        for grad, z in zip(self.grads, self.z, strict=True):
            if grad is not None:
                grad.mul_(slope(z, self.head.temperature, self.head.softcap))
        self.z = None

    @staticmethod
    def add_gradients(tiles, d_weight, d_bias, dtype):
        """Adds those of finished tiles to (V, D) `d_weight` and (V,) `d_bias`, where given.

        Returns of each tile the gradients of its states, (R, D) of both streams, None where there
        is none; in `dtype` or, here, in the logits'. A tile is done with after it.
        """
        return [t._add(d_weight, d_bias) for t in tiles]

    def _add(self, d_weight, d_bias):
        none = self.head.empty(self.rows[: self.count], len(self.cols)).zero_()
        pairs = zip(self.grads, self.present, strict=True)
        grads = torch.cat([none if g is None else g for g, present in pairs if present])
        states = self.rows.to(self.head.dtype)
        total = torch.zeros_like(states) if self.states_too else None
        for block, weight in self.head.blocks(self.weight, self.cols):
            if total is not None:
                total.addmm_(grads[:, block], weight)
            if d_weight is not None:
                d_weight.index_add_(0, self.cols[block], grads[:, block].T @ states)
        if d_bias is not None:
            d_bias.index_add_(0, self.cols, grads.sum(0))
        parts = iter(total.split(self.count) if total is not None else (None, None))
        return [next(parts) if present else None for present in self.present]
