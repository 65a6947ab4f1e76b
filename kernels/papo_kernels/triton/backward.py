"""Host side of the Triton backward: the choice of words, the certificate and the order of work.

Rows whose lists are enough are done first: see `lists`. Of the others, those whose tiles want about
as many words go together in groups, which get the gradients of all words that one of their tiles
wants. What a row of them drops is known when all groups are done. A group of which a row drops too
much gets more words then, and at last all the others. Nothing is ever taken back, and the host asks
the device for numbers a few times a pass, not once a group.
"""

from dataclasses import dataclass

import torch
import triton

from papo_kernels import certificate, rows
from papo_kernels.certificate import (
    ATTEMPTS,
    DENSE_SHARE,
    RESERVE,
    Beyond,
    record,
)
from papo_kernels.precision import exact_float32
from papo_kernels.rows import each, make_wanted, unpack
from papo_kernels.triton import gradients as kernels
from papo_kernels.triton import launch, lists
from papo_kernels.triton.account import Account
from papo_kernels.triton.forward import names
from papo_kernels.triton.launch import LAUNCHES, kernel_operands
from papo_kernels.triton.words import (
    Backward,
    GradientSum,
    Words,
    add,
    gradients_of_states,
)

# Rows of a group. More of them share more words that one of them alone wants; fewer of them read
# the weight and add to its gradient more often.
GROUP_ROWS = 2048
# Elements of the weight that a group gathers at a time, and of its gradient: 64 MiB in 16 bits.
GATHERED_ELEMENTS = 1 << 25
# Rows that are done densely together. Their states' gradients stay in float32 meanwhile.
DENSE_ROWS = 4096
# Parts of a tile's levels that are counted at once.
COUNT_PARTS = 16
# What is assumed of all tiles at first: see `certificate.choose_levels`.
ASSUMED_TIGHTNESS = 1 / 4


def backward(call, saved, upstream, needs):
    """Gradients of the four operands in their dtypes, or None where `needs` is False.

    saved: `rows.Saved` as the forward made it. upstream: Upstream of (N,). needs: four bools.
    """
    with torch.cuda.device_of(call.hidden), exact_float32(torch.backends.cuda.matmul):
        scale = _scale(call, upstream)
        upstream = each(lambda x: x * scale, upstream)
        run = _backward_of(call, saved, upstream, needs)
        total = GradientSum(run)
        if len(run.targets) and (run.wanted.full or run.wanted.aug):
            if len(saved.levels):
                left = _sparse(run, RESERVE * call.options.grad_budget, total)
            else:
                left = Left(saved.order[: int(run.live.sum())])
            _dense(run, left, total)
        return total.gradients(scale)


def _scale(call, upstream):
    """A power of two that keeps gradients of logits within float16, or 1.

    The mean over many rows has upstream gradients that float16's smallest numbers do not resolve,
    and a scaler of the loss has some that it does not hold.
    """
    if torch.float16 not in (call.hidden.dtype, call.weight.dtype):
        return 1.0
    given = [g.abs().amax() for g in upstream.flat if g is not None and len(g)]
    if not given:
        return 1.0
    _, exponent = torch.frexp(torch.stack(given).amax().float().nan_to_num(1, 1, 1))
    return torch.ldexp(torch.ones((), device=exponent.device), -exponent.clamp(-60, 60))


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
        call.targets != call.options.ignore_index,
    )


# ---- Dense rows


@dataclass(frozen=True)
class Left:
    """Rows that need all words, but for those that they have got."""

    rows: torch.Tensor  # (R,)
    done: torch.Tensor | None = None  # (G, V) bool, words that the rows of a group have got
    group: torch.Tensor | None = None  # (R,) a row's group


def _dense(run, left, total):
    """Adds to the sum what some rows still lack."""
    for n in range(0, len(left.rows), DENSE_ROWS):
        some = slice(n, n + DENSE_ROWS)
        at = left.rows[some]
        states = run.states(at)
        found = gradients_of_states(run, states, total)
        size = launch.even_down(rows.CHUNK_ELEMENTS // len(at))
        for words in Words(0, run.operands.v).split(size):
            skip = None
            if left.done is not None:
                span = left.done[:, words.start : words.start + words.count]
                skip = span[left.group[some]].view(torch.uint8)
            add(run, at, states, words, skip, run.up, found, total)
        total.add_states(run, at, found)
        record(len(at), run.operands.v, run.operands.v, None)


# ---- Sparse tiles


def _sparse(run, budget, total):
    """Adds the gradients of the rows that few words serve; returns the others, a `Left`.

    Where the host has to know a number, the device still has work of before it is told.
    """
    counts = _counts(run.saved.levels)
    at = run.saved.order
    tile = torch.empty_like(run.targets)  # (N,)
    tile[at] = torch.arange(len(at), device=at.device) // launch.TILE
    account = Account(run)
    beyond = certificate.beyond_lists(counts, lists.least_log_prob(run.call.options.grad_budget))
    served = lists.Served(run, each(lambda x: x[tile], beyond), budget, account)
    served.add_short(total)
    entries, long, left = served.asked.tolist()
    served.add_long(long, total)
    if not left:
        served.add_weight(entries, total)
        return Left(at[:0])
    # In the order of tiles.
    at = at[launch.places((run.live & ~served.good)[at], left)]
    groups = _Groups(run, at, tile, counts, budget, account)
    served.add_weight(entries, total)
    return groups.add(total)


class _Groups:
    """Rows that their tiles' words serve, GROUP_ROWS together.

    They stand by how many words their tiles want.
    """

    def __init__(self, run, at, tile, counts, budget, account):
        """at: (R,) rows. tile: (N,) the tile of each row. counts: (T, LEVELS), see `_counts`."""
        self._run, self._counts, self._tile = run, counts, tile
        self._budget, self._account = budget, account
        vocab, device = run.operands.v, run.targets.device
        self._highest = _highest_entropies(run, at, tile[at])
        self._level, self._beyond, self._few = self._choose(
            torch.full((run.tiles, 1), ASSUMED_TIGHTNESS, dtype=torch.float64, device=device), False
        )
        order = _ranks_of_tiles(run, counts, self._level, self._few)[tile[at]].argsort(stable=True)
        self._at = at = at[order]
        self._group = torch.arange(len(at), device=device) // GROUP_ROWS
        count = triton.cdiv(len(at), GROUP_ROWS)
        self._tiles = torch.zeros(count, run.tiles, dtype=torch.bool, device=device)
        # A Python number would be copied to the device, which waits for it.
        self._true = torch.ones((), dtype=torch.bool, device=device)
        self._tiles.index_put_((self._group, tile[at]), self._true)
        self._done = torch.zeros(count, vocab, dtype=torch.bool, device=device)
        shape = len(kernels.SUMS), run.operands.n
        self._sums = torch.zeros(shape, dtype=torch.float32, device=device)
        self._share = self._sums.new_zeros(len(at))  # (R,) what each row drops
        self._ask(self._few, torch.zeros_like(self._few))

    def _choose(self, tightness, known):
        most = DENSE_SHARE * self._run.operands.v
        return certificate.choose_levels(
            self._counts, self._highest, tightness, known, self._budget, most
        )

    def _ask(self, tiles, bad):
        """Asks how many words the groups get for (T,) `tiles`, and how many rows would be left.

        bad: (T,), tiles of which a row drops too much so far.
        """
        self._more = self._more_words(tiles)
        self._good = (self._few & ~bad)[self._tile[self._at]]
        self._asked = launch.Asked(torch.cat([self._more.sum(1), (~self._good).sum()[None]]))

    def add(self, total):
        """Adds gradients to a `words.GradientSum`; returns `Left`, the rows that need more."""
        for attempt in range(ATTEMPTS):
            *words, left = self._asked.tolist()
            if not any(words):
                break
            _add_groups(self._run, self._at, self._more, words, self._sums, total)
            self._done |= self._more
            self._learn(attempt + 1 == ATTEMPTS)
        else:
            *_, left = self._asked.tolist()
        if certificate.recording():
            _record(self._run, self._good, self._done, self._share)
        at = launch.places(~self._good, left)
        return Left(self._at[at], self._done, self._group[at])

    def _learn(self, last):
        """Finds tiles that drop too much, and unless it is last asks for more of their words."""
        tile, at, beyond = self._tile, self._at, self._beyond
        bounds = self._account.shares(self._sums, each(lambda x: x[tile], beyond))
        self._share = self._account.largest_share(*bounds)[at]
        share = _largest(self._share, tile[at], self._run.tiles)
        bad = self._few & (share > self._budget)
        asked = torch.zeros_like(bad)
        if not last:
            tightness = (share / beyond.mass.clamp_min(1e-30))[:, None]
            better, reached, worth = self._choose(tightness, True)
            self._few, asked = self._few & (worth | ~bad), bad & worth
            self._level = torch.where(asked, better, self._level)
            pairs = zip(reached, beyond, strict=True)
            self._beyond = Beyond(*(torch.where(asked, torch.minimum(a, b), b) for a, b in pairs))
        self._ask(asked, bad)

    def _more_words(self, asked):
        """(G, V) bool: the words that tiles `asked` want up to their level, but for those done.

        The targets of their rows are among them.
        """
        run, blocks = self._run, LAUNCHES["choose_words"]
        wanted = torch.zeros_like(self._done)
        targets = run.targets[self._at]
        targets = torch.where((targets >= 0) & (targets < run.operands.v), targets, 0)
        wanted.index_put_((self._group, targets), self._true)
        limit = torch.where(asked, self._level, -1)
        masks = (x.view(torch.uint8) for x in (self._tiles, self._done, wanted))
        grid = (triton.cdiv(run.operands.v, blocks["BLOCK_V"]), len(wanted))
        kernels.choose_words_kernel[grid](
            run.saved.levels, limit, *masks, run.tiles, run.operands.v, **blocks
        )
        return wanted


def _counts(levels):
    """(T, LEVELS) int64: words of each level of every tile."""
    tiles, vocab = levels.shape
    blocks = LAUNCHES["count_levels"]
    per_part = triton.cdiv(triton.cdiv(vocab, COUNT_PARTS), blocks["BLOCK_V"]) * blocks["BLOCK_V"]
    parts = triton.cdiv(vocab, per_part)
    counts = levels.new_empty(tiles, parts, certificate.LEVELS, dtype=torch.int32)
    kernels.count_levels_kernel[(parts, tiles)](levels, counts, vocab, per_part, **blocks)
    return counts.sum(1)


def _highest_entropies(run, at, tile):
    """(T,) the highest entropy of a tile's rows `at`, in either stream that may get gradients.

    tile: (R,), that of each row.
    """
    streams = (run.stats.full, None if run.call.options.aug_constant else run.stats.aug)
    entropies = [s.entropy for s in streams if s is not None]
    return _largest(torch.stack(entropies).amax(0)[at], tile, run.tiles)


def _largest(x, tile, tiles):
    """(T,) the largest of (R,) `x` >= 0 in each tile, 0 of none; NaN where one of them is."""
    found = x.new_zeros(tiles)
    return found.scatter_reduce(0, tile, x, "amax")


def _ranks_of_tiles(run, counts, level, few):
    """(T,) places of tiles in the order of the words that they want."""
    wanted = counts.cumsum(1).gather(1, level.clamp(max=certificate.LEVELS - 1)[:, None]).squeeze(1)
    return torch.where(few, wanted, run.operands.v).argsort(stable=True).argsort(stable=True)


def _add_groups(run, at, more, counts, sums, total):
    """Adds the gradients of every group's words in (G, V) `more`; counts: how many they are."""
    listed = more.nonzero_static(size=sum(counts))[:, 1].to(torch.int32)
    size = launch.even_down(GATHERED_ELEMENTS // max(1, run.operands.d))
    groups = zip(listed.split(counts), at.split(GROUP_ROWS), strict=True)
    for words, some in groups:
        if not len(words):
            continue
        states = run.states(some)
        found = gradients_of_states(run, states, total)
        for piece in Words(0, len(words), words).split(size):
            add(run, some, states, piece, None, sums, found, total)
        total.add_states(run, some, found)


def _record(run, good, done, share):
    """Tells of the rows that are good, a group's together."""
    kept = done.sum(1).tolist()
    for words, ok, dropped in zip(
        kept, good.split(GROUP_ROWS), share.split(GROUP_ROWS), strict=True
    ):
        if ok.any():
            record(int(ok.sum()), words, run.operands.v, dropped[ok].max().item())
