"""Rows that few words of their own serve: their lists, and products with no other word.

Most rows of a policy put all but a part of 10^-3 of their gradient on a handful of words, and on
other words than the rows beside them. The forward lists the words of each row that are likely in
either stream, with their logits. The backward drops what each row may drop, and multiplies what is
left word by word: no logit is computed again, and no row pays for another one's words.

`Saved.lists` is one int32 tensor, whose parts `Lists` names: where each row's list starts, how many
words it has, the words, and the bits of their float32 logits in each stream.
"""

import math
from typing import NamedTuple

import torch
import triton

from papo_kernels import certificate
from papo_kernels.triton import gradients
from papo_kernels.triton import list_kernels as kernels
from papo_kernels.triton.launch import LAUNCHES

# Room for words, as a mean over rows. Each takes 12 bytes of two streams' lists, so that lists are
# 1.5 % of whole logits in 16 bits where V is 150 000. First come, first served.
MEAN_WORDS, LEAST_MEAN = 768, 16
# A mean row lists one word in so many of the vocabulary at most, and any row one in so many.
SPARSITY, ROW_SPARSITY = 64, 16
MOST_WORDS, MOST_KEPT = 4096, 3000
# Places are 32-bit numbers: so are those of the second stream, and of a chunk that has no room.
MOST_PLACES = 2**30 - 2**24
# Programs that list the words of one row.
PARTS = 16
# exp(-NATS) of the budget is the least probability that is listed: 1e-7 at the default budget.
NATS = 10.2


class Lists(NamedTuple):
    """The parts of `Saved.lists`; P is room for the words of all rows."""

    starts: torch.Tensor  # (N,) int32
    counts: torch.Tensor  # (N,) int32, 0 where a row has no list
    words: torch.Tensor  # (P,) int32
    logits: torch.Tensor  # (streams, P) float32


def places(n, vocab):
    """P: room for the words of n rows."""
    return min(n * min(max(vocab // SPARSITY, LEAST_MEAN), MEAN_WORDS), MOST_PLACES)


def most_words(vocab):
    """The most words that a row lists."""
    return min(max(vocab // ROW_SPARSITY, LEAST_MEAN), MOST_WORDS)


def least_log_prob(budget):
    """The log-prob from which on words are listed."""
    return math.log(budget) - NATS


def size(n, vocab, streams):
    """Elements of `Saved.lists`."""
    return 2 * n + (1 + streams) * places(n, vocab)


def parts(saved, n, streams):
    """Lists of `Saved.lists`, for n rows: views."""
    room = (len(saved) - 2 * n) // (1 + streams)
    starts, counts, words, logits = saved.split([n, n, room, streams * room])
    return Lists(starts, counts, words, logits.view(torch.float32).view(streams, room))


class Writer:
    """Makes the lists of a forward, chunk by chunk.

    blocks: (chunk_rows, blocks) int32, how many words each row lists of each block of words: the
    levels' kernel fills it.
    """

    def __init__(self, call, operands, chunk_rows, saved):
        device, o = saved.device, operands
        self._call, self._operands = call, o
        self._lists = parts(saved, o.n, call.streams)
        blocks = triton.cdiv(o.v, LAUNCHES["levels"]["BLOCK_V"])
        self.blocks = torch.empty(chunk_rows, blocks, dtype=torch.int32, device=device)
        self._totals = torch.empty(chunk_rows, dtype=torch.int32, device=device)
        self._taken = torch.zeros(1, dtype=torch.int32, device=device)

    def write(self, z, order, targets, first, part):
        """Lists of the rows that `order` has from `first` on, whose products are `z`."""
        call, o, sizes, found = self._call, self._operands, LAUNCHES["list"], self._lists
        (chunk_rows, blocks), count = self.blocks.shape, len(z) // call.streams
        room = len(found.words)
        kernels.prefix_kernel[(count,)](
            self.blocks, self._totals, blocks, triton.next_power_of_2(blocks), **LAUNCHES["prefix"]
        )
        kernels.place_kernel[(1,)](
            self._totals, self._taken, order, found.starts, found.counts, count, first, room,
            most_words(o.v), triton.next_power_of_2(chunk_rows), **LAUNCHES["place"],
        )  # fmt: skip
        # A long list takes as long as its words come one after the other: many programs share it.
        at_once = sizes["BLOCK_V"] // LAUNCHES["levels"]["BLOCK_V"]
        each_has = triton.cdiv(triton.cdiv(blocks, PARTS), at_once) * at_once
        kernels.list_kernel[(count, triton.cdiv(blocks, each_has))](
            z, o.bias, part, order, targets, self.blocks, found.starts, found.counts, found.words,
            found.logits, o.n, o.v, count, first, room, blocks, z.stride(0),
            least_log_prob(call.options.grad_budget), 1 / call.head.temperature,
            call.head.softcap or 1.0, TWO=call.streams == 2, HAS_BIAS=o.has_bias,
            CAP=call.head.softcap is not None, PART=each_has, BLOCKS=at_once, **sizes,
        )  # fmt: skip


def add(run, at, beyond, budget, account, total):
    """Adds the gradients of rows whose lists are enough.

    run: a `words.Backward`. at: (R,) rows that count. beyond: `certificate.Beyond` of (N,), for
    words that are not listed. account: `account.Account`. total: `words.GradientSum`, whose
    gradients of states are 0.

    Returns:
        (N,) bool, on the device: which rows were served; and the number of the others in `at`.
    """
    entries = _Entries(run)
    bounds, whole = account.shares(entries.differentiate(run), beyond)
    spare = account.spare(bounds, whole, budget)
    # The bounds hold where all likely words are listed. NaN is not >= 0.
    good = (entries.lists.counts > 0) & (spare >= 0).all(0)
    dropped = entries.drop(run, spare, good)
    # A row with many words left is done faster together with others.
    good &= entries.kept <= MOST_KEPT
    entries.kept.masked_fill_(~good, 0)
    kept, served = torch.stack([entries.kept.sum(), good[at].sum()]).tolist()
    entries.add(run, kept, total)
    if certificate.recording() and served:
        worst = account.largest_share(bounds + dropped, whole)[at][good[at]].max().item()
        certificate.record(served, kept / served, run.operands.v, worst)
    return good, len(at) - served


class _Entries:
    """The words of all rows and their gradients; those of a row that stay come first."""

    def __init__(self, run):
        w = run.wanted
        self.lists = parts(run.saved.lists, run.operands.n, run.call.streams)
        self.words = self.lists.words.clone()
        self.dz = self.lists.logits.new_empty(w.full + w.aug, len(self.words))
        self.kept = None  # (N,) int32, how many of each row stay

    def differentiate(self, run):
        """Fills `dz`; returns (len(SUMS), N) sums of each row over its words."""
        o, head, blocks, found = run.operands, run.call.head, LAUNCHES["dz_listed"], self.lists
        sums = torch.zeros(len(gradients.SUMS), o.n, dtype=torch.float32, device=run.up.device)
        rows = torch.arange(o.n, device=run.up.device)
        gradients.dz_kernel[(triton.cdiv(o.n, blocks["BLOCK_N"]),)](
            found.logits, o.bias, run.targets, rows, run.saved.rows, run.up, found.words,
            found.counts, found.starts, self.dz, sums, o.n, o.v, 0, o.n, 0, len(found.words),
            len(found.words), 0, 1 / head.temperature, head.softcap or 1.0, GATHER=False,
            OWN_WORDS=True, SKIP=False, NET=run.wanted.net, **run.switches, **blocks,
        )  # fmt: skip
        return sums

    def drop(self, run, allowed, good):
        """Drops what rows may drop, and all entries of rows that are not good.

        allowed: (3, N) of sum |dz|, of both streams and of their sum. Returns (3, N), what went.
        """
        n, w = run.operands.n, run.wanted
        self.kept = torch.empty(n, dtype=torch.int32, device=allowed.device)
        dropped, good = torch.empty_like(allowed), good.to(torch.uint8)
        blocks = LAUNCHES["drop"]
        kernels.drop_kernel[(triton.cdiv(n, blocks["BLOCK_N"]),)](
            self.lists.starts, self.lists.counts, self.words, self.dz, allowed, good, self.kept,
            dropped, n, len(self.words), FULL=w.full, AUG=w.aug, NET=w.net, **blocks,
        )  # fmt: skip
        return dropped

    def add(self, run, count, total):
        """Adds the gradients of all operands; count: entries that stay."""
        if not count:
            return
        self._add_states(run, total)
        if total.weight is not None or total.bias is not None:
            self._add_weight(run, count, total)

    def _add_states(self, run, total):
        o, w, blocks = run.operands, run.wanted, LAUNCHES["d_hidden"]
        full, aug = total.hidden is not None and w.full, total.aug_hidden is not None and w.aug
        if not (full or aug) or not o.d:
            return
        dz = self.dz if full else self.dz[-1:]
        out, out_aug = (x if x is not None else self.dz for x in (total.hidden, total.aug_hidden))
        kernels.d_hidden_kernel[(o.n, triton.cdiv(o.d, blocks["BLOCK_D"]))](
            self.lists.starts, self.kept, self.words, dz, o.weight, out, out_aug, len(self.words),
            o.d, *o.weight.stride(), FULL=full, AUG=aug, **blocks,
        )  # fmt: skip

    def _add_weight(self, run, count, total):
        o, w, device = run.operands, run.wanted, self.words.device
        words, rows = torch.empty(2, count, dtype=torch.int32, device=device)
        dz = self.dz.new_empty(len(self.dz), count)
        starts = self.kept.cumsum(0) - self.kept
        kernels.flatten_kernel[(o.n,)](
            self.lists.starts, self.kept, self.words, self.dz, starts, words, rows, dz,
            len(self.words), count, STREAMS=len(dz), **LAUNCHES["flatten"],
        )  # fmt: skip
        # By word, and the rows of a word in their order: its sum has one order.
        words, by_word = words.sort(stable=True)
        rows, dz = rows[by_word], dz[:, by_word]
        every = torch.arange(o.v + 1, dtype=torch.int32, device=device)
        starts = torch.searchsorted(words, every, out_int32=True)
        longest_first = starts.diff().argsort(descending=True, stable=True)
        blocks, aug = LAUNCHES["d_weight"], o.full if o.aug is None else o.aug
        features = triton.cdiv(o.d, blocks["BLOCK_D"]) if total.weight is not None else 0
        out, out_bias = (x if x is not None else dz for x in (total.weight, total.bias))
        kernels.d_weight_kernel[(min(count, o.v), max(1, features))](
            longest_first, starts, rows, dz, o.full, aug, out, out_bias, count, o.d,
            *o.full.stride(), *aug.stride(), FULL=w.full, AUG=w.aug,
            WEIGHT=total.weight is not None, BIAS=total.bias is not None, **blocks,
        )  # fmt: skip
