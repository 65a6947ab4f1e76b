"""The backward of the torch backend: few columns where few matter, all of them elsewhere."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from papo_kernels import cpu_kernels
from papo_kernels.columns import ROUNDING, LevelGuess, record
from papo_kernels.cpu_tile import CppTile
from papo_kernels.row_math import RowStats, Upstream, d_logits_, in_place, slope
from papo_kernels.tiles import Tile

# A tile that keeps more of the vocabulary than this gains nothing from gathering; nor from reading
# rows of the weight in place, as the C++ does, where it keeps more than the second.
DENSE_SHARE, CPP_DENSE_SHARE = 1 / 2, 0.85
# Shares add up to errors of .5 to 1.7 of them (aug_entropy alone, SmolLM2 at 1.3 nats), and 4e-3 is
# promised at a budget of 3e-3.
RESERVE = 0.65
# Candidate sets tried before a tile is done densely.
ATTEMPTS = 3


@dataclass
class _Try:
    """A tile and the candidates it is tried with."""

    at: object
    levels: torch.Tensor
    s: RowStats
    g: Upstream
    highest: float
    tile: object
    level: tuple | None = None
    cols: torch.Tensor | None = None
    place: torch.Tensor | None = None
    valid: torch.Tensor | None = None


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
        self._needs_weight, self.d_weight = needs_weight, None
        self.d_bias = torch.zeros_like(self.bias, dtype=head.dtype) if needs_bias else None
        self._waiting = []
        logits = len(self.labels) * len(self.weight)
        self._cpp = head.dtype == torch.float32 and cpu_kernels.usable(
            logits, self.hidden, self.aug_hidden, self.weight
        )
        if self._cpp and self.weight.stride(1) != 1:
            self.weight = self.weight.contiguous()
        self._tiles = CppTile if self._cpp else Tile
        self._most_waiting = self._tiles.most_waiting
        # 16-bit weights: where all tiles are sparse and can wait for the last, their gradients' sum
        # is rounded at once, and no float32 copy of the weight's gradient is ever made.
        self._may_round = self._tiles.rounds_weight and self.weight.dtype != head.dtype
        if self._may_round:
            self._most_waiting = max(self._most_waiting, self.weight.numel() // 4)

    def _sum_of_weight(self):
        """Where the weight's gradient is summed; None where it is not asked for."""
        # One rounding at the end: sums over rows in 16 bits diverge.
        if self._needs_weight and self.d_weight is None:
            self.d_weight = torch.zeros_like(self.weight, dtype=self.head.dtype)
        return self.d_weight

    def gradients(self):
        """d_hidden, d_aug_hidden, d_weight, d_bias in their operands' dtypes, or None."""
        grads = (self.d_hidden, self.d_aug, self._sum_of_weight(), self.d_bias)
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
            dense, first = [], 0
            while first < len(tiles):
                # the first one alone: the others learn from it
                end = first + self._tiles.together if first else 1
                some = zip(tiles[first:end], levels[first:end], strict=True)
                dense += self._sparse_tiles(some, budget, sizes, guess)
                first = end
            if self._may_round and self._needs_weight and not dense and self.d_weight is None:
                self.d_weight = torch.zeros_like(self.weight)
            self._add_waiting()
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

    def _sparse_tiles(self, tiles, budget, typical, guess):
        """Adds the gradients of some (rows, levels); returns rows that should be done densely."""
        tries, dense = [], []
        for at, levels in tiles:
            s, g = self._columns(at)
            if not any(x is not None and x.any() for x in g):
                record(len(self.labels[at]), 0, len(levels), 0.0)
                continue
            entropies = [x.max() for x in (s.entropy, s.aug_entropy) if x is not None]
            highest = float(max(entropies))
            if highest != highest:
                dense.append(at)
                continue
            tries.append(_Try(at, levels, s, g, highest, self._tile(at)))
        share = CPP_DENSE_SHARE if self._cpp else DENSE_SHARE
        for _ in range(ATTEMPTS):
            for t in tries:
                t.level = guess.level(t.levels, budget, t.highest, share * len(t.levels))
            dense += [t.at for t in tries if t.level is None]
            tries = [t for t in tries if t.level is not None]
            if not tries:
                break
            for t in tries:
                self._choose_columns(t)
            left = []
            for some in self._that_fit(tries):
                logits = self._tiles.logits([t.tile for t in some], [t.cols for t in some])
                for t, z in zip(some, logits, strict=True):
                    lost, done = self._try_columns(t, z, budget, typical)
                    guess.learn(lost, t.level[1], done)
                    if not done:
                        left.append(t)
            tries = left
        return dense + [t.at for t in tries]

    def _that_fit(self, tries):
        """`tries` in parts, of one tile or of no more logits than gradients may wait."""
        part, size = [], 0
        for t in tries:
            more = len(t.cols) * len(t.tile.rows)
            if part and size + more > self._tiles.most_waiting:
                yield part
                part, size = [], 0
            part.append(t)
            size += more
        yield part

    def _choose_columns(self, t):
        """Candidates of a tile: all up to a level, and its labels."""
        mask = t.levels <= t.level[0]
        t.valid, _, labels = self.shard.place(self.labels[t.at], len(mask))
        mask[labels] = True
        t.cols = mask.nonzero().squeeze(1)
        t.place = torch.searchsorted(t.cols, labels)

    def _try_columns(self, t, logits, budget, typical):
        """(largest share of a row's gradient that no candidate has, whether these are enough)."""
        s, g, tile = t.s, t.g, t.tile
        sums = tile.differentiate(t.cols, logits, t.place, t.valid, s, g)
        streams = [i for i, wanted in enumerate((self.full, self.aug, self.net)) if wanted]
        sizes, outside = (sums.size, sums.aug_size, sums.net_size), self._outside(sums, s, g)
        wholes = [sizes[i].clamp_min(typical[i]) for i in streams]
        beyond = [outside[i] for i in streams]
        lost = _largest_share(beyond, wholes)
        allowances = [budget * w - b for w, b in zip(wholes, beyond, strict=True)]
        if not all((a >= 0).all() for a in allowances):
            return lost, False
        room = dict(zip(streams, allowances, strict=True))
        dropped = tile.drop_least([room.get(i) for i in range(3)])
        beyond = [b + dropped[i] for i, b in zip(streams, beyond, strict=True)]
        record(len(t.place), len(tile.cols), len(t.levels), _largest_share(beyond, wholes))
        tile.finish()
        self._waiting.append((t.at, tile))
        waiting = sum(len(t.cols) * len(t.rows) for _, t in self._waiting)
        if waiting > self._most_waiting:
            self._add_waiting()
        return lost, True

    def _add_waiting(self):
        """Adds the gradients of the tiles that are done and wait."""
        if not self._waiting:
            return
        at, tiles = zip(*self._waiting, strict=True)
        self._waiting = []
        states = self.d_hidden if self.d_hidden is not None else self.d_aug
        dtype = None if states is None else states.dtype
        found = self._tiles.add_gradients(tiles, self._sum_of_weight(), self.d_bias, dtype)
        for rows, parts in zip(at, found, strict=True):
            for d_states, part in zip((self.d_hidden, self.d_aug), parts, strict=True):
                if d_states is not None and part is not None:
                    d_states[rows] = part.to(d_states.dtype)

    def _outside(self, sums, s, g):
        """(R, 1) bounds on sum |dz| over the columns that are not candidates, in both streams and
        their sum; `sums` are the candidates'.

        Whole-vocabulary sums less those of the candidates. All other columns have log p < -H, so
        that the terms p (log p + H), which sum to 0 over all columns, are negative there. To
        dz + dz_aug the KL adds its own non-negative terms, less p KL: of second order where q is
        close to p. Their rounding is the logits' times |log q - log p|.
        """
        own = own_aug = full = aug = net = 0
        kl = None if g.kl_prcp is None else g.kl_prcp.abs()
        mass = _left(1, sums.mass) if self.full else 0
        if self.full:
            own = _own_part(mass, sums.own, g.logprobs, g.entropy)
            full = own
            if kl is not None:
                full = own + kl * (_left(s.ratio, sums.ratio) + s.kl.abs() * mass)
        if self.aug:
            own_aug = _own_part(
                _left(1, sums.aug_mass), sums.aug_own, g.aug_logprobs, g.aug_entropy
            )
            aug = own_aug if kl is None else own_aug + kl * _left(s.gap, sums.gap)
        if self.net:
            terms = s.kl - sums.kl - ROUNDING * (2 * s.kl.abs()).sqrt()
            net = own + own_aug + kl * (terms.clamp_min(0) + s.kl.abs() * mass)
        return full, aug, net

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

    def _tile(self, at):
        """The states of rows `at`, of the streams whose logits are needed, ready for products."""
        states = [
            x[at] if wanted else None
            for x, wanted in (
                (self.hidden, self.needs_z),
                (self.aug_hidden, self.needs_z_aug),
            )
        ]
        wanted = (self.full, self.aug, self.d_hidden is not None or self.d_aug is not None)
        return self._tiles(states, self.weight, self.bias, self.head, *wanted)

    def _add_all(self, at, dz):
        """Adds gradients dz (R, V), one per stream or None, of rows `at`."""
        states = ((dz[0], self.hidden, self.d_hidden), (dz[1], self.aug_hidden, self.d_aug))
        for grad, x, d_states in states:
            if grad is None:
                continue
            x = x[at].to(self.head.dtype)
            if d_states is not None:
                total = torch.zeros_like(x)
                for block, weight in self.head.blocks(self.weight):
                    total.addmm_(grad[:, block], weight)
                d_states[at] = total.to(d_states.dtype)
            if self._needs_weight:
                self._sum_of_weight().addmm_(grad.T, x)
            if self.d_bias is not None:
                self.d_bias += grad.sum(0)


def _left(whole, part):
    """(R, 1): what is left of a sum over the vocabulary beside the candidates' part."""
    return (whole - part - ROUNDING).clamp_min(0)


def _own_part(mass, own, g_logprobs, g_entropy):
    bound = torch.zeros_like(mass)
    if g_logprobs is not None:
        bound += g_logprobs.abs() * mass
    if g_entropy is not None:
        bound += g_entropy.abs() * _left(0, -own)
    return bound


def _largest_share(parts, wholes):
    return max(float((b / w).nan_to_num(0).max()) for b, w in zip(parts, wholes, strict=True))


def _log_prob_size(upstream, label_logprob):
    return 0 if upstream is None else -2 * upstream.abs() * torch.expm1(label_logprob)


def _entropy_size(upstream, entropy, log_sum):
    if upstream is None:
        return 0
    return 2 * upstream.abs() * (-log_sum).exp() * (entropy - log_sum).clamp_min(0)
