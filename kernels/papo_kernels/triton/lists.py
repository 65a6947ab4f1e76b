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
from papo_kernels.triton import columns, gradients, launch
from papo_kernels.triton import list_kernels as kernels
from papo_kernels.triton.launch import LAUNCHES
from papo_kernels.triton.words import launch_dz

# Room for words, as a mean over rows. Each takes 12 bytes of two streams' lists, so that lists are
# 1.5 % of whole logits in 16 bits where V is 150 000. First come, first served.
MEAN_WORDS, LEAST_MEAN = 768, 16
# A mean row lists one word in so many of the vocabulary at most, and any row one in so many.
SPARSITY, ROW_SPARSITY = 64, 16
MOST_WORDS = 4096
# A row that keeps more is done faster together with others.
MOST_KEPT = 3000
# Places are 32-bit numbers: so are those of the second stream, and of a chunk that has no room.
MOST_PLACES = 2**30 - 2**24
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

    `levels_kernel` marks the words that rows list in `marks`, (chunk_rows, M) int32, and counts
    them in `totals`, (N,) int32 by the place of rows in the order of chunks. `write` comes after
    it, while the chunk's products are still at hand.
    """

    def __init__(self, call, operands, chunk_rows, saved):
        device, o = saved.device, operands
        self._call, self._operands = call, o
        self._lists = parts(saved, o.n, call.streams)
        self._lanes = LAUNCHES["levels"]["BLOCK_V"]
        marks = triton.cdiv(o.v, 32 * self._lanes) * self._lanes
        self.marks = torch.empty(chunk_rows, marks, dtype=torch.int32, device=device)
        self.totals = torch.zeros(o.n, dtype=torch.int32, device=device)
        chunks = triton.cdiv(o.n, chunk_rows)
        self._taken = torch.zeros(chunks + 1, dtype=torch.int32, device=device)

    def write(self, z, order, first):
        """Lists of the rows that `order` has from `first` on, whose products are `z`."""
        call, o, found = self._call, self._operands, self._lists
        (chunk_rows, marks), count = self.marks.shape, len(z) // call.streams
        kernels.list_kernel[(count,)](
            z, o.bias, order, self.marks, self.totals[first:], self._taken, found.starts,
            found.counts, found.words, found.logits, count, first, marks, len(found.words),
            most_words(o.v), first // chunk_rows, z.stride(0), 1 / call.head.temperature,
            call.head.softcap or 1.0, TWO=call.streams == 2, HAS_BIAS=o.has_bias,
            CAP=call.head.softcap is not None, ROWS=triton.next_power_of_2(chunk_rows),
            LANES=self._lanes, **LAUNCHES["list"],
        )  # fmt: skip


class Served:
    """The rows whose lists are enough: their gradients, of states and of the weight.

    left: (N,) uint8, which rows that count are not served. asked: `launch.Asked` of the numbers of
    entries, of long lists, see `columns`, and of rows that are left.
    """

    def __init__(self, run, beyond, account):
        """run: `words.Backward`. beyond: `certificate.Beyond` of (T,), for unlisted words."""
        self._run, self._entries = run, Entries(run)
        # The bounds hold where all likely words are listed.
        found = account.shares(self._entries.differentiate(run), beyond)
        self._short, self.left, dropped, numbers = self._entries.drop(run, found.spare)
        self.asked = launch.Asked(numbers)
        good = run.live & (self.left == 0) if certificate.recording() else None
        if good is not None and good.any():
            asked = certificate.certified(run.wanted)
            share = ((found.bounds + dropped) / found.whole.clamp_min(1e-300))[asked]
            mean = self._entries.kept[good].double().mean().item()
            worst = share[:, good].max().item()
            certificate.record(int(good.sum()), mean, run.operands.v, worst)

    def add_short(self, total):
        """Adds the gradients of states of rows with short lists.

        total: `words.GradientSum`, whose gradients of states are 0.
        """
        self._entries.add_states(self._run, total, self._short)

    def add_long(self, count, total):
        """The same for long lists, and a part of the weight's; count: how many they are."""
        if not count:
            return
        kept = self._entries.kept
        long = kept > columns.LONG
        if count < columns.FEWEST_ROWS:
            self._entries.add_states(self._run, total, kept.masked_fill(~long, 0))
            return
        columns.add(self._run, self._entries, launch.places(long, count), total)

    def add_weight(self, count, total):
        """Adds what the weight's gradient and the bias's still lack; count: of entries at first."""
        if count and (total.weight is not None or total.bias is not None):
            self._entries.add_weight(self._run, count, total)


class Entries:
    """The words of all rows and their gradients; those of a row that stay come first."""

    def __init__(self, run):
        w = run.wanted
        self.lists = parts(run.saved.lists, run.operands.n, run.call.streams)
        self.words = self.lists.words.clone()
        self.dz = self.lists.logits.new_empty(w.full + w.aug, len(self.words))
        self.kept = None  # (N,) int32, how many of each row stay

    def differentiate(self, run):
        """Fills `dz`; returns (len(SUMS), N) sums of each row over its words."""
        o, found = run.operands, self.lists
        sums = torch.zeros(len(gradients.SUMS), o.n, dtype=torch.float32, device=run.up.device)
        rows = torch.arange(o.n, device=run.up.device)
        launch_dz(
            run, LAUNCHES["dz_listed"], rows, found.logits, found.words, found.counts, found.starts,
            self.dz, sums, o.v, 0, 0, 0, NET=run.wanted.net, OWN_WORDS=True,
        )  # fmt: skip
        return sums

    def drop(self, run, allowed):
        """Drops what rows may drop, and all entries of rows that go another way.

        allowed: (3, N) of sum |dz|, of both streams and of their sum. Returns what `drop_kernel`
        calls short, left, dropped and numbers.
        """
        n, w, device = run.operands.n, run.wanted, allowed.device
        self.kept, short = torch.empty(2, n, dtype=torch.int32, device=device)
        left, dropped = torch.empty(n, dtype=torch.uint8, device=device), torch.empty_like(allowed)
        numbers = torch.zeros(3, dtype=torch.int32, device=device)
        blocks = LAUNCHES["drop"]
        kernels.drop_kernel[(triton.cdiv(n, blocks["BLOCK_N"]),)](
            self.lists.starts, self.lists.counts, run.live.view(torch.uint8), self.words, self.dz,
            allowed, self.kept, short, left, dropped, numbers, n, len(self.words), MOST_KEPT,
            columns.LONG, FULL=w.full, AUG=w.aug, NET=w.net, **blocks,
        )  # fmt: skip
        return short, left, dropped, numbers

    def add_states(self, run, total, kept, at=None, more=None):
        """Writes the gradients of states; a row without entries keeps what it has.

        kept: (N,) int32, how many entries of each row count. at: (R,), for these rows alone, to
        which (S R, D) float32 `more` is added.
        """
        o, w, blocks = run.operands, run.wanted, LAUNCHES["d_hidden"]
        full, aug = total.hidden is not None and w.full, total.aug_hidden is not None and w.aug
        if not (full or aug) or not o.d:
            return
        dz = self.dz if full else self.dz[-1:]
        out, out_aug = (x if x is not None else self.dz for x in (total.hidden, total.aug_hidden))
        rows = o.n if at is None else len(at)
        more, more_aug = (self.dz, self.dz) if at is None else (more, more[-rows:])
        kernels.d_hidden_kernel[(rows, triton.cdiv(o.d, blocks["BLOCK_D"]))](
            kept if at is None else at, self.lists.starts, kept, self.words, dz, o.weight, more,
            more_aug, out, out_aug, len(self.words), o.d, *o.weight.stride(), SOME=at is not None,
            FULL=full, AUG=aug, **blocks,
        )  # fmt: skip

    def add_weight(self, run, count, total):
        """Adds the gradients of weight and bias; count: at least as many as entries stay."""
        o, w, device = run.operands, run.wanted, self.words.device
        # Places that stay empty are of no word.
        words, rows = torch.full((2, count), o.v, dtype=torch.int32, device=device)
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
        starts = torch.searchsorted(words, every, out_int32=True)  # the last is of empty places
        longest_first = starts.diff().argsort(descending=True, stable=True)
        blocks, aug = LAUNCHES["d_weight"], o.full if o.aug is None else o.aug
        features = triton.cdiv(o.d, blocks["BLOCK_D"]) if total.weight is not None else 0
        out = total.weight_parts if total.weight is not None else (dz, dz)
        out_bias = dz if total.bias is None else total.bias
        kernels.d_weight_kernel[(min(count, o.v), max(1, features))](
            longest_first, starts, rows, dz, o.full, aug, *out, out_bias, count, o.d,
            *o.full.stride(), *aug.stride(), FULL=w.full, AUG=w.aug, SPLIT=total.split,
            WEIGHT=total.weight is not None, BIAS=total.bias is not None, **blocks,
        )  # fmt: skip
