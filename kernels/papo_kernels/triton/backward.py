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
from papo_kernels.certificate import ATTEMPTS, DENSE_SHARE, RESERVE, Beyond, record
from papo_kernels.precision import exact_float32
from papo_kernels.rows import each, make_wanted, unpack
from papo_kernels.triton import gradients, launch, lists
from papo_kernels.triton import plan_kernels as kernels
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
        if not isinstance(scale, float):
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
    counts, o, device = _counts(run.saved.levels), run.operands, run.targets.device
    tile = torch.empty(o.n, dtype=torch.int32, device=device)
    beyond = Beyond(*torch.empty(2, run.tiles, dtype=torch.float64, device=device))
    kernels.begin_kernel[(run.tiles,)](
        run.saved.order, counts, tile, *beyond, o.n, counts.shape[1],
        lists.least_log_prob(run.call.options.grad_budget), PARTS=COUNT_PARTS, TILE=launch.TILE,
        **LAUNCHES["begin"],
    )  # fmt: skip
    account = Account(run, tile, run.live.sum()[None], budget)
    served = lists.Served(run, beyond, account)
    served.add_short(total)
    entries, long, left = served.asked.tolist()
    served.add_long(long, total)
    if not left:
        served.add_weight(entries, total)
        return Left(run.saved.order[:0])
    groups = _Groups(run, served.left, left, tile, counts, budget, account)
    served.add_weight(entries, total)
    del served  # and all lists
    return groups.add(total)


class _Groups:
    """Rows that their tiles' words serve, GROUP_ROWS together.

    They stand by how many words their tiles want.
    """

    def __init__(self, run, is_left, left, tile, counts, budget, account):
        """is_left: (N,) uint8, which rows these are; left: how many. tile: (N,) the tile of each
        row. counts: see `_counts`."""
        self._run, self._is_left, self._left, self._tile = run, is_left, left, tile
        self._counts, self._budget, self._account = counts, budget, account
        device, tiles, vocab = tile.device, run.tiles, run.operands.v
        count = triton.cdiv(left, GROUP_ROWS)
        self._level, self._limit, wanted = torch.empty(3, tiles, dtype=torch.int32, device=device)
        self._few, self._good = torch.empty(2, tiles, dtype=torch.uint8, device=device)
        self._beyond = Beyond(*torch.empty(2, tiles, dtype=torch.float64, device=device))
        self._numbers = torch.zeros(ATTEMPTS + 1, 1 + count, dtype=torch.int32, device=device)
        self._asked = None
        self._share = torch.zeros(run.operands.n, dtype=torch.float64, device=device)
        self._choose(self._numbers[0], wanted)
        self._at = self._in_order(wanted)
        self._tiles, self._is_target, self._done = (
            torch.zeros(count, n, dtype=torch.uint8, device=device) for n in (tiles, vocab, vocab)
        )
        blocks = LAUNCHES["mark"]
        kernels.mark_kernel[(triton.cdiv(left, blocks["BLOCK"]),)](
            self._at, tile, run.targets, self._tiles, self._is_target, left, GROUP_ROWS, tiles,
            vocab, **blocks,
        )  # fmt: skip
        self._more = torch.empty_like(self._done)
        self._ask(self._numbers[0])
        shape = len(gradients.SUMS), run.operands.n
        self._sums = torch.zeros(shape, dtype=torch.float32, device=device)

    def _choose(self, numbers, wanted, share=None):
        """Chooses the levels of tiles, at first or by the (N,) shares that their rows drop.

        wanted: (T,) int32, to which it writes at first how many words tiles want.
        """
        run, saved, o = self._run, self._run.saved, self._run.operands
        kernels.choose_kernel[(run.tiles,)](
            saved.order, self._is_left, self._counts, saved.rows,
            saved.rows if share is None else share, self._level, self._few, self._good,
            *self._beyond, self._limit, wanted, numbers, o.n, o.v, self._counts.shape[1],
            int(DENSE_SHARE * o.v), self._budget, ASSUMED_TIGHTNESS,
            TWO=run.call.streams == 2 and not run.call.options.aug_constant,
            KNOWN=share is not None, PARTS=COUNT_PARTS, TILE=launch.TILE, **LAUNCHES["choose"],
        )  # fmt: skip

    def _in_order(self, wanted):
        """(R,) the rows that are left, by how many words their tiles want."""
        run, tiles = self._run, wanted.argsort(stable=True)
        rows_of = torch.empty(run.tiles * launch.TILE, dtype=torch.int64, device=tiles.device)
        here = torch.empty_like(rows_of, dtype=torch.uint8)
        kernels.arrange_kernel[(run.tiles,)](
            run.saved.order, self._is_left, tiles, rows_of, here, run.operands.n,
            TILE=launch.TILE, **LAUNCHES["arrange"],
        )  # fmt: skip
        return rows_of[launch.places(here, self._left)]

    def _ask(self, numbers):
        """Chooses the words that groups get next.

        It asks how many rows would be left, and how many words they are, of each group.
        """
        run, blocks = self._run, LAUNCHES["choose_words"]
        grid = (triton.cdiv(run.operands.v, blocks["BLOCK_V"]), len(self._done))
        kernels.choose_words_kernel[grid](
            run.saved.levels, self._limit, self._tiles, self._is_target, self._done, self._more,
            numbers, run.tiles, run.operands.v, **blocks,
        )  # fmt: skip
        self._asked = launch.Asked(numbers)

    def add(self, total):
        """Adds gradients to a `words.GradientSum`; returns `Left`, the rows that need more."""
        for attempt in range(1, ATTEMPTS + 1):
            left, *words = self._asked.tolist()
            if not any(words):
                break
            _add_groups(self._run, self._at, self._more, words, self._sums, total)
            self._learn(self._numbers[attempt], attempt == ATTEMPTS)
        else:
            left, *_ = self._asked.tolist()
        if certificate.recording():
            self._record()
        if not left:
            return Left(self._at[:0])
        at = launch.places(self._good[self._tile[self._at]] == 0, left)
        return Left(self._at[at], self._done, at // GROUP_ROWS)

    def _learn(self, numbers, last):
        """Finds tiles that drop too much, and unless it is last asks for more of their words."""
        self._share = self._account.shares(self._sums, self._beyond).largest
        self._choose(numbers, self._limit, self._share)
        if last:
            self._asked = launch.Asked(numbers)
        else:
            self._ask(numbers)

    def _record(self):
        """Tells of the rows that are good, a group's together."""
        good = (self._good[self._tile[self._at]] != 0).split(GROUP_ROWS)
        kept, shares = self._done.sum(1).tolist(), self._share[self._at].split(GROUP_ROWS)
        for words, ok, dropped in zip(kept, good, shares, strict=True):
            if ok.any():
                record(int(ok.sum()), words, self._run.operands.v, dropped[ok].max().item())


def _counts(levels):
    """(T, parts, LEVELS) int32: words of each level of every tile, in COUNT_PARTS parts or less."""
    tiles, vocab = levels.shape
    blocks = LAUNCHES["count_levels"]
    per_part = triton.cdiv(triton.cdiv(vocab, COUNT_PARTS), blocks["BLOCK_V"]) * blocks["BLOCK_V"]
    parts = triton.cdiv(vocab, per_part)
    counts = levels.new_empty(tiles, parts, certificate.LEVELS, dtype=torch.int32)
    kernels.count_levels_kernel[(parts, tiles)](levels, counts, vocab, per_part, **blocks)
    return counts


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
