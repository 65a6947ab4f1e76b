"""Host side of the Triton backend: launches, the choice of columns, and the certificate.

The forward is one kernel for both streams; the backward recomputes the logits of few columns where
few matter, and of all of them, a chunk of rows at a time, elsewhere.
"""

import os
from dataclasses import dataclass

import torch
import triton

from papo_kernels import columns
from papo_kernels import triton_kernels as kernels
from papo_kernels.columns import LEVELS_PER_NAT, ROUNDING
from papo_kernels.row_math import RowStats, Upstream
from papo_kernels.sparse_backward import DENSE_SHARE, RESERVE
from papo_kernels.torch_backend import CHUNK_ELEMENTS, saved_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Blocks:
    """Launch sizes: rows, words and features of a block, warps, and stages of the load pipeline."""

    n: int
    v: int
    d: int
    warps: int
    stages: int


# By bytes of an operand. float32 products run on plain units, and want smaller blocks.
BLOCKS = {2: Blocks(64, 128, 64, 8, 3), 4: Blocks(64, 64, 32, 8, 2)}
DZ = {2: Blocks(64, 64, 64, 8, 3), 4: Blocks(64, 32, 32, 8, 2)}
D_HIDDEN = {2: Blocks(64, 64, 128, 8, 3), 4: Blocks(64, 32, 64, 8, 2)}
D_WEIGHT = {2: Blocks(64, 64, 128, 8, 3), 4: Blocks(64, 32, 64, 8, 2)}
if INTERPRETED:
    BLOCKS = DZ = D_HIDDEN = D_WEIGHT = dict.fromkeys((2, 4), Blocks(64, 512, 32, 4, 1))
# Rows of a tile, which shares its choice of columns.
TILE = BLOCKS[2].n

# Tiles whose gathered gradients exist at once.
GROUP_TILES = 64
# Guesses of how far dropped gradients lie below their bound; after the last a tile is done densely.
TIGHTNESS = (1 / 16, 1 / 2)


class Operands:
    """Operands of one dtype, and what the kernels want to know about them."""

    def __init__(self, hidden, aug_hidden, weight, bias):
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        if aug_hidden is not None:
            dtype = torch.promote_types(dtype, aug_hidden.dtype)
        if dtype == torch.float64:
            raise ValueError("hidden, aug_hidden or weight is float64; backend='triton' has none")
        self.two = aug_hidden is not None
        self.x, self.w = hidden.to(dtype), weight.to(dtype)
        self.xa = aug_hidden.to(dtype) if self.two else self.x
        self.b = self.w if bias is None else bias
        self.has_bias = bias is not None
        self.dtype, self.size = dtype, dtype.itemsize
        self.upcast = INTERPRETED and self.size == 2
        # The interpreter truncates where it should round to 16 bits.
        self.stored = torch.float32 if self.upcast else dtype
        self.n, self.d, self.v = len(hidden), hidden.shape[1], len(weight)

    def strides(self):
        return (*self.x.stride(), *self.xa.stride(), *self.w.stride())


def kept_first(targets, ignore_index):
    """(N,) rows with the kept ones first, in order, and (1,) their count; without synchronising."""
    ignored = targets == ignore_index
    return ignored.to(torch.int8).argsort(stable=True), (~ignored).sum()[None]


def _splits(tiles, vocab, blocks, device):
    """Programs along the vocabulary: enough to fill the device where rows are few."""
    if device.type != "cuda":
        wanted = 2
    else:
        units = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = -(-2 * units // tiles)
    return max(1, min(wanted, vocab // (8 * blocks.v)))


def levels_shape(n, vocab, dtype, sparse):
    del dtype  # The same height for all, so that the shape needs no more than the sizes.
    return (-(-n // TILE) if sparse else 0), vocab


def forward(hidden, aug_hidden, weight, bias, targets, ignore_index, head, shard, sparse):
    """As `torch_backend.forward`; `gap` and `ratio` hold E_p|z - z_aug| and E_q|z - z_aug|."""
    o = Operands(hidden, aug_hidden, weight, bias)
    blocks = BLOCKS[o.size]
    fields = saved_rows(o.two)
    levels = torch.zeros(
        levels_shape(o.n, o.v, o.dtype, sparse), dtype=torch.uint8, device=hidden.device
    )
    saved = torch.zeros(fields, o.n, device=hidden.device)
    outputs = (9, 2, 10, 5, 6) if o.two else (3, 2)
    if o.n == 0:
        return [saved[i].clone() for i in outputs], saved, levels
    rows, count = kept_first(targets, ignore_index)
    tiles = triton.cdiv(o.n, blocks.n)
    splits = _splits(tiles, o.v, blocks, hidden.device)
    per_split = triton.cdiv(triton.cdiv(o.v, splits), blocks.v) * blocks.v
    splits = triton.cdiv(o.v, per_split)
    part = torch.zeros(splits, fields, o.n, device=hidden.device)
    kernels.forward_kernel[(tiles, splits)](
        o.x, o.xa, o.w, o.b, targets, rows, count, part, levels,
        o.n, o.v, o.d, per_split, *o.strides(), head.temperature, head.softcap or 1.0,
        TWO=o.two, HAS_BIAS=o.has_bias, CAP=head.softcap is not None, LEVELS=sparse,
        UPCAST=o.upcast, BLOCK_N=blocks.n, BLOCK_V=blocks.v, BLOCK_D=blocks.d,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    stats = combine(part, targets[rows], o.v, o.two)
    live = torch.arange(o.n, device=hidden.device) < count
    saved[:, rows] = torch.where(live, stats, 0)
    return [saved[i].clone() for i in outputs], saved, levels


def combine(part, labels, vocab, two):
    """(splits, fields, N) partial sums of the forward kernel to (fields, N) row statistics."""
    valid = (labels >= 0) & (labels < vocab)
    streams, weights = [], []
    for p in (part[:, :4], part[:, 4:8])[: 1 + two]:
        peak = p[:, 0].amax(0)
        shift = p[:, 0] - peak
        weight = shift.exp()
        total = (weight * p[:, 1]).sum(0)
        log_sum = total.log()
        entropy = log_sum - (weight * (p[:, 2] + p[:, 1] * shift)).sum(0) / total
        logit = p[:, 3].sum(0)
        logit = torch.where(logit <= kernels.LOG_ZERO.value, -torch.inf, logit)
        label = torch.where(valid, (logit - peak) - log_sum, torch.nan)
        streams.append((peak, log_sum, entropy, label, total))
        weights.append(weight)
    peak, log_sum, entropy, label, total = streams[0]
    if not two:
        return torch.stack([peak, log_sum, entropy, label])
    peak_aug, log_sum_aug, entropy_aug, label_aug, total_aug = streams[1]
    cross, ratio = ((weights[0] * part[:, i]).sum(0) / total for i in (8, 9))
    ratio_aug = (weights[1] * part[:, 10]).sum(0) / total_aug
    kl = cross - ((peak - peak_aug) + (log_sum - log_sum_aug))
    aug = [peak_aug, log_sum_aug, entropy_aug]
    return torch.stack([peak, log_sum, entropy, *aug, kl, ratio, ratio_aug, label, label_aug])


def backward(upstream, operands, needs, targets, saved, levels, ignore_index, head, shard, budget):
    """As `torch_backend.backward`."""
    run = _Backward(upstream, operands, needs, targets, saved, ignore_index, head)
    if run.count and (run.full or run.aug):
        dense = torch.arange(run.tiles, device=targets.device)
        if levels is not None:
            dense = run.sparse(levels[: run.tiles], RESERVE * budget)
        run.dense(dense)
    return run.gradients()


class _Backward:
    def __init__(self, upstream, operands, needs, targets, saved, ignore_index, head):
        self.operands, self.needs, self.targets, self.head = operands, needs, targets, head
        self.o = o = Operands(*operands)
        self.saved, self.stats = saved, RowStats(*saved[: 9 if o.two else 3])
        g = self.g = Upstream(*upstream)
        self.up = torch.stack(
            [torch.zeros_like(saved[0]) if u is None else u.to(torch.float32) for u in g]
        )
        shared, kl = needs[2] or needs[3], g.kl_prcp is not None
        self.full = (needs[0] or shared) and (kl or g.logprobs is not None or g.entropy is not None)
        self.aug = (needs[1] or shared) and (
            kl or g.aug_logprobs is not None or g.aug_entropy is not None
        )
        self.rows, count = kept_first(targets, ignore_index)
        self.count = int(count)
        self.block_n = TILE
        self.tiles = triton.cdiv(self.count, self.block_n)
        device = targets.device
        self.d_states = [
            torch.zeros_like(x, dtype=o.stored if o.upcast else x.dtype) if need else None
            for x, need in zip(operands[:2], needs, strict=False)
        ]
        # One rounding at the end: sums over rows in 16 bits diverge.
        self.d_weight = torch.zeros(o.v, o.d, device=device) if needs[2] else None
        self.d_bias = torch.zeros(o.v, device=device) if needs[3] else None

    def gradients(self):
        grads = (*self.d_states, self.d_weight, self.d_bias)
        return tuple(
            None if g is None else g.to(x.dtype) for g, x in zip(grads, self.operands, strict=True)
        )

    def _dz(self, grid, rows, count, first_tile, table, dz, dza, sums, stride_entry, stride_tile):
        """table: each block's tile, first and last entry, each entry's word; None for all words."""
        o, g, blocks = self.o, self.g, DZ[self.o.size]
        tile, first, last, col = (rows,) * 4 if table is None else table
        kernels.dz_kernel[grid](
            o.x, o.xa, o.w, o.b, self.targets, rows, self.saved, self.up, tile, first, last, col,
            dz, dza, sums, o.n, o.v, o.d, count, first_tile, *o.strides(), stride_entry,
            stride_tile, self.head.temperature, self.head.softcap or 1.0,
            TWO=self.aug or g.kl_prcp is not None, FULL=self.full, AUG=self.aug,
            LOGPROB=g.logprobs is not None, ENTROPY=g.entropy is not None,
            LOGPROB_AUG=g.aug_logprobs is not None, ENTROPY_AUG=g.aug_entropy is not None,
            KL=g.kl_prcp is not None, GATHER=table is not None, HAS_BIAS=o.has_bias,
            CAP=self.head.softcap is not None, UPCAST=o.upcast, BLOCK_N=blocks.n,
            BLOCK_V=blocks.v, BLOCK_D=blocks.d, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip

    def dense(self, tiles):
        """All columns of the given tiles."""
        if not len(tiles):
            return
        o, block = self.o, self.block_n
        within = torch.arange(block, device=tiles.device)
        positions = (tiles[:, None] * block + within).flatten()
        rows = self.rows[positions[positions < self.count]]
        size = max(1, CHUNK_ELEMENTS // o.v // block) * block
        vocab_blocks = triton.cdiv(o.v, DZ[o.size].v)
        for n in range(0, len(rows), size):
            chunk = rows[n : n + size]
            count = triton.cdiv(len(chunk), block)
            buffers = [
                torch.empty(o.v, count * block, dtype=o.stored, device=rows.device) if used else o.x
                for used in (self.full, self.aug)
            ]
            self._dz(
                (vocab_blocks, count), chunk, len(chunk), 0, None, *buffers, self.up,
                count * block, block,
            )  # fmt: skip
            streams = ((self.full, o.x, self.d_states[0]), (self.aug, o.xa, self.d_states[1]))
            for dz, (used, x, out) in zip(buffers, streams, strict=True):
                if not used:
                    continue
                dz = dz[:, : len(chunk)]
                if out is not None:
                    out[chunk] = self._mm(dz.T, o.w).to(out.dtype)
                if self.d_weight is not None:
                    self.d_weight += self._mm(dz, x[chunk])
                if self.d_bias is not None:
                    self.d_bias += dz.sum(1, dtype=torch.float32)
            columns.record(len(chunk), o.v, o.v, None)

    @staticmethod
    def _mm(a, b):
        """float32 product of 16-bit or float32 operands."""
        if torch.float32 in (a.dtype, b.dtype):
            return a.float() @ b.float()
        if a.device.type == "cuda":
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()

    def sparse(self, levels, budget):
        """Does the tiles that few columns serve; returns those that want all, (tiles,) int64."""
        todo = torch.arange(self.tiles, device=levels.device)
        entropies = [x for x in (self.stats.entropy, self.stats.aug_entropy) if x is not None]
        highest = torch.stack(entropies).amax(0)[self.rows]
        highest[self.count :] = 0
        highest = torch.nn.functional.pad(highest, (0, self.tiles * self.block_n))
        highest = highest[: self.tiles * self.block_n].view(self.tiles, -1).amax(1)
        typical = self._typical_sizes()
        dense = []
        for tightness in TIGHTNESS:
            level, kept = self._first_levels(levels, todo, highest, budget, tightness)
            few = kept <= DENSE_SHARE * self.o.v
            dense.append(todo[~few])
            todo, level = todo[few], level[few]
            if not len(todo):
                break
            failed = [
                self._group(levels, tiles, at, budget, typical)
                for tiles, at in zip(todo.split(GROUP_TILES), level.split(GROUP_TILES), strict=True)
            ]
            todo = torch.cat(failed)
        return torch.cat([*dense, todo]).sort().values

    def _first_levels(self, levels, todo, highest, budget, tightness):
        """Per tile the level to take candidates up to, and how many columns those are."""
        device = levels.device
        counts = torch.zeros(len(todo), 256, dtype=torch.int64, device=device)
        for n in range(0, len(todo), 8):
            index = levels[todo[n : n + 8]].long()
            counts[n : n + 8].scatter_add_(1, index, torch.ones_like(index))
        steps = torch.arange(256, dtype=torch.float64, device=device)
        bound = counts * torch.exp(steps / -LEVELS_PER_NAT)
        beyond = bound.sum(1, keepdim=True) - bound.cumsum(1)
        level = (beyond * tightness > budget / 2).sum(1)
        # Beyond it log p < -entropy: p (log p + entropy) has one sign, and its sum is its size.
        floor = (LEVELS_PER_NAT * highest[todo]).ceil()
        level = torch.maximum(level, floor.nan_to_num(256).long()).clamp(0, 256)
        kept = counts.cumsum(1).gather(1, level.clamp(max=255)[:, None]).squeeze(1)
        return level, torch.where(level > 255, self.o.v, kept)

    def _group(self, levels, tiles, level, budget, typical):
        """Does some tiles on candidates up to their level; returns those that drop too much."""
        o, block = self.o, self.block_n
        device = levels.device
        mask = levels[tiles] <= level[:, None]
        within = torch.arange(block, device=device)
        positions = tiles[:, None] * block + within
        live = positions < self.count
        rows = self.rows[positions.clamp(max=self.count - 1)]
        labels = self.targets[rows]
        labels = torch.where((labels >= 0) & (labels < o.v), labels, 0)
        mask.scatter_(1, labels, True)
        local, col = mask.nonzero(as_tuple=True)
        kept = mask.sum(1)
        size = DZ[o.size].v
        per_tile = (kept + size - 1) // size
        offset = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        owner = torch.repeat_interleave(torch.arange(len(tiles), device=device), per_tile)
        nth = torch.arange(len(owner), device=device) - (per_tile.cumsum(0) - per_tile)[owner]
        first = offset[owner] + nth * size
        table = (tiles[owner].contiguous(), first, offset[owner + 1].contiguous(), col)
        dz, dza = (
            torch.empty(len(col), block, dtype=o.stored, device=device) if used else o.x
            for used in (self.full, self.aug)
        )
        sums = torch.zeros(len(owner), 8, block, device=device)
        self._dz((len(owner),), self.rows, self.count, 0, table, dz, dza, sums, block, 0)
        totals = torch.zeros(len(tiles), 8, block, dtype=torch.float64, device=device)
        totals.index_add_(0, owner, sums.double())
        share = self._dropped_share(totals.unbind(1), rows, typical)
        share = torch.where(live, share, 0).amax(1)
        good = share <= budget
        bad = ~good[local]
        for x, used in ((dz, self.full), (dza, self.aug)):
            if used:
                x[bad] = 0
        self._products(dz, dza, table, offset, owner, tiles)
        if columns._recorders:
            counts = live.sum(1).tolist()
            for n, k, s, ok in zip(
                counts, kept.tolist(), share.tolist(), good.tolist(), strict=True
            ):
                if ok:
                    columns.record(n, k, o.v, s)
        return tiles[~good]

    def _products(self, dz, dza, table, offset, owner, tiles):
        """Adds dH and dW of some tiles' entries."""
        o = self.o
        streams = ((self.full, dz, o.x, self.d_states[0]), (self.aug, dza, o.xa, self.d_states[1]))
        hidden, weight = D_HIDDEN[o.size], D_WEIGHT[o.size]
        shared = self.d_weight is not None or self.d_bias is not None
        # Atomic sums have no order of their own; one launch per tile gives them one.
        ordered = torch.are_deterministic_algorithms_enabled()
        for used, grad, x, out in streams:
            if used and out is not None:
                order = self.rows[
                    (tiles[:, None] * self.block_n + torch.arange(self.block_n, device=x.device))
                    .clamp(max=len(self.rows) - 1)
                    .flatten()
                ].contiguous()
                last = self.count - int(tiles[-1]) * self.block_n
                count = (len(tiles) - 1) * self.block_n + min(self.block_n, last)
                kernels.d_hidden_kernel[(len(tiles), triton.cdiv(o.d, hidden.d))](
                    grad, o.w, order, table[3], offset, out, o.d, count, 0, *o.w.stride(),
                    *out.stride(), UPCAST=o.upcast, BLOCK_N=self.block_n, BLOCK_V=hidden.v,
                    BLOCK_D=hidden.d, num_warps=hidden.warps, num_stages=hidden.stages,
                )  # fmt: skip
            if not used or not shared:
                continue
            ends = torch.bincount(owner, minlength=len(tiles)).cumsum(0).tolist() if ordered else []
            spans = zip([0, *ends[:-1]], ends, strict=True) if ordered else ((0, len(owner)),)
            for start, end in spans:
                kernels.d_weight_kernel[(end - start, triton.cdiv(o.d, weight.d))](
                    grad, x, self.rows, *table, self._or(self.d_weight), self._or(self.d_bias),
                    o.d, self.count, start, *x.stride(), o.d, 1,
                    WEIGHT=self.d_weight is not None, BIAS=self.d_bias is not None,
                    UPCAST=o.upcast, BLOCK_N=self.block_n, BLOCK_V=DZ[o.size].v,
                    BLOCK_D=weight.d, num_warps=weight.warps, num_stages=weight.stages,
                )  # fmt: skip

    def _or(self, x):
        return self.saved if x is None else x

    def _dropped_share(self, totals, rows, typical):
        """(tiles, BLOCK_N) largest share of a row's sum |dz| outside candidates, over streams."""
        p, ent, dist, size, q, ent_aug, dist_aug, size_aug = totals
        g = Upstream(*(None if x is None else x.double()[rows].abs() for x in self.g))
        s = RowStats(*(None if x is None else x.double()[rows] for x in self.stats))
        share = torch.zeros_like(p)
        mass, mass_aug = _left(1, p), _left(1, q)
        gap = gap_aug = shift = 0
        if g.kl_prcp is not None:
            gap, gap_aug = _left(s.gap, dist), _left(s.ratio, dist_aug)
            shift = ((s.peak - s.aug_peak) + (s.log_sum - s.aug_log_sum)).abs()
        if self.full:
            out = torch.zeros_like(p)
            if g.logprobs is not None:
                out += g.logprobs * mass
            if g.entropy is not None:
                out += g.entropy * _left(ent, 0)
            if g.kl_prcp is not None:
                out += g.kl_prcp * (gap + (shift + s.kl.abs()) * mass)
            share = out / size.clamp_min(typical[0]).clamp_min(1e-38)
        if self.aug:
            out = torch.zeros_like(p)
            if g.aug_logprobs is not None:
                out += g.aug_logprobs * mass_aug
            if g.aug_entropy is not None:
                out += g.aug_entropy * _left(ent_aug, 0)
            if g.kl_prcp is not None:
                both = gap + gap_aug + shift * (mass + mass_aug)
                # |q - p| <= p + q, and <= max(p, q) |log q - log p|.
                out += g.kl_prcp * torch.minimum(mass + mass_aug, both)
            share = torch.maximum(share, out / size_aug.clamp_min(typical[1]).clamp_min(1e-38))
        # NaN compares false with every budget; infinity says the same to a maximum.
        return torch.where(share.isnan(), torch.inf, share)

    def _typical_sizes(self):
        """Per stream, a scalar near the root mean square over rows of sum |dz|."""
        s, g = self.stats, self.g
        full = aug = torch.zeros_like(s.entropy)
        label = self.saved[9 if self.o.two else 3 :]
        for x, size in (
            (g.logprobs, -2 * torch.expm1(label[0])),
            (g.entropy, 2 * (-s.log_sum).exp() * (s.entropy - s.log_sum)),
        ):
            full = full if x is None else full + x.abs() * size.clamp_min(0)
        if self.o.two:
            for x, size in (
                (g.aug_logprobs, -2 * torch.expm1(label[1])),
                (g.aug_entropy, 2 * (-s.aug_log_sum).exp() * (s.aug_entropy - s.aug_log_sum)),
            ):
                aug = aug if x is None else aug + x.abs() * size.clamp_min(0)
        if g.kl_prcp is not None:
            shift = ((s.peak - s.aug_peak) + (s.log_sum - s.aug_log_sum)).abs()
            size = (s.gap - shift - s.kl).clamp_min(0)
            full = full + g.kl_prcp.abs() * size
            aug = aug + g.kl_prcp.abs() * size.clamp_max(2)
        rms = [x[self.rows[: self.count]].nan_to_num(0, 0, 0) for x in (full, aug)]
        return [float(x.double().square().mean().sqrt()) for x in rms]


def _left(whole, part):
    return (whole - part - ROUNDING).clamp_min(0)
