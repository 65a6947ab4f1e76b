"""Triton kernels for rows that have a list of their own words, and for products with its entries.

Shapes: N rows of a call, V words, D features, S streams that get gradients, P places of all lists,
E entries that are left of them. The list of row r has count[r] places, from start[r] on.
"""

import triton
import triton.language as tl

from papo_kernels.triton.gradients import load_sum, store_sum
from papo_kernels.triton.kernels import logits, ones

# Halvings of the search for the size below which a row's entries are dropped, from 2^-DEPTH to 1.
HALVINGS, DEPTH = tl.constexpr(12), tl.constexpr(40.0)


@triton.jit(do_not_specialize=["rows", "first", "P", "most", "chunk"])
def list_kernel(
    z_ptr, b_ptr, rows_ptr, mark_ptr, total_ptr, taken_ptr, starts_ptr, counts_ptr, word_ptr,
    logit_ptr, rows, first, marks, P, most, chunk, stride_z, sharpness, softcap,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gives the rows of a chunk places one after the other, and lists their words and logits there.

    One row a program. A row with more than `most` words, or for which no places are left, gets
    none: counts[row] is 0. mark, total: as `levels_kernel` left them, of LANES words a block.
    taken: (chunks + 1,), places that are taken when a chunk begins. word: (P,); logit: (S, P). ROWS
    is at least `rows`.
    """
    r = tl.program_id(0)
    other = tl.arange(0, ROWS)
    total = tl.load(total_ptr + other, mask=other < rows, other=0)
    total = tl.where(total <= most, total, 0)
    taken = tl.load(taken_ptr + chunk)
    start = taken + tl.sum(tl.where(other < r, total, 0), 0)
    count = tl.sum(tl.where(other == r, total, 0), 0)
    count = tl.where(start + count <= P, count, 0)
    row = tl.load(rows_ptr + first + r)
    tl.store(starts_ptr + row, start)
    tl.store(counts_ptr + row, count)
    if r == 0:
        tl.store(taken_ptr + chunk + 1, tl.minimum(taken + tl.sum(total, 0), P))
    if count > 0:
        before = start
        for n in range(0, marks, BLOCK):
            at = n + tl.arange(0, BLOCK)
            mark = tl.load(mark_ptr + r * marks + at, mask=at < marks, other=0)
            number = ones(mark)
            place = before + tl.cumsum(number, 0) - number
            before += tl.sum(number, 0)
            word = at // LANES * (32 * LANES) + at % LANES
            for _ in range(tl.max(number, 0)):
                lowest = mark & -mark
                # The place of the only bit is the exponent of the number.
                bit = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
                tl.store(word_ptr + place, word + bit * LANES, mask=lowest != 0)
                mark ^= lowest
                place += 1
        tl.debug_barrier()  # words that others wrote can be read
    z_row = z_ptr + r.to(tl.int64) * stride_z
    aug_row = z_ptr + (r + rows).to(tl.int64) * stride_z
    for n in range(0, count, BLOCK_V):
        at = n + tl.arange(0, BLOCK_V)
        live = at < count
        col = tl.load(word_ptr + start + at, mask=live, other=0)
        z = logits(z_row + col, live, b_ptr, col, live, sharpness, softcap, HAS_BIAS, CAP)
        tl.store(logit_ptr + start + at, z, mask=live)
        if TWO:
            z = logits(aug_row + col, live, b_ptr, col, live, sharpness, softcap, HAS_BIAS, CAP)
            tl.store(logit_ptr + (P + start + at), z, mask=live)


@triton.jit(do_not_specialize=["N", "P"])
def drop_kernel(
    start_ptr, count_ptr, live_ptr, word_ptr, dz_ptr, allowed_ptr, kept_ptr, short_ptr, left_ptr,
    dropped_ptr, numbers_ptr, N, P, most_kept, long, FULL: tl.constexpr, AUG: tl.constexpr,
    NET: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Drops the smallest entries of a row's list that it may drop; BLOCK_N rows a program.

    The others move to the list's beginning, in their order. A row keeps none, and is left to go
    another way, if it has no list, if its other words alone hold more than may go (`allowed` is
    negative or NaN), or if more than `most_kept` stay.

    live: (N,) uint8, which rows count; word: (P,); dz: (S, P); allowed: (3, N) of sum |dz| in both
    streams and in their sum. Writes (N,) int32 `kept`, how many stay, and `short`, the same but 0
    for more than `long`; (N,) uint8 `left`; (3, N) `dropped`, what was dropped. Adds to numbers[0]
    how many entries stay, to numbers[1] of how many rows more than `long`, and to numbers[2] how
    many rows are left.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < N
    counted = tl.load(live_ptr + row, mask=inside, other=0) != 0
    start = tl.load(start_ptr + row, mask=inside, other=0)[:, None]
    count = tl.load(count_ptr + row, mask=counted, other=0)
    allowed = tl.load(allowed_ptr + row, mask=counted, other=-1.0)
    allowed_aug = tl.load(allowed_ptr + N + row, mask=counted, other=-1.0)
    allowed_net = tl.load(allowed_ptr + 2 * N + row, mask=counted, other=-1.0)
    good = (count > 0) & (allowed >= 0) & (allowed_aug >= 0) & (allowed_net >= 0)
    count = tl.where(good, count, 0)
    longest = tl.max(count, 0)
    count = count[:, None]
    allowed = tl.where(good, allowed, 1.0)[:, None]
    allowed_aug = tl.where(good, allowed_aug, 1.0)[:, None]
    allowed_net = tl.where(good, allowed_net, 1.0)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    high = tl.zeros((BLOCK_N,), tl.float32)
    low = high - DEPTH
    # The largest limit below which all entries may go together.
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        limit = tl.exp2(middle)[:, None]
        taken = tl.zeros((BLOCK_N, BLOCK), tl.float32)
        taken_aug, taken_net = taken, taken
        for n in range(0, longest, BLOCK):
            a, b = entry(dz_ptr, start + n + at, P, n + at < count, FULL, AUG)
            share, share_aug, share_net = shares(
                a, b, allowed, allowed_aug, allowed_net, FULL, AUG, NET
            )
            goes = tl.maximum(tl.maximum(share, share_aug), share_net) < limit
            taken += tl.where(goes, share, 0.0)
            taken_aug += tl.where(goes, share_aug, 0.0)
            taken_net += tl.where(goes, share_net, 0.0)
        most = tl.maximum(tl.sum(taken, 1), tl.maximum(tl.sum(taken_aug, 1), tl.sum(taken_net, 1)))
        low = tl.where(most <= 1.0, middle, low)
        high = tl.where(most <= 1.0, high, middle)
    limit = tl.exp2(low)[:, None]
    kept = tl.zeros((BLOCK_N,), tl.int32)
    lost = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    lost_aug, lost_net = lost, lost
    for n in range(0, longest, BLOCK):
        live = n + at < count
        a, b = entry(dz_ptr, start + n + at, P, live, FULL, AUG)
        word = tl.load(word_ptr + start + n + at, mask=live, other=0)
        share, share_aug, share_net = shares(
            a, b, allowed, allowed_aug, allowed_net, FULL, AUG, NET
        )
        goes = tl.maximum(tl.maximum(share, share_aug), share_net) < limit
        lost += tl.where(goes, tl.abs(a), 0.0)
        lost_aug += tl.where(goes, tl.abs(b), 0.0)
        lost_net += tl.where(goes, tl.abs(a + b), 0.0)
        stays = live & (goes == 0)
        place = start + kept[:, None] + tl.cumsum(stays.to(tl.int32), 1) - 1
        tl.debug_barrier()  # entries have been read before others take their places
        tl.store(word_ptr + place, word, mask=stays)
        tl.store(dz_ptr + place, a, mask=stays)
        if FULL and AUG:
            tl.store(dz_ptr + (P + place), b, mask=stays)
        kept += tl.sum(stays.to(tl.int32), 1)
    good &= kept <= most_kept
    kept = tl.where(good, kept, 0)
    counted = tl.load(live_ptr + row, mask=inside, other=0) != 0  # again: registers are full
    left = (counted & (good == 0)).to(tl.uint8)
    tl.store(kept_ptr + row, kept, mask=inside)
    tl.store(short_ptr + row, tl.where(kept > long, 0, kept), mask=inside)
    tl.store(left_ptr + row, left, mask=inside)
    # Sums of integers are the same in every order.
    tl.atomic_add(numbers_ptr, tl.sum(kept, 0))
    tl.atomic_add(numbers_ptr + 1, tl.sum((kept > long).to(tl.int32), 0))
    tl.atomic_add(numbers_ptr + 2, tl.sum(left.to(tl.int32), 0))
    tl.store(dropped_ptr + row, tl.sum(lost, 1), mask=inside)
    tl.store(dropped_ptr + N + row, tl.sum(lost_aug, 1), mask=inside)
    tl.store(dropped_ptr + 2 * N + row, tl.sum(lost_net, 1), mask=inside)


@triton.jit
def entry(dz_ptr, place, P, live, FULL: tl.constexpr, AUG: tl.constexpr):
    """Gradients of both streams' logits; those of the one that has some, twice."""
    a = tl.load(dz_ptr + place, mask=live, other=0.0)
    b = a
    if FULL and AUG:
        b = tl.load(dz_ptr + (P + place), mask=live, other=0.0)
    return a, b


@triton.jit
def shares(
    a, b, allowed, allowed_aug, allowed_net, FULL: tl.constexpr, AUG: tl.constexpr,
    NET: tl.constexpr,
):  # fmt: skip
    """|dz| of both streams and of their sum over what a row may drop; 0 of nothing."""
    share = tl.zeros(a.shape, tl.float32)
    share_aug, share_net = share, share
    if FULL:
        share = tl.where(a != 0, tl.abs(a) / allowed, 0.0)
    if AUG:
        share_aug = tl.where(b != 0, tl.abs(b) / allowed_aug, 0.0)
    if NET:
        share_net = tl.where(a + b != 0, tl.abs(a + b) / allowed_net, 0.0)
    return share, share_aug, share_net


@triton.jit(do_not_specialize=["P", "E"])
def flatten_kernel(
    start_ptr, kept_ptr, word_ptr, dz_ptr, out_start_ptr, out_word_ptr, out_row_ptr, out_dz_ptr,
    P, E, STREAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Copies the first kept[r] entries of every row r to out_start[r]; one row a program.

    out_word, out_row: (E,); out_dz: (S, E).
    """
    row = tl.program_id(0).to(tl.int64)
    kept, start, out_start = (
        tl.load(kept_ptr + row), tl.load(start_ptr + row), tl.load(out_start_ptr + row)
    )  # fmt: skip
    for n in range(0, kept, BLOCK):
        k = n + tl.arange(0, BLOCK)
        live = k < kept
        out = out_start + k
        tl.store(out_word_ptr + out, tl.load(word_ptr + start + k, mask=live, other=0), mask=live)
        tl.store(out_row_ptr + out, tl.zeros((BLOCK,), tl.int32) + row.to(tl.int32), mask=live)
        for s in tl.static_range(STREAMS):
            dz = tl.load(dz_ptr + (s * P + start + k), mask=live, other=0.0)
            tl.store(out_dz_ptr + (s * E + out), dz, mask=live)


@triton.jit(do_not_specialize=["P"])
def d_hidden_kernel(
    rows_ptr, start_ptr, kept_ptr, word_ptr, dz_ptr, weight_ptr, more_ptr, more_aug_ptr, out_ptr,
    out_aug_ptr, P, D, stride_w, stride_w_d,
    SOME: tl.constexpr, FULL: tl.constexpr, AUG: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of states, dz @ weight, of rows with entries; grid (rows, blocks of features).

    FULL writes `out`, AUG `out_aug`, (N, D) each; dz: (S, P) of the streams that these name. With
    SOME, they are of the rows that `rows` lists, and `more`, float32 by their places, is added.
    """
    i = tl.program_id(0).to(tl.int64)
    row = i
    if SOME:
        row = tl.load(rows_ptr + i)
    kept, start = tl.load(kept_ptr + row), tl.load(start_ptr + row)
    if SOME or kept > 0:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d, far = d < D, d.to(tl.int64)
        total = tl.zeros((BLOCK_D,), tl.float32)
        total_aug = total
        if SOME:
            if FULL:
                total = tl.load(more_ptr + i * D + d, mask=in_d, other=0.0)
            if AUG:
                total_aug = tl.load(more_aug_ptr + i * D + d, mask=in_d, other=0.0)
        for n in range(0, kept, BLOCK_K):
            k = n + tl.arange(0, BLOCK_K)
            live = k < kept
            word = tl.load(word_ptr + start + k, mask=live, other=0).to(tl.int64)
            w_ptrs = weight_ptr + word[:, None] * stride_w + far[None, :] * stride_w_d
            w = tl.load(w_ptrs, mask=live[:, None] & in_d[None, :], other=0.0).to(tl.float32)
            a, b = entry(dz_ptr, start + k, P, live, FULL, AUG)
            if FULL:
                total += tl.sum(w * a[:, None], 0)
            if AUG:
                total_aug += tl.sum(w * b[:, None], 0)
        if FULL:
            tl.store(out_ptr + row * D + d, total.to(out_ptr.dtype.element_ty), mask=in_d)
        if AUG:
            total_aug = total_aug.to(out_aug_ptr.dtype.element_ty)
            tl.store(out_aug_ptr + row * D + d, total_aug, mask=in_d)


@triton.jit(do_not_specialize=["E"])
def d_weight_kernel(
    order_ptr, start_ptr, row_ptr, dz_ptr, hidden_ptr, aug_ptr, out_ptr, rest_ptr, out_bias_ptr,
    E, D, stride_h, stride_h_d, stride_aug, stride_aug_d,
    FULL: tl.constexpr, AUG: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds entries to the gradients of weight and bias, dz.T @ states; grid (words, features).

    The entries of word v are those from start[v] to start[v + 1]; order: (V,) words, as programs
    take them. row: (E,); dz: (S, E); out_bias: (V,) float32; out: (V, D), with `rest` where SPLIT,
    see `load_sum`.
    """
    word = tl.load(order_ptr + tl.program_id(0)).to(tl.int64)
    start, end = tl.load(start_ptr + word), tl.load(start_ptr + word + 1)
    if start < end:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_d, far = d < D, d.to(tl.int64)
        total = tl.zeros((BLOCK_D,), tl.float32)
        bias = tl.zeros((BLOCK_K,), tl.float32)
        for n in range(start, end, BLOCK_K):
            k = n + tl.arange(0, BLOCK_K)
            live = k < end
            row = tl.load(row_ptr + k, mask=live, other=0).to(tl.int64)
            a, b = entry(dz_ptr, k.to(tl.int64), E, live, FULL, AUG)
            keep = live[:, None] & in_d[None, :]
            if FULL:
                bias += a
                if WEIGHT:
                    h_ptrs = hidden_ptr + row[:, None] * stride_h + far[None, :] * stride_h_d
                    h = tl.load(h_ptrs, mask=keep, other=0.0).to(tl.float32)
                    total += tl.sum(h * a[:, None], 0)
            if AUG:
                bias += b
                if WEIGHT:
                    h_ptrs = aug_ptr + row[:, None] * stride_aug + far[None, :] * stride_aug_d
                    h = tl.load(h_ptrs, mask=keep, other=0.0).to(tl.float32)
                    total += tl.sum(h * b[:, None], 0)
        if WEIGHT:
            out, rest = out_ptr + word * D + d, rest_ptr + word * D + d
            total += load_sum(out, rest, in_d, SPLIT)
            store_sum(out, rest, total, in_d, SPLIT)
        if BIAS:
            if tl.program_id(1) == 0:
                before = tl.load(out_bias_ptr + word)
                tl.store(out_bias_ptr + word, before + tl.sum(bias, 0))
