"""The backward of the torch backend: few columns where few matter, all of them elsewhere."""

import torch
import torch.distributed as dist

from papo_kernels.columns import ROUNDING, LevelGuess, drop_least, record
from papo_kernels.row_math import (
    RowStats,
    Upstream,
    d_log_probs,
    d_logits_,
    in_place,
    log_probs,
    q_minus_p,
    slope,
)

# A tile that keeps more of the vocabulary than this gains nothing from gathering.
DENSE_SHARE = 1 / 2
# Candidates worth dropping: for fewer the second gather costs more than it saves.
WORTH_DROPPING = 0.1
# Shares add up to an error of about 0.7 of them (entropies, SmolLM2 states); the rest is reserve.
RESERVE = 0.8
# Candidate sets tried before a tile is done densely.
ATTEMPTS = 3


class Backward:
    """One backward pass: sparse tiles first, then the rows of all dense tiles together."""

    def __init__(self, operands, needs, upstream, rows, labels, head, shard):
        """operands: hidden, aug_hidden, weight, bias; needs: which of them want a gradient.

        upstream: five (N,) or None; rows: (4 or 11, N) from the forward; labels: (N,).
        """
        self.hidden, self.aug_hidden, self.weight, self.bias = operands
        needs_hidden, needs_aug, needs_weight, needs_bias = needs
        self.head, self.shard, self.labels = head, shard, labels
        two = self.aug_hidden is not None
        self.stats = RowStats(*rows[: 9 if two else 3])
        self.label_logprobs = rows[9 if two else 3 :]
        self.upstream = Upstream(*(None if g is None else g.to(head.dtype) for g in upstream))
        u, shared = self.upstream, needs_weight or needs_bias
        has_kl = u.kl_prcp is not None
        self.full = (needs_hidden or shared) and (
            has_kl or u.logprobs is not None or u.entropy is not None
        )
        self.aug = (needs_aug or shared) and (
            has_kl or u.aug_logprobs is not None or u.aug_entropy is not None
        )
        # Where q is close to p the KL's two gradients nearly cancel in the weight's, and what is
        # dropped must be small beside that.
        self.net = self.full and self.aug and has_kl and shared
        self.needs_z, self.needs_z_aug = self.full or has_kl, self.aug or has_kl
        # Shards of the vocabulary add up to these, and so they are rounded after that.
        wide = {} if shard.group is None else {"dtype": head.dtype}
        self.d_hidden = torch.zeros_like(self.hidden, **wide) if needs_hidden else None
        self.d_aug = torch.zeros_like(self.aug_hidden, **wide) if needs_aug else None
        # One rounding at the end: sums over rows in 16 bits diverge.
        self.d_weight = torch.zeros_like(self.weight, dtype=head.dtype) if needs_weight else None
        self.d_bias = torch.zeros_like(self.bias, dtype=head.dtype) if needs_bias else None

    def gradients(self):
        """d_hidden, d_aug_hidden, d_weight, d_bias in their operands' dtypes, or None."""
        grads = (self.d_hidden, self.d_aug, self.d_weight, self.d_bias)
        if self.shard.group is not None:
            for g in grads[:2]:
                if g is not None:
                    dist.all_reduce(g, group=self.shard.group)
        operands = (self.hidden, self.aug_hidden, self.weight, self.bias)
        return tuple(
            None if g is None else g.to(x.dtype) for g, x in zip(grads, operands, strict=True)
        )

    def run(self, tiles, levels, budget, dense_rows):
        """tiles: index objects, as in `levels`; dense_rows: most rows done densely at once."""
        if not (self.full or self.aug) or not len(tiles) or not len(self.weight):
            return
        dense = tiles
        if levels is not None:
            budget = RESERVE * budget
            sizes, guess = self._typical_sizes(tiles), LevelGuess()
            done = [
                self._sparse_tile(at, level, budget, sizes, guess)
                for at, level in zip(tiles, levels, strict=True)
            ]
            dense = [at for at, sparse in zip(tiles, done, strict=True) if not sparse]
        if dense:
            everything = torch.arange(len(self.labels), device=self.labels.device)
            for at in torch.cat([everything[t] for t in dense]).split(dense_rows):
                self._dense(at)

    def _typical_sizes(self, tiles):
        """For both streams and their sum, a scalar near the root mean square over rows of sum |dz|.

        The entropy's is a lower bound, 2 p_max (log p_max + H); the KL's is E|log p - log q| - KL.
        """
        s, u, label = self.stats, self.upstream, self.label_logprobs
        full = _log_prob_size(u.logprobs, label[0]) + _entropy_size(u.entropy, s.entropy, s.log_sum)
        aug = net = 0
        if self.aug_hidden is not None:
            aug = _log_prob_size(u.aug_logprobs, label[1])
            aug = aug + _entropy_size(u.aug_entropy, s.aug_entropy, s.aug_log_sum)
            if u.kl_prcp is not None:
                net = u.kl_prcp.abs() * s.kl.abs() + full + aug
                full = full + u.kl_prcp.abs() * (s.ratio - s.kl).clamp_min(0)
                aug = aug + u.kl_prcp.abs() * s.gap
        count = sum(len(self.labels[at]) for at in tiles)
        return tuple(
            (
                torch.as_tensor(x, dtype=self.head.dtype).nan_to_num(0, 0, 0).square().sum() / count
            ).sqrt()
            for x in (full, aug, net)
        )

    def _columns(self, at):
        """Row statistics and upstream gradients of some rows, (R, 1) each."""
        s = RowStats(*(None if x is None else x[at][:, None] for x in self.stats))
        g = Upstream(*(None if x is None else x[at][:, None] for x in self.upstream))
        return s, g

    def _sparse_tile(self, at, levels, budget, typical, guess):
        """Adds one tile's gradients and returns True, or returns False if it should be dense."""
        s, g = self._columns(at)
        if not any(x is not None and x.any() for x in g):
            record(len(self.labels[at]), 0, len(levels), 0.0)
            return True
        entropies = [x.max() for x in (s.entropy, s.aug_entropy) if x is not None]
        highest = float(max(entropies))
        if highest != highest:
            return False
        most = DENSE_SHARE * len(levels)
        for _ in range(ATTEMPTS):
            found = guess.level(levels, budget, highest, most)
            if found is None:
                return False
            level, bound = found
            share, done = self._try_columns(at, levels <= level, s, g, budget, typical)
            guess.learn(share, bound)
            if done:
                return True
        return False

    def _try_columns(self, at, mask, s, g, budget, typical):
        """(largest share of a row's gradient outside `mask`, whether the tile is done with it)."""
        valid, _, labels = self.shard.place(self.labels[at], len(mask))
        mask[labels] = True
        cols = mask.nonzero().squeeze(1)
        z, z_aug = self._gathered_logits(at, cols)
        log_p = p = log_q = q = None
        if z is not None:
            log_p = log_probs(z, s.peak, s.log_sum)
            p = log_p.exp()
        if z_aug is not None:
            log_q = log_probs(z_aug, s.aug_peak, s.aug_log_sum)
            q = log_q.exp()
        dz = d_log_probs(log_p, p, log_q, q, s, g, self.full, self.aug)
        place = torch.searchsorted(cols, labels)[:, None]
        for x, plus in zip(dz, (g.logprobs, g.aug_logprobs), strict=True):
            if x is not None and plus is not None:
                x.scatter_add_(1, place, torch.where(valid[:, None], plus, torch.nan))
        own, kl = self._outside_full(log_p, p, log_q, s, g) if self.full else (0, 0)
        own_aug, kl_aug = self._outside_aug(log_q, q, p, s, g) if self.aug else (0, 0)
        grads, outside = (dz[0], dz[1], None), (own + kl, own_aug + kl_aug, 0)
        if self.net:
            grads = (*dz, dz[0] + dz[1])
            kl = g.kl_prcp.abs() * self._outside_kl(log_p, p, log_q, q, s)
            outside = (*outside[:2], own + own_aug + kl)
        streams = [i for i in range(3) if grads[i] is not None]
        sizes = [grads[i].abs() for i in streams]
        wholes = [
            x.sum(1, keepdim=True).clamp_min(typical[i])
            for i, x in zip(streams, sizes, strict=True)
        ]
        beyond = [outside[i] for i in streams]
        lost = max(float((b / w).nan_to_num(0).max()) for b, w in zip(beyond, wholes, strict=True))
        allowances = [budget * w - b for w, b in zip(wholes, beyond, strict=True)]
        if not all((a >= 0).all() for a in allowances):
            return lost, False
        keep, dropped = drop_least(sizes, allowances)
        if len(cols) - len(keep) > WORTH_DROPPING * len(cols):
            cols = cols[keep]
            dz = [None if x is None else x[:, keep] for x in dz]
            z, z_aug = (None if x is None else x[:, keep] for x in (z, z_aug))
            beyond = [b + d for b, d in zip(beyond, dropped, strict=True)]
        share = max(float((b / w).nan_to_num(0).max()) for b, w in zip(beyond, wholes, strict=True))
        record(len(labels), len(cols), len(mask), share)
        head = self.head
        for i, logits in ((0, z), (1, z_aug)):
            if dz[i] is not None:
                dz[i].mul_(slope(logits, head.temperature, head.softcap))
        self._add_columns(at, dz, cols)
        return lost, True

    @staticmethod
    def _outside_full(log_p, p, log_q, s, g):
        """(R, 1) bounds on sum |dz| over the columns that are not candidates: own part, KL's part.

        Whole-vocabulary sums less those of the candidates. All other columns have log p < -H, so
        that the terms p (log p + H), which sum to 0 over all columns, are negative there.
        """
        mass = _left(1, p)
        own, kl = torch.zeros_like(mass), 0
        if g.logprobs is not None:
            own += g.logprobs.abs() * mass
        if g.entropy is not None:
            own += g.entropy.abs() * _left(0, -p * (log_p + s.entropy))
        if g.kl_prcp is not None:
            ratio = _left(s.ratio, p * (log_q - log_p).abs())
            kl = g.kl_prcp.abs() * (ratio + s.kl.abs() * mass)
        return own, kl

    @staticmethod
    def _outside_aug(log_q, q, p, s, g):
        own, kl = torch.zeros_like(s.aug_entropy), 0
        if g.aug_logprobs is not None:
            own += g.aug_logprobs.abs() * _left(1, q)
        if g.aug_entropy is not None:
            own += g.aug_entropy.abs() * _left(0, -q * (log_q + s.aug_entropy))
        if g.kl_prcp is not None:
            kl = g.kl_prcp.abs() * _left(s.gap, (q - p).abs())
        return own, kl

    @staticmethod
    def _outside_kl(log_p, p, log_q, q, s):
        """(R, 1) bound, per unit of upstream, on what the KL adds to dz + dz_aug outside.

        That is p (log p - log q) + q - p, the KL's own non-negative terms, less p KL: of second
        order where q is close to p. Its rounding is the logits' times |log q - log p|.
        """
        log_ratio = log_q - log_p
        terms = q_minus_p(p, q, log_ratio) - p * log_ratio
        left = s.kl - terms.sum(1, keepdim=True) - ROUNDING * (2 * s.kl.abs()).sqrt()
        return left.clamp_min(0) + s.kl.abs() * _left(1, p)

    def _dense(self, at):
        s, g = self._columns(at)
        head, labels = self.head, self.labels[at]
        z = z_aug = None
        if self.needs_z:
            z = head.logits(self.hidden[at], self.weight, self.bias)
        if self.needs_z_aug:
            z_aug = head.logits(self.aug_hidden[at], self.weight, self.bias)
        valid, owned, place = (x[:, None] for x in self.shard.place(labels, len(self.weight)))
        streams = ((z, g.logprobs, self.full), (z_aug, g.aug_logprobs, self.aug))
        plus = [
            torch.where(valid, up * owned, torch.nan)
            * slope(x.gather(1, place), head.temperature, head.softcap)
            if wanted and up is not None
            else None
            for x, up, wanted in streams
        ]
        options = (self.full, self.aug, head.temperature, head.softcap)
        in_place(d_logits_, z, z_aug, s, g, *options)
        for x, p in zip((z, z_aug), plus, strict=True):
            if p is not None:
                x.scatter_add_(1, place, p)
        record(len(labels), len(self.weight), len(self.weight), None)
        self._add_all(at, (z if self.full else None, z_aug if self.aug else None))

    def _gathered_logits(self, at, cols):
        """(R, K) logits of the two streams on some columns; None for a stream not needed."""
        head = self.head
        needed = (self.needs_z, self.needs_z_aug)
        states = zip((self.hidden, self.aug_hidden), needed, strict=True)
        # one product for both streams: a tile alone is too thin to keep the arithmetic busy
        x = torch.cat([h[at] for h, wanted in states if wanted])
        z = head.empty(x, len(cols))
        for block, weight in head.blocks(self.weight, cols, self.weight.dtype):
            head.multiply(x, weight, z[:, block])
        head.finish(z, None if self.bias is None else self.bias[cols])
        parts = iter(z.split(len(self.labels[at])))
        return [next(parts) if wanted else None for wanted in needed]

    def _streams(self, at, dz):
        """(gradient of the logits, states, gradient of the states) where there is the first."""
        states = ((dz[0], self.hidden, self.d_hidden), (dz[1], self.aug_hidden, self.d_aug))
        return [(g, x[at].to(self.head.dtype), d) for g, x, d in states if g is not None]

    def _add_columns(self, at, dz, cols):
        """Adds gradients dz (R, K), one per stream or None, of rows `at` and columns `cols`."""
        streams = self._streams(at, dz)
        grads, states = torch.cat([g for g, _, _ in streams]), torch.cat([x for _, x, _ in streams])
        total = torch.zeros_like(states)
        asked = any(d is not None for _, _, d in streams)
        for block, weight in self.head.blocks(self.weight, cols):
            if asked:
                total.addmm_(grads[:, block], weight)
            if self.d_weight is not None:
                self.d_weight.index_add_(0, cols[block], grads[:, block].T @ states)
        parts = total.split(len(self.labels[at]))
        for (_, _, d_states), part in zip(streams, parts, strict=True):
            if d_states is not None:
                d_states[at] = part.to(d_states.dtype)
        if self.d_bias is not None:
            self.d_bias.index_add_(0, cols, grads.sum(0))

    def _add_all(self, at, dz):
        """Adds gradients dz (R, V), one per stream or None, of rows `at`."""
        for grad, x, d_states in self._streams(at, dz):
            if d_states is not None:
                total = torch.zeros_like(x)
                for block, weight in self.head.blocks(self.weight):
                    total.addmm_(grad[:, block], weight)
                d_states[at] = total.to(d_states.dtype)
            if self.d_weight is not None:
                self.d_weight.addmm_(grad.T, x)
            if self.d_bias is not None:
                self.d_bias += grad.sum(0)


def _left(whole, terms):
    """(R, 1): what is left of a sum over the vocabulary beside the candidates' (R, K) terms."""
    return (whole - terms.sum(1, keepdim=True) - ROUNDING).clamp_min(0)


def _log_prob_size(upstream, label_logprob):
    return 0 if upstream is None else -2 * upstream.abs() * torch.expm1(label_logprob)


def _entropy_size(upstream, entropy, log_sum):
    if upstream is None:
        return 0
    return 2 * upstream.abs() * (-log_sum).exp() * (entropy - log_sum).clamp_min(0)
