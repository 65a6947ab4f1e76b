"""Host side of the Triton backward: the choice of columns, the certificate and the products."""

import torch
import triton

from papo_kernels import columns, triton_launch
from papo_kernels import triton_gradients as kernels
from papo_kernels.columns import LEVELS_PER_NAT, ROUNDING
from papo_kernels.row_math import RowStats, Upstream
from papo_kernels.sparse_backward import DENSE_SHARE
from papo_kernels.torch_backend import CHUNK_ELEMENTS
from papo_kernels.triton_launch import Operands, kept_first

# Tiles whose gathered gradients exist at once.
GROUP_TILES = 64
# Candidate sets tried, the later ones learning from the first, before a tile is done densely.
ATTEMPTS = 3


class Backward:
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
        # As in `sparse_backward`: the KL's two gradients may nearly cancel in the weight's.
        self.kl, self.net = kl, self.full and self.aug and kl and shared
        self.rows, count = kept_first(targets, ignore_index)
        self.count = int(count)
        self.block_n = triton_launch.TILE
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
        o, g, blocks = self.o, self.g, self.o.launch.dz
        tile, first, last, col = (rows,) * 4 if table is None else table
        kernels.dz_kernel[grid](
            o.x, o.xa, o.w, o.b, self.targets, rows, self.saved, self.up, tile, first, last, col,
            dz, dza, sums, o.n, o.v, o.d, count, first_tile, *o.strides(), stride_entry,
            stride_tile, self.head.temperature, self.head.softcap or 1.0,
            TWO=self.aug or g.kl_prcp is not None, FULL=self.full, AUG=self.aug,
            LOGPROB=g.logprobs is not None, ENTROPY=g.entropy is not None,
            LOGPROB_AUG=g.aug_logprobs is not None, ENTROPY_AUG=g.aug_entropy is not None,
            KL=self.kl, GATHER=table is not None, NET=self.net and table is not None,
            HAS_BIAS=o.has_bias,
            CAP=self.head.softcap is not None, UPCAST=o.upcast, BLOCK_N=self.block_n,
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
        vocab_blocks = triton.cdiv(o.v, o.launch.dz.v)
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
        tightness = torch.ones(self.tiles, dtype=torch.float64, device=levels.device)
        for attempt in range(ATTEMPTS):
            level, kept, bound = self._levels(levels, todo, highest, budget, tightness, attempt)
            few = kept <= DENSE_SHARE * self.o.v
            dense.append(todo[~few])
            todo, level, bound = todo[few], level[few], bound[few]
            if not len(todo):
                break
            groups = zip(todo.split(GROUP_TILES), level.split(GROUP_TILES), strict=True)
            share = torch.cat(
                [self._group(levels, tiles, at, budget, typical) for tiles, at in groups]
            )
            bad = share > budget
            todo, tightness = todo[bad], share[bad] / bound[bad].clamp_min(1e-30)
        return torch.cat([*dense, todo]).sort().values

    def _levels(self, levels, todo, highest, budget, tightness, attempt):
        """Per tile the level to take candidates up to, how many columns those are, and the bound.

        tightness: per tile, dropped gradient over the bound sum exp(-level / 8) on the columns.
        """
        device = levels.device
        counts = torch.zeros(len(todo), 256, dtype=torch.int64, device=device)
        for n in range(0, len(todo), 8):
            index = levels[todo[n : n + 8]].long()
            counts[n : n + 8].scatter_add_(1, index, torch.ones_like(index))
        steps = torch.arange(256, dtype=torch.float64, device=device)
        bound = counts * torch.exp(steps / -LEVELS_PER_NAT)
        beyond = bound.sum(1, keepdim=True) - bound.cumsum(1)
        level = (beyond * tightness[:, None] > budget / 2).sum(1)
        # Beyond it log p < -entropy: p (log p + entropy) has one sign, and its sum is its size.
        floor = (LEVELS_PER_NAT * highest[todo]).ceil()
        floor = floor.nan_to_num(256).long()
        level = torch.maximum(level, floor).clamp(0, 256)
        if attempt == 0:
            # The first guess may be far off: try the most that is worth trying.
            most = (counts.cumsum(1) <= DENSE_SHARE * self.o.v).sum(1) - 1
            level = torch.where(most >= floor, torch.minimum(level, most), level)
        at = level.clamp(max=255)[:, None]
        kept = counts.cumsum(1).gather(1, at).squeeze(1)
        return level, torch.where(level > 255, self.o.v, kept), beyond.gather(1, at).squeeze(1)

    def _group(self, levels, tiles, level, budget, typical):
        """Does some tiles on candidates up to their level, where they drop no more than `budget`.

        Returns (tiles,) the largest share of a row's gradient that they drop.
        """
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
        size = o.launch.dz.v
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
        sums = torch.zeros(len(owner), 10, block, device=device)
        self._dz((len(owner),), self.rows, self.count, 0, table, dz, dza, sums, block, 0)
        totals = torch.zeros(len(tiles), 10, block, dtype=torch.float64, device=device)
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
        return share

    def _products(self, dz, dza, table, offset, owner, tiles):
        """Adds dH and dW of some tiles' entries."""
        o = self.o
        streams = ((self.full, dz, o.x, self.d_states[0]), (self.aug, dza, o.xa, self.d_states[1]))
        hidden, weight = o.launch.d_hidden, o.launch.d_weight
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
                    UPCAST=o.upcast, BLOCK_N=self.block_n, BLOCK_V=o.launch.dz.v,
                    BLOCK_D=weight.d, num_warps=weight.warps, num_stages=weight.stages,
                )  # fmt: skip

    def _or(self, x):
        return self.saved if x is None else x

    def _dropped_share(self, totals, rows, typical):
        """(tiles, BLOCK_N) largest share of a row's sum |dz| outside candidates, over streams."""
        p, ent, dist, size, q, ent_aug, dist_aug, size_aug, terms, net = totals
        g = Upstream(*(None if x is None else x.double()[rows].abs() for x in self.g))
        s = RowStats(*(None if x is None else x.double()[rows] for x in self.stats))
        share = torch.zeros_like(p)
        mass, mass_aug = _left(1, p), _left(1, q)
        gap = gap_aug = shift = own = own_aug = 0
        if self.kl:
            gap, gap_aug = _left(s.gap, dist), _left(s.ratio, dist_aug)
            shift = ((s.peak - s.aug_peak) + (s.log_sum - s.aug_log_sum)).abs()
        if self.full:
            own = _sum_of(p, (g.logprobs, mass), (g.entropy, _left(ent, 0)))
            drift = gap + (shift + s.kl.abs()) * mass if self.kl else 0
            out = own + _sum_of(p, (g.kl_prcp, drift))
            share = out / size.clamp_min(typical[0]).clamp_min(1e-38)
        if self.aug:
            own_aug = _sum_of(p, (g.aug_logprobs, mass_aug), (g.aug_entropy, _left(ent_aug, 0)))
            # |q - p| <= p + q, and <= max(p, q) |log q - log p|.
            both = gap + gap_aug + shift * (mass + mass_aug)
            out = own_aug + _sum_of(p, (g.kl_prcp, torch.minimum(mass + mass_aug, both)))
            share = torch.maximum(share, out / size_aug.clamp_min(typical[1]).clamp_min(1e-38))
        if self.net:
            left = s.kl - terms - ROUNDING * (2 * s.kl.abs()).sqrt()
            out = own + own_aug + g.kl_prcp * (left.clamp_min(0) + s.kl.abs() * mass)
            share = torch.maximum(share, out / net.clamp_min(typical[2]).clamp_min(1e-38))
        # NaN compares false with every budget; infinity says the same to a maximum.
        return torch.where(share.isnan(), torch.inf, share)

    def _typical_sizes(self):
        """For both streams and their sum, a scalar near the root mean square of rows' sum |dz|."""
        s, g = self.stats, self.g
        full = aug = net = torch.zeros_like(s.entropy)
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
            net = full + aug + g.kl_prcp.abs() * s.kl.abs()
            full = full + g.kl_prcp.abs() * size
            aug = aug + g.kl_prcp.abs() * size.clamp_max(2)
        rms = [x[self.rows[: self.count]].nan_to_num(0, 0, 0) for x in (full, aug, net)]
        return [float(x.double().square().mean().sqrt()) for x in rms]


def _left(whole, part):
    return (whole - part - ROUNDING).clamp_min(0)


def _sum_of(like, *parts):
    """Sum of upstream * size over the parts whose upstream is not None."""
    total = torch.zeros_like(like)
    for upstream, size in parts:
        if upstream is not None:
            total += upstream * size
    return total
