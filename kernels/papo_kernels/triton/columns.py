"""Rows with long lists: the words that most of them want, as columns of one matrix.

Each word of a list is a row of the weight to be gathered, twice. Rows with hundreds of words want
mostly the same ones. The gradients of those go into a matrix of rows by words, most of it 0, which
cuBLAS multiplies faster than its entries could be gathered. Other words of a row stay in its list.
"""

import torch
import triton
import triton.language as tl

from papo_kernels.triton import launch
from papo_kernels.triton.launch import LAUNCHES, multiply, multiply_add
from papo_kernels.triton.words import add_rows

# A row with more words than this is long; for fewer rows the matrix does not pay.
LONG, FEWEST_ROWS = 192, 256
# Columns, and rows of the matrix at a time: 64 MiB of two streams in 16 bits.
WORDS, ROWS = 8192, 2048


def add(run, entries, at, total):
    """Adds all gradients of states of the (R,) rows `at`, and of the weight those of some words.

    run: a `words.Backward`. entries: `lists.Entries`, whose lists have only the other words of
    these rows afterwards. total: `words.GradientSum`.
    """
    o, found = run.operands, entries.lists
    commonest, column = _commonest(entries, at, o.v)
    wants_states = total.hidden is not None or total.aug_hidden is not None
    weight = o.weight.index_select(0, commonest) if wants_states else None
    more = None
    if total.weight is not None:
        more = torch.zeros(len(commonest), o.d, dtype=torch.float32, device=at.device)
    for some in at.split(ROWS):
        dz = torch.zeros(
            len(entries.dz) * len(some), len(commonest), dtype=o.dtype, device=at.device
        )
        spread_kernel[(len(some),)](
            some, found.starts, entries.kept, entries.words, entries.dz, column, dz, len(some),
            len(entries.words), len(commonest), STREAMS=len(entries.dz), **LAUNCHES["spread"],
        )  # fmt: skip
        if wants_states:
            products = torch.empty(len(dz), o.d, dtype=torch.float32, device=at.device)
            multiply(dz, weight, products)
            entries.add_states(run, total, entries.kept, some, products)
        if more is not None:
            multiply_add(more, dz.T, run.differentiated(run.states(some)))
        if total.bias is not None:
            add_rows(total.bias[:, None], dz.sum(0, dtype=torch.float32)[:, None], commonest)
    if more is not None:
        total.add_weight(more, commonest)


def _commonest(entries, at, vocab):
    """(C,) int64 words that most of the rows `at` have, and (V,) int32 their columns or -1."""
    often = torch.zeros(vocab, dtype=torch.int32, device=at.device)
    tally_kernel[(len(at),)](
        at, entries.lists.starts, entries.kept, entries.words, often, **LAUNCHES["tally"]
    )
    words = often.argsort(descending=True, stable=True)[: min(WORDS, launch.even_down(vocab // 4))]
    column = torch.full_like(often, -1)
    numbers = torch.arange(len(words), dtype=torch.int32, device=at.device)
    return words, column.scatter_(0, words, numbers)


@triton.jit
def tally_kernel(rows_ptr, start_ptr, kept_ptr, word_ptr, often_ptr, BLOCK: tl.constexpr):
    """Counts in (V,) int32 `often` how many of the rows have a word; one row a program."""
    row = tl.load(rows_ptr + tl.program_id(0))
    kept, start = tl.load(kept_ptr + row), tl.load(start_ptr + row)
    for n in range(0, kept, BLOCK):
        k = n + tl.arange(0, BLOCK)
        word = tl.load(word_ptr + start + k, mask=k < kept, other=0)
        # Sums of integers are the same in every order.
        tl.atomic_add(often_ptr + word, 1, mask=k < kept)


@triton.jit(do_not_specialize=["rows", "P"])
def spread_kernel(
    rows_ptr, start_ptr, kept_ptr, word_ptr, dz_ptr, column_ptr, out_ptr, rows, P, width,
    STREAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves the entries of a row that have columns into its row of the matrix; one row a program.

    The others move to the list's beginning, in their order, and kept[row] becomes their number.
    word: (P,); dz: (S, P); column: (V,), or -1; out: (S, rows, width), zeros.
    """
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i)
    kept, start = tl.load(kept_ptr + row), tl.load(start_ptr + row)
    out = out_ptr + i.to(tl.int64) * width
    stay = kept * 0
    for n in range(0, kept, BLOCK):
        k = n + tl.arange(0, BLOCK)
        live = k < kept
        word = tl.load(word_ptr + start + k, mask=live, other=0)
        column = tl.load(column_ptr + word, mask=live, other=0)
        moves, stays = live & (column >= 0), live & (column < 0)
        place = start + stay + tl.cumsum(stays.to(tl.int32), 0) - 1
        for s in tl.static_range(STREAMS):
            dz = tl.load(dz_ptr + (s * P + start + k), mask=live, other=0.0)
            tl.store(out + s * rows * width + column, dz, mask=moves)
            tl.debug_barrier()  # entries have been read before others take their places
            tl.store(dz_ptr + (s * P + place), dz, mask=stays)
        tl.store(word_ptr + place, word, mask=stays)
        stay += tl.sum(stays.to(tl.int32), 0)
    tl.store(kept_ptr + row, stay)
