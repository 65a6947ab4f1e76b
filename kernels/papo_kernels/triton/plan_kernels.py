"""Triton kernels that choose words: of tiles by their levels, and of groups of rows by their tiles.

They decide on the device, for all tiles at once, what `certificate.choose_levels` decides.

Shapes: N rows of a call in T tiles, V words, G groups of rows. order: (N,) rows as tiles are cut.
left: (N,) uint8, which rows go by levels. counts: (T, parts, LEVELS) int32, words of each level.
"""

import triton
import triton.language as tl

from papo_kernels import certificate
from papo_kernels.triton.kernels import AUG_STREAM, ENTROPY_ROW

LEVELS = tl.constexpr(certificate.LEVELS)
LEVELS_PER_NAT = tl.constexpr(float(certificate.LEVELS_PER_NAT))
LEVEL_SLACK = tl.constexpr(certificate.LEVEL_SLACK)


@triton.jit
def count_levels_kernel(level_ptr, count_ptr, V, per_part, BLOCK_V: tl.constexpr):
    """(T, parts, LEVELS) int32: words of each level in each part of a tile; grid (parts, T)."""
    part = tl.program_id(0)
    tile = tl.program_id(1).to(tl.int64)
    counts = tl.zeros((LEVELS,), tl.int32)
    first = part * per_part
    for v in range(first, tl.minimum(first + per_part, V), BLOCK_V):
        col = v + tl.arange(0, BLOCK_V)
        live = col < V
        level = tl.load(level_ptr + tile * V + col, mask=live, other=0).to(tl.int32)
        counts += tl.histogram(level, LEVELS, mask=live)
    out = count_ptr + (tile * tl.num_programs(0) + part) * LEVELS + tl.arange(0, LEVELS)
    tl.store(out, counts)


@triton.jit(do_not_specialize=["N"])
def begin_kernel(
    order_ptr, counts_ptr, tile_ptr, mass_ptr, information_ptr, N, parts, listed_from,
    PARTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Writes (N,) int32 `tile`, each row's, and `certificate.beyond_lists`; one tile a program.

    PARTS: a power of two, at least `parts`.
    """
    tile = tl.program_id(0)
    position = tile * TILE + tl.arange(0, TILE)
    row = tl.load(order_ptr + position, mask=position < N, other=0)
    tl.store(tile_ptr + row, tl.zeros((TILE,), tl.int32) + tile, mask=position < N)
    words = words_of_levels(counts_ptr, tile, parts, 0, PARTS)
    level = tl.arange(0, LEVELS).to(tl.float64)
    log_p = tl.minimum(level / -LEVELS_PER_NAT, listed_from)
    mass = words * tl.exp(log_p) * LEVEL_SLACK
    tl.store(mass_ptr + tile, tl.sum(mass, 0))
    tl.store(information_ptr + tile, -tl.sum(mass * log_p, 0))


@triton.jit
def words_of_levels(counts_ptr, tile, parts, first, PARTS: tl.constexpr):
    """(LEVELS,) float64: words of a tile of the levels from `first` on."""
    part = tl.arange(0, PARTS)[:, None]
    level = first + tl.arange(0, LEVELS)[None, :]
    at = (tile.to(tl.int64) * parts + part) * LEVELS + level
    found = tl.load(counts_ptr + at, mask=(part < parts) & (level < LEVELS), other=0)
    return tl.sum(found, 0).to(tl.float64)


@triton.jit(do_not_specialize=["N", "V", "most"])
def choose_kernel(
    order_ptr, left_ptr, counts_ptr, stats_ptr, share_ptr, level_ptr, few_ptr, good_ptr, mass_ptr,
    information_ptr, limit_ptr, wanted_ptr, asked_ptr, N, V, parts, most, budget, assumed,
    TWO: tl.constexpr, KNOWN: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """`certificate.choose_levels` of one tile a program, and what follows from it.

    At first with an assumed tightness. If KNOWN, for tiles that drop more than the budget by the
    (N,) float64 `share` of their rows, with the tightness that was seen.

    level: (T,) int32; few: (T,) uint8, whether a tile's words are worth gathering; mass,
    information: (T,) float64, see `certificate.Beyond`. Writes (T,) `good` uint8, whether the tile
    needs no more than it gets; `limit` int32, the level of words that it gets now, or -1; and at
    first (T,) int32 `wanted`, how many words that is, V where they are too many. Adds to asked[0]
    how many rows are left of tiles that are not good. TWO: both streams may get gradients.
    """
    tile = tl.program_id(0)
    position = tile * TILE + tl.arange(0, TILE)
    row = tl.load(order_ptr + position, mask=position < N, other=0)
    left = (position < N) & (tl.load(left_ptr + row, mask=position < N, other=0) != 0)
    entropy = tl.load(stats_ptr + ENTROPY_ROW * N + row, mask=left, other=0.0)
    if TWO:
        other = tl.load(stats_ptr + (AUG_STREAM + ENTROPY_ROW) * N + row, mask=left, other=0.0)
        entropy = tl.where((other > entropy) | (other != other), other, entropy)
    # Beyond it log p < -entropy: p (log p + entropy) has one sign, and its sum is its size.
    first = tl.where(entropy < LEVELS / LEVELS_PER_NAT, tl.ceil(entropy * LEVELS_PER_NAT), LEVELS)
    first = tl.max(first.to(tl.int32), 0)
    # What words add up to from the next level on, without cancellation.
    level = tl.arange(0, LEVELS).to(tl.float64) + 1.0
    mass = words_of_levels(counts_ptr, tile, parts, 1, PARTS) * tl.exp(level / -LEVELS_PER_NAT)
    # p |log p| is largest at p = 1 / e, and so is its bound for the levels before that.
    information = mass * tl.maximum(level / LEVELS_PER_NAT, 1.0)
    mass, information = tl.cumsum(mass, 0, reverse=True), tl.cumsum(information, 0, reverse=True)
    words = tl.cumsum(words_of_levels(counts_ptr, tile, parts, 0, PARTS), 0)
    last = tl.sum((words <= most).to(tl.int32), 0) - 1
    dropped = mass * assumed
    if KNOWN:
        share = tl.max(tl.load(share_ptr + row, mask=left, other=0.0), 0)
        dropped = mass * (share / tl.maximum(tl.load(mass_ptr + tile), 1e-30))
    chosen = tl.maximum(first, tl.sum((dropped > budget / 2).to(tl.int32), 0))
    if not KNOWN:
        chosen = tl.where(last >= first, tl.minimum(chosen, last), chosen)
    few = chosen <= last
    here = tl.arange(0, LEVELS) == tl.minimum(chosen, LEVELS - 1)
    mass = tl.sum(tl.where(here, mass, 0.0), 0) * LEVEL_SLACK
    information = tl.sum(tl.where(here, information, 0.0), 0) * LEVEL_SLACK
    asks, good = few, few
    if KNOWN:
        was_few = tl.load(few_ptr + tile) != 0
        bad = was_few & (share > budget)
        asks, good = bad & few, was_few & (bad == 0)
        few = was_few & (few | (bad == 0))
        before = tl.load(mass_ptr + tile)
        mass = tl.where(asks, tl.minimum(mass, before), before)
        before = tl.load(information_ptr + tile)
        information = tl.where(asks, tl.minimum(information, before), before)
        chosen = tl.where(asks, chosen, tl.load(level_ptr + tile))
    else:
        wanted = tl.max(tl.where(here, words, 0.0), 0).to(tl.int32)
        tl.store(wanted_ptr + tile, tl.where(few, wanted, V))
    tl.store(level_ptr + tile, chosen)
    tl.store(few_ptr + tile, few.to(tl.uint8))
    tl.store(good_ptr + tile, good.to(tl.uint8))
    tl.store(mass_ptr + tile, mass)
    tl.store(information_ptr + tile, information)
    tl.store(limit_ptr + tile, tl.where(asks, chosen, -1))
    rows = tl.sum(left.to(tl.int32), 0)
    tl.atomic_add(asked_ptr, tl.where(good, 0, rows))


@triton.jit(do_not_specialize=["N"])
def arrange_kernel(order_ptr, left_ptr, tiles_ptr, row_ptr, here_ptr, N, TILE: tl.constexpr):
    """Puts rows in the order of the (T,) int64 `tiles`; one of them a program.

    row, here: (T TILE,) int64 and uint8, the rows, and whether they are left.
    """
    place, tile = tl.program_id(0), tl.load(tiles_ptr + tl.program_id(0))
    k = tl.arange(0, TILE)
    position = tile * TILE + k
    row = tl.load(order_ptr + position, mask=position < N, other=0)
    left = tl.load(left_ptr + row, mask=position < N, other=0)
    tl.store(row_ptr + place * TILE + k, row)
    tl.store(here_ptr + place * TILE + k, left)


@triton.jit(do_not_specialize=["rows", "per_group"])
def mark_kernel(
    at_ptr, tile_ptr, targets_ptr, tiles_ptr, is_target_ptr, rows, per_group, T, V,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Marks the tiles and targets of groups, `per_group` of the (rows,) rows `at` each.

    tiles: (G, T) uint8 and is_target: (G, V) uint8, zeros at first.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < rows
    row = tl.load(at_ptr + i, mask=live, other=0)
    group = (i // per_group).to(tl.int64)
    tile = tl.load(tile_ptr + row, mask=live, other=0)
    target = tl.load(targets_ptr + row, mask=live, other=-1)
    one = tl.full((BLOCK,), 1, tl.uint8)
    tl.store(tiles_ptr + group * T + tile, one, mask=live)
    tl.store(is_target_ptr + group * V + target, one, mask=live & (target >= 0) & (target < V))


@triton.jit(do_not_specialize=["T"])
def choose_words_kernel(
    level_ptr, limit_ptr, tiles_ptr, is_target_ptr, done_ptr, out_ptr, asked_ptr, T, V,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The words that a group wants and has not got; grid (blocks of words, groups).

    A tile wants the words of its `limit` and below, none where that is negative. A group of which
    a tile asks wants its rows' targets too. level: (T, V) uint8; limit: (T,); tiles: (G, T) uint8,
    a group's tiles; is_target: (G, V) uint8. Writes (G, V) uint8 `out`, adds it to the words that
    are `done`, and adds to asked[1 + g] how many words they are.
    """
    group = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_col = col < V
    here = group * V + col
    asked = tl.zeros((BLOCK_T,), tl.int32)
    found = tl.zeros((BLOCK_V,), tl.int32)
    for t in range(0, T, BLOCK_T):
        tile = t + tl.arange(0, BLOCK_T)
        own = tl.load(tiles_ptr + group * T + tile, mask=tile < T, other=0) != 0
        limit = tl.load(limit_ptr + tile, mask=own, other=-1)
        asks = limit >= 0
        asked |= asks.to(tl.int32)
        level = tl.load(
            level_ptr + tile.to(tl.int64)[:, None] * V + col[None, :],
            mask=asks[:, None] & in_col[None, :], other=255,
        )  # fmt: skip
        wants = asks[:, None] & (level.to(tl.int32) <= limit[:, None])
        found |= tl.max(wants.to(tl.int32), 0)
    found |= tl.load(is_target_ptr + here, mask=in_col, other=0).to(tl.int32)
    done = tl.load(done_ptr + here, mask=in_col, other=1)
    chosen = (found != 0) & (done == 0) & (tl.max(asked, 0) > 0)
    tl.store(out_ptr + here, chosen.to(tl.uint8), mask=in_col)
    tl.store(done_ptr + here, done | chosen.to(tl.uint8), mask=in_col)
    # Sums of integers are the same in every order.
    tl.atomic_add(asked_ptr + 1 + group, tl.sum(chosen.to(tl.int32), 0))
