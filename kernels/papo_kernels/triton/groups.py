"""Rows that go in groups: what each drops, and the words that it gets.

Rows whose tiles want about as many words go together. A group gets the gradients of all words that
one of its tiles wants. What a row drops is known when all groups are done. A group of which a row
drops too much gets more words then, and at last its rows get all the others. Nothing is ever taken
back, and the host asks the device for numbers once a pass over all groups, not once a group.
"""

from dataclasses import dataclass

import torch
import triton

from papo_kernels import certificate
from papo_kernels.certificate import ATTEMPTS, DENSE_SHARE, Beyond, record
from papo_kernels.triton import gradients, launch
from papo_kernels.triton import plan_kernels as kernels
from papo_kernels.triton.launch import LAUNCHES
from papo_kernels.triton.words import (
    add_products,
    evened,
    gradients_of_logits,
    gradients_of_states,
)

# Rows of a group. More of them share more words that one of them alone wants; fewer of them read
# the weight and add to its gradient more often.
GROUP_ROWS = 2048
# Elements of the weight that a group gathers at a time, and of its gradient: 64 MiB in 16 bits.
GATHERED_ELEMENTS = 1 << 25
# Parts of a tile's levels that are counted at once.
COUNT_PARTS = 16
# What is assumed of all tiles at first: see `certificate.choose_levels`.
ASSUMED_TIGHTNESS = 1 / 4


@dataclass(frozen=True)
class Left:
    """Rows that need all words, but for those that they have got."""

    rows: torch.Tensor  # (R,)
    done: torch.Tensor | None = None  # (G, V) uint8, words that the rows of a group have got
    group: torch.Tensor | None = None  # (R,) a row's group


def count_levels(levels):
    """(T, parts, LEVELS) int32 numbers of words of each level, in COUNT_PARTS parts or less.

    levels: (T, V).
    """
    tiles, vocab = levels.shape
    blocks = LAUNCHES["count_levels"]
    per_part = triton.cdiv(triton.cdiv(vocab, COUNT_PARTS), blocks["BLOCK_V"]) * blocks["BLOCK_V"]
    parts = triton.cdiv(vocab, per_part)
    counts = levels.new_empty(tiles, parts, certificate.LEVELS, dtype=torch.int32)
    kernels.count_levels_kernel[(parts, tiles)](levels, counts, vocab, per_part, **blocks)
    return counts


def _rows_of_groups(left):
    """Rows of each group; the last one has the rest. As few groups as can be, of about one size.

    A group of few rows beside full ones would gather as much of the weight for less.
    """
    return min(GROUP_ROWS, launch.even_up(triton.cdiv(left, triton.cdiv(left, GROUP_ROWS))))


class Groups:
    """Rows that their tiles' words serve, GROUP_ROWS together at most.

    They stand by how many words their tiles want.
    """

    def __init__(self, run, is_left, left, tile, counts, budget, account):
        """is_left: (N,) uint8, which rows these are; left: how many. tile: (N,) the tile of each
        row. counts: see `count_levels`. budget: the share of its gradient that a row may drop."""
        self._run, self._is_left, self._left, self._tile = run, is_left, left, tile
        self._counts, self._budget, self._account = counts, budget, account
        device, tiles, vocab = tile.device, run.tiles, run.operands.v
        self._rows = _rows_of_groups(left)
        count = triton.cdiv(left, self._rows)
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
            self._at, tile, run.targets, self._tiles, self._is_target, left, self._rows, tiles,
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
            self._add_words(words, total)
            self._learn(self._numbers[attempt], attempt == ATTEMPTS)
        else:
            left, *_ = self._asked.tolist()
        if certificate.recording():
            self._record()
        if not left:
            return Left(self._at[:0])
        at = launch.places(self._good[self._tile[self._at]] == 0, left)
        return Left(self._at[at], self._done, at // self._rows)

    def _add_words(self, counts, total):
        """Adds the gradients of the words that `_more` marks; counts: how many of each group."""
        run, weight = self._run, self._run.operands.weight
        listed = self._more.nonzero_static(size=sum(counts))[:, 1].to(torch.int32)
        size = launch.even_down(GATHERED_ELEMENTS // max(1, run.operands.d))
        groups = zip(listed.split(counts), self._at.split(self._rows), strict=True)
        for words, at in groups:
            if not len(words):
                continue
            states = run.states(at)
            found = gradients_of_states(run, states, total)
            for n, part in enumerate(words.split(size)):
                some = weight.index_select(0, evened(part))
                dz = gradients_of_logits(run, at, states, some, part, self._sums)
                add_products(run, dz, some, states, part, found, n == 0, total)
            total.add_states(run, at, found)

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
        good = (self._good[self._tile[self._at]] != 0).split(self._rows)
        kept, shares = self._done.sum(1).tolist(), self._share[self._at].split(self._rows)
        for words, ok, share in zip(kept, good, shares, strict=True):
            if ok.any():
                record(int(ok.sum()), words, self._run.operands.v, share[ok].max().item())
