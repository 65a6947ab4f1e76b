"""Host side of the Triton backward: the choice of words, the certificate and the products.

The logits of few words are recomputed where few matter, and those of all words, a chunk of rows at
a time, elsewhere.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from papo_kernels import certificate, rows
from papo_kernels.certificate import (
    ATTEMPTS,
    DENSE_SHARE,
    RESERVE,
    Beyond,
    CandidateSums,
    StreamSums,
    record,
)
from papo_kernels.rows import Call, RowStats, Saved, Upstream, Wanted, each, make_wanted, unpack
from papo_kernels.sizes import Wholes
from papo_kernels.triton import gradients as kernels
from papo_kernels.triton import launch
from papo_kernels.triton.forward import names
from papo_kernels.triton.launch import KernelOperands, kernel_operands

# Tiles whose gathered gradients exist at once.
GROUP_TILES = 64
# Tiles whose levels are counted at once: every level takes eight bytes meanwhile.
COUNTED_TILES = 8


@dataclass(frozen=True)
class Backward:
    """What one backward pass is about; nothing of it changes."""

    call: Call
    operands: KernelOperands
    targets: torch.Tensor  # (N,) contiguous
    saved: Saved
    stats: RowStats  # (N,) each
    upstream: Upstream  # (N,) each
    up: torch.Tensor  # (6, N) float32: upstream gradients as the kernels read them
    wanted: Wanted
    count: int  # rows that count
    tile: int  # rows of a tile

    @property
    def tiles(self):
        return triton.cdiv(self.count, self.tile)

    def rows_of(self, tiles):
        """(T, tile) rows of some tiles and whether they are any; the last tile may have fewer."""
        within = torch.arange(self.tile, device=tiles.device)
        positions = tiles[:, None] * self.tile + within
        live = positions < self.count
        return self.saved.order[positions.clamp(max=self.count - 1)], live


def backward(call, saved, upstream, needs):
    """Gradients of the four operands in their dtypes, or None where `needs` is False.

    saved: `rows.Saved` as the forward made it. upstream: Upstream of (N,). needs: four bools.
    """
    run = _backward_of(call, saved, upstream, needs)
    total = GradientSum(run)
    if run.count and (run.wanted.full or run.wanted.aug):
        dense = torch.arange(run.tiles, device=run.targets.device)
        if len(saved.levels):
            budget = RESERVE * call.options.grad_budget
            dense = _sparse(run, saved.levels[: run.tiles], budget, total)
        _dense(run, dense, total)
    return total.gradients()


def _backward_of(call, saved, upstream, needs):
    zeros = torch.zeros_like(saved.rows[0])
    return Backward(
        call,
        kernel_operands(call),
        call.targets.contiguous(),
        saved,
        unpack(saved.rows, names(call.streams)),
        upstream,
        torch.stack([zeros if g is None else g.to(torch.float32) for g in upstream.flat]),
        make_wanted(needs, upstream, call.options.aug_constant),
        int((call.targets != call.options.ignore_index).sum()),
        launch.TILE,
    )


class GradientSum:
    """The operands' gradients so far; the kernels add to its tensors."""

    def __init__(self, run):
        call, wanted, o = run.call, run.wanted, run.operands
        self._operands = call.operands
        self.hidden, self.aug_hidden = (
            torch.zeros_like(x, dtype=o.stored if o.upcast else x.dtype) if asked else None
            for x, asked in ((call.hidden, wanted.hidden), (call.aug_hidden, wanted.aug_hidden))
        )
        # One rounding at the end: sums over rows in 16 bits diverge.
        device = run.targets.device
        self.weight = (
            torch.zeros(o.v, o.d, dtype=torch.float32, device=device) if wanted.weight else None
        )
        self.bias = torch.zeros(o.v, dtype=torch.float32, device=device) if wanted.bias else None

    def gradients(self):
        """Of hidden, aug_hidden, weight and bias in their own dtypes, or None."""
        grads = (self.hidden, self.aug_hidden, self.weight, self.bias)
        return tuple(
            None if g is None else g.to(x.dtype) for g, x in zip(grads, self._operands, strict=True)
        )


def _streams(run, dz, dz_aug, total):
    """(dz, states, sum of the states' gradients or None) of the streams that are wanted."""
    o = run.operands
    if run.wanted.full:
        yield dz, o.full, total.hidden
    if run.wanted.aug:
        yield dz_aug, o.aug, total.aug_hidden


# ---- Dense rows


def _dense(run, tiles, total):
    """Adds the gradients of all words for the rows of some (T,) tiles."""
    if not len(tiles):
        return
    o, block = run.operands, run.tile
    order, live = run.rows_of(tiles)
    order = order[live]
    size = max(1, rows.CHUNK_ELEMENTS // o.v // block) * block
    vocab_blocks = triton.cdiv(o.v, o.launch.dz.v)
    for chunk in order.split(size):
        count = triton.cdiv(len(chunk), block)
        dz, dz_aug = (
            torch.empty(o.v, count * block, dtype=o.stored, device=chunk.device) if used else o.full
            for used in (run.wanted.full, run.wanted.aug)
        )
        _launch_dz(
            run, (vocab_blocks, count), chunk, None, dz, dz_aug, run.up, count * block, block
        )
        for grad, x, d_states in _streams(run, dz, dz_aug, total):
            grad = grad[:, : len(chunk)]
            if d_states is not None:
                d_states[chunk] = _mm(grad.T, o.weight).to(d_states.dtype)
            if total.weight is not None:
                total.weight += _mm(grad, x[chunk])
            if total.bias is not None:
                total.bias += grad.sum(1, dtype=torch.float32)
        record(len(chunk), o.v, o.v, None)


def _mm(a, b):
    """float32 product of 16-bit or float32 operands."""
    if torch.float32 in (a.dtype, b.dtype):
        return a.float() @ b.float()
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _launch_dz(run, grid, order, picked, dz, dz_aug, sums, stride_entry, stride_tile):
    """Runs `dz_kernel` on the rows that `order` lists; picked: Picked, or None for all words."""
    o, g, w, head = run.operands, run.upstream, run.wanted, run.call.head
    blocks = o.launch.dz
    gather = picked is not None
    table = (picked.tile, picked.first, picked.last, picked.col) if gather else (order,) * 4
    kernels.dz_kernel[grid](
        o.full, o.aug, o.weight, o.bias, run.targets, order, run.saved.rows, run.up, *table,
        dz, dz_aug, sums, o.n, o.v, o.d, run.count if gather else len(order), 0, *o.strides(),
        stride_entry, stride_tile, head.temperature, head.softcap or 1.0,
        TWO=w.aug_logits, FULL=w.full, AUG=w.aug,
        LOGPROB=g.full.logprobs is not None, ENTROPY=g.full.entropy is not None,
        LOGPROB_AUG=g.aug.logprobs is not None, ENTROPY_AUG=g.aug.entropy is not None,
        KL=w.kl, KL_REVERSE=w.kl_reverse, GATHER=gather, NET=w.net and gather, HAS_BIAS=o.has_bias,
        CAP=head.softcap is not None, UPCAST=o.upcast, BLOCK_N=run.tile,
        BLOCK_V=blocks.v, BLOCK_D=blocks.d, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


# ---- Sparse tiles


@dataclass(frozen=True)
class Picked:
    """The candidates of some tiles as one list of E entries, cut into the kernels' B blocks."""

    tiles: torch.Tensor  # (T,) which tiles
    rows: torch.Tensor  # (T, tile) their rows
    live: torch.Tensor  # (T, tile) whether a row is any
    kept: torch.Tensor  # (T,) entries of each tile
    offset: torch.Tensor  # (T + 1,) where a tile's entries begin
    local: torch.Tensor  # (E,) which of these tiles an entry is of
    col: torch.Tensor  # (E,) an entry's word
    owner: torch.Tensor  # (B,) which of these tiles a block is of
    tile: torch.Tensor  # (B,) that tile's number in the call
    first: torch.Tensor  # (B,) a block's first entry
    last: torch.Tensor  # (B,) the end of its tile's entries


def _sparse(run, levels, budget, total):
    """Adds the gradients of the tiles that few words serve; returns the others, (T,) int64."""
    device = levels.device
    highest = _highest_entropies(run)
    wholes = Wholes(run, run.count)
    todo, dense = torch.arange(run.tiles, device=device), []
    tightness = torch.ones(run.tiles, dtype=torch.float64, device=device)
    for attempt in range(ATTEMPTS):
        level, beyond, few = certificate.choose_levels(
            _counts(levels, todo), highest[todo], tightness[:, None], attempt > 0, budget,
            DENSE_SHARE * run.operands.v,
        )  # fmt: skip
        dense.append(todo[~few])
        todo, level, beyond = todo[few], level[few], each(lambda x, few=few: x[few], beyond)
        if not len(todo):
            break
        groups = zip(*(x.split(GROUP_TILES) for x in (todo, level, *beyond)), strict=True)
        share = torch.cat(
            [_group(run, levels, Chosen(*some), budget, wholes, total) for some in groups]
        )
        bad = share > budget
        todo, tightness = todo[bad], share[bad] / beyond.mass[bad].clamp_min(1e-30)
    return torch.cat([*dense, todo]).sort().values


def _highest_entropies(run):
    """(tiles,) the highest entropy of a tile's rows, in either stream that may get gradients."""
    streams = (run.stats.full, None if run.call.options.aug_constant else run.stats.aug)
    entropies = [s.entropy for s in streams if s is not None]
    highest = torch.stack(entropies).amax(0)[run.saved.order[: run.count]]
    missing = run.tiles * run.tile - run.count
    return torch.nn.functional.pad(highest, (0, missing)).view(run.tiles, -1).amax(1)


def _counts(levels, tiles):
    """(T, 256) int64: words of each level of some tiles."""
    device = levels.device
    counts = torch.zeros(len(tiles), certificate.LEVELS, dtype=torch.int64, device=device)
    for n in range(0, len(tiles), COUNTED_TILES):
        index = levels[tiles[n : n + COUNTED_TILES]].long()
        counts[n : n + COUNTED_TILES].scatter_add_(1, index, torch.ones_like(index))
    return counts


class Chosen(NamedTuple):
    """Some tiles and the words that they are tried on, (T,) each."""

    tiles: torch.Tensor
    level: torch.Tensor
    mass: torch.Tensor  # as in `certificate.Beyond`
    information: torch.Tensor


def _group(run, levels, chosen, budget, wholes, total):
    """Adds the gradients of some tiles on candidates, where those drop no more than `budget`.

    Returns (T,) the largest share of a row's gradient that each tile drops.
    """
    picked = _pick(run, levels, chosen.tiles, chosen.level)
    dz, dz_aug, sums = _differentiate(run, picked)
    beyond = Beyond(chosen.mass[:, None], chosen.information[:, None])
    share = _dropped_share(run, picked, sums, beyond, wholes)
    good = share <= budget
    bad = ~good[picked.local]
    for x, used in ((dz, run.wanted.full), (dz_aug, run.wanted.aug)):
        if used:
            x[bad] = 0
    _add_products(run, picked, dz, dz_aug, total)
    if certificate.recording():
        found = (picked.live.sum(1), picked.kept, share, good)
        for n, k, s, ok in zip(*(x.tolist() for x in found), strict=True):
            if ok:
                record(n, k, run.operands.v, s)
    return share


def _pick(run, levels, tiles, level):
    """All words of some tiles up to a level, and the rows' targets."""
    device, vocab, size = levels.device, run.operands.v, run.operands.launch.dz.v
    mask = levels[tiles] <= level[:, None]
    order, live = run.rows_of(tiles)
    targets = run.targets[order]
    mask.scatter_(1, torch.where((targets >= 0) & (targets < vocab), targets, 0), True)
    local, col = mask.nonzero(as_tuple=True)
    kept = mask.sum(1)
    offset = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
    blocks = (kept + size - 1) // size
    owner = torch.repeat_interleave(torch.arange(len(tiles), device=device), blocks)
    nth = torch.arange(len(owner), device=device) - (blocks.cumsum(0) - blocks)[owner]
    return Picked(
        tiles, order, live, kept, offset, local, col, owner, tiles[owner].contiguous(),
        offset[owner] + nth * size, offset[owner + 1].contiguous(),
    )  # fmt: skip


def _differentiate(run, picked):
    """(dz, dz_aug, CandidateSums) of the entries.

    The former are (E, tile) where wanted, else a tensor to be left alone; the sums are (T, tile).
    """
    o, wanted, device = run.operands, run.wanted, picked.col.device
    dz, dz_aug = (
        torch.empty(len(picked.col), run.tile, dtype=o.stored, device=device) if used else o.full
        for used in (wanted.full, wanted.aug)
    )
    blocks, tiles, fields = len(picked.owner), len(picked.tiles), len(kernels.SUMS)
    sums = torch.zeros(blocks, fields, run.tile, dtype=torch.float32, device=device)
    _launch_dz(run, (blocks,), run.saved.order, picked, dz, dz_aug, sums, run.tile, 0)
    totals = torch.zeros(tiles, fields, run.tile, dtype=torch.float64, device=device)
    totals.index_add_(0, picked.owner, sums.double())
    at = dict(zip(kernels.SUMS, totals.unbind(1), strict=True))
    full, aug = (
        StreamSums(*(at.pop(prefix + name) for name in StreamSums._fields))
        for prefix in ("", "aug_")
    )
    return dz, dz_aug, CandidateSums(full, aug, **at)


def _dropped_share(run, picked, sums, beyond, wholes):
    """(T,) the largest share of a row's sum |dz| that lies outside the candidates."""
    s, g = (each(lambda x: x.double()[picked.rows], x) for x in (run.stats, run.upstream))
    bounds = certificate.outside(sums, s, g, run.wanted, beyond, run.call.head)
    asked, sizes = certificate.certified(run.wanted), sums.sizes()
    sizes = tuple(x if i in asked else None for i, x in enumerate(sizes))
    wholes.learn(picked.rows[picked.live], [None if x is None else x[picked.live] for x in sizes])
    whole = wholes.of_rows(picked.rows, sizes)
    share = torch.zeros_like(sums.full.mass)
    for i in asked:
        share = torch.maximum(share, bounds[i] / whole[i].clamp_min(1e-300))
    # NaN compares false with every budget; infinity says the same to a maximum.
    share = torch.where(share.isnan(), torch.inf, share)
    return torch.where(picked.live, share, 0).amax(1)


def _add_products(run, picked, dz, dz_aug, total):
    """Adds to the sum what the entries of some tiles contribute."""
    shared = total.weight is not None or total.bias is not None
    for grad, x, d_states in _streams(run, dz, dz_aug, total):
        if d_states is not None:
            _add_to_states(run, picked, grad, d_states)
        if shared:
            _add_to_weight(run, picked, grad, x, total)


def _add_to_states(run, picked, grad, d_states):
    o, blocks, tiles = run.operands, run.operands.launch.d_hidden, picked.tiles
    # Only the call's last tile can be short, and it is the last of these where it is among them.
    count = (len(tiles) - 1) * run.tile + min(run.tile, run.count - int(tiles[-1]) * run.tile)
    kernels.d_hidden_kernel[(len(tiles), triton.cdiv(o.d, blocks.d))](
        grad, o.weight, picked.rows.flatten(), picked.col, picked.offset, d_states, o.d, count, 0,
        *o.weight.stride(), *d_states.stride(), UPCAST=o.upcast, BLOCK_N=run.tile,
        BLOCK_V=blocks.v, BLOCK_D=blocks.d, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def _add_to_weight(run, picked, grad, x, total):
    o, blocks, owner = run.operands, run.operands.launch.d_weight, picked.owner
    weight, bias = (run.saved.rows if t is None else t for t in (total.weight, total.bias))
    spans = ((0, len(owner)),)
    if torch.are_deterministic_algorithms_enabled():
        # Atomic sums have no order of their own; one launch per tile gives them one.
        ends = torch.bincount(owner, minlength=len(picked.tiles)).cumsum(0).tolist()
        spans = zip([0, *ends[:-1]], ends, strict=True)
    for start, end in spans:
        # one block at least: the bias has a gradient without features too
        kernels.d_weight_kernel[(end - start, max(1, triton.cdiv(o.d, blocks.d)))](
            grad, x, run.saved.order, picked.tile, picked.first, picked.last, picked.col, weight,
            bias, o.d, run.count, start, *x.stride(), o.d, 1,
            WEIGHT=total.weight is not None, BIAS=total.bias is not None,
            UPCAST=o.upcast, BLOCK_N=run.tile, BLOCK_V=o.launch.dz.v,
            BLOCK_D=blocks.d, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
