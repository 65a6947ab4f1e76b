"""Triton kernels of the forward, and what they share with the backward's.

The products of states and weight are cuBLAS's (or rocBLAS's, or the CPU's), in float32, a chunk of
rows or words at a time; the kernels here pass over them and leave a few numbers a row.

Shapes: N rows of a call, V words. A chunk is some rows. A tile has TILE rows, which share levels.
`sharpness` is 1 / temperature.
"""

import triton
import triton.language as tl

from papo_kernels import certificate, equations, reference
from papo_kernels.rows import BY_LOGIT, saved_names

LOG_ZERO = tl.constexpr(reference.LOG_ZERO)
LOG_HALF = tl.constexpr(equations.LOG_HALF)
LOG2E = tl.constexpr(1.4426950408889634)
LOG_TWO = tl.constexpr(0.6931471805599453)
# log 2, whose first part has few enough bits that its multiples are exact.
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440054690583e-4)
LEVELS_PER_NAT = tl.constexpr(float(certificate.LEVELS_PER_NAT))
# The sums of `stats_kernel`, as they stand in (F, N); one stream has the first four. `peak` is the
# logit of the likeliest word if that has more than half of the mass, else of one that is likely. It
# and `target`, the target's, are before temperature: times `sharpness`, large ones lose digits.
# With e = exp(z - peak), `others` is sum e - 1 and `weighted` is sum e (z - peak). With x = z -
# z_aug less `centre`, which is near to its mean, `drift` is sum e x, `aug_drift` is sum e_aug x and
# `terms` is sum e (exp(-x) - 1 + x). The gaps are sum e |z - z_aug| and sum e_aug |z - z_aug|.
PARTS = (
    "peak", "others", "weighted", "target", "aug_peak", "aug_others", "aug_weighted", "aug_target",
    "drift", "aug_drift", "terms", "logit_gap", "aug_logit_gap", "centre",
)  # fmt: skip
ONE_STREAM_PARTS = 4
AUG_PART = tl.constexpr(PARTS.index("aug_peak"))

# Where statistics stand in the saved (F, N) tensor; those of the aug stream begin at AUG_STREAM.
_SAVED = saved_names(2, BY_LOGIT)
LOG_SUM = tl.constexpr(_SAVED.index("log_sum"))
ENTROPY_ROW = tl.constexpr(_SAVED.index("entropy"))
AUG_STREAM = tl.constexpr(_SAVED.index("aug_peak"))
KL_ROW = tl.constexpr(_SAVED.index("kl_prcp"))
KL_REVERSE_ROW = tl.constexpr(_SAVED.index("kl_reverse"))
LOGIT_GAP_ROW = tl.constexpr(_SAVED.index("logit_gap"))
AUG_LOGIT_GAP_ROW = tl.constexpr(_SAVED.index("aug_logit_gap"))
LOGPROBS_ROW = tl.constexpr(_SAVED.index("logprobs"))
AUG_LOGPROBS_ROW = tl.constexpr(_SAVED.index("aug_logprobs"))
ONE_STREAM_LOGPROBS_ROW = tl.constexpr(saved_names(1, BY_LOGIT).index("logprobs"))


@triton.jit
def head(acc, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr):
    """Logits from products, whose shape `col` and `in_col` can be broadcast to.

    LOG_ZERO for banned words and outside the vocabulary.
    """
    z = capped(acc, b_ptr, col, in_col, softcap, HAS_BIAS, CAP) * sharpness
    # Written so that NaN stays NaN.
    return tl.where((z <= LOG_ZERO) | ~in_col, LOG_ZERO, z)


@triton.jit
def capped(acc, b_ptr, col, keep, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr):
    """Logits before temperature; -inf for banned words. keep: which words count, None for all."""
    if HAS_BIAS:
        if keep is None:
            bias = tl.load(b_ptr + col).to(tl.float32)
        else:
            bias = tl.load(b_ptr + col, mask=keep, other=0.0).to(tl.float32)
        ban = tl.where(bias <= LOG_ZERO, -float("inf"), 0.0)
        acc += bias + ban
    if CAP:
        # What is taken off |acc|, or off the cap, is small and has no cancellation: half a unit in
        # the last place is lost, where softcap * tanh(t) by exponentials loses three.
        t = tl.abs(acc) / softcap
        u = t * t
        below = u * (45045 + u * (2772 + u * 27)) / (135135 + u * (62370 + u * (3150 + u * 28)))
        shrink = precise_exp(-2.0 * t)
        near_cap = softcap - 2.0 * softcap * (shrink / (1.0 + shrink))
        size = tl.where(t < 1.0, tl.abs(acc) - tl.abs(acc) * below, near_cap)
        acc = tl.where(acc < 0, -size, size)
        if HAS_BIAS:  # the cap turns -inf into a number
            acc += ban
    return acc


@triton.jit
def precise_exp(x):
    """exp(x) for x <= 0, to 1e-7 of itself.

    A GPU's own is off by up to 2.4e-7, and a soft cap of 100 makes 1e-5 of that.
    """
    x = tl.where(x < -100.0, -100.0, x)  # of an infinity, the difference would be NaN
    k = tl.floor(x * LOG2E + 0.5)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    series = 1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040))))
    return (1.0 + r * (1.0 + r * (1 / 2 + r * series))) * tl.exp2(k)


@triton.jit(do_not_specialize=["N", "rows", "first"])
def sort_kernel(part_ptr, at_ptr, rows_ptr, cut_ptr, N, rows, first, TWO: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """Lists a chunk's rows by the entropy of their flatter stream.

    at: their numbers within the chunk; cut: the rows themselves, from `first` on.
    """
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = r < rows
    flat = flatness(part_ptr + first, r, N, live, TWO)
    rank = tl.zeros((BLOCK_N,), tl.int32)
    for k in range(0, rows, BLOCK_N):
        other = k + tl.arange(0, BLOCK_N)
        that = flatness(part_ptr + first, other, N, other < rows, TWO)
        equal_before = (that[None, :] == flat[:, None]) & (other[None, :] < r[:, None])
        ahead = (that[None, :] < flat[:, None]) | equal_before
        rank += tl.sum((ahead & (other < rows)[None, :]).to(tl.int32), 1)
    tl.store(at_ptr + rank, r.to(tl.int64), mask=live)
    row = tl.load(rows_ptr + first + r, mask=live, other=0)
    tl.store(cut_ptr + first + rank, row, mask=live)


@triton.jit
def flatness(part_ptr, r, N, live, TWO: tl.constexpr):
    """(BLOCK_N,) the entropy of the flatter stream, which NaN counts as below."""
    flat = entropy(part_ptr + r, N, live)
    if TWO:
        flat = tl.maximum(flat, entropy(part_ptr + AUG_PART * N + r, N, live))
    return tl.where(flat == flat, flat, -1.0)


@triton.jit
def entropy(part_ptr, N, live):
    """Well enough to sort by; part: where a stream's peak stands in PARTS."""
    total = tl.load(part_ptr + N, mask=live, other=0.0) + 1.0
    return tl.log(total) - tl.load(part_ptr + 2 * N, mask=live, other=0.0) / total


@triton.jit
def logits(
    z_ptrs, keep, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Logits of words `col`, whose products stand at `z_ptrs`; rows that are not kept have 0."""
    z = tl.load(z_ptrs, mask=keep, other=0.0)
    return head(z, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS, CAP)


@triton.jit(do_not_specialize=["N", "rows", "first"])
def levels_kernel(
    z_ptr, b_ptr, at_ptr, cut_ptr, targets_ptr, part_ptr, level_ptr, mark_ptr, total_ptr, N, V,
    rows, first, marks, stride_z, listed_from, sharpness, softcap,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr, TILE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Levels of the words of a chunk's tiles, and marks of the words that rows list.

    Grid (blocks of 32 BLOCK_V words, tiles). `at` and `cut` list the chunk's rows, by their places
    in the chunk and in the call, in the order in which tiles are cut: tile t of the call has those
    of the positions [t * TILE, (t + 1) * TILE).

    A row lists its target and the words of a log-prob of `listed_from` or more in one of the
    streams. Bit k of mark[r, g * BLOCK_V + i], (rows, marks) int32, stands for the word
    (32 g + k) * BLOCK_V + i. Adds to total[r] how many words these are; total: (rows,), zeros.
    """
    tile, group = tl.program_id(1), tl.program_id(0)
    position = tile * TILE + tl.arange(0, TILE)
    live = position < rows
    r = tl.load(at_ptr + position, mask=live, other=0)
    target = tl.load(cut_ptr + first + position, mask=live, other=0)
    target = tl.load(targets_ptr + target, mask=live, other=-1)
    # A target that nobody checked may stand beyond the last word, where blocks have room.
    target = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)[:, None]
    peak, log_sum = normaliser(part_ptr + first + r, N, live, sharpness)
    peak_aug, log_sum_aug = peak, log_sum
    if TWO:
        peak_aug, log_sum_aug = normaliser(part_ptr + AUG_PART * N + first + r, N, live, sharpness)
    z_row = z_ptr + r[:, None].to(tl.int64) * stride_z
    aug_row = z_ptr + (rows + r)[:, None].to(tl.int64) * stride_z
    lane = tl.arange(0, BLOCK_V)
    mark = tl.zeros((TILE, BLOCK_V), tl.int32)
    blocks = tl.minimum(tl.cdiv(V, BLOCK_V) - group * 32, 32)
    col = (group * 32 * BLOCK_V + lane)[None, :]
    in_col = col < V
    acc = tl.load(z_row + col, mask=in_col, other=0.0)
    acc_aug = acc
    if TWO:
        acc_aug = tl.load(aug_row + col, mask=in_col, other=0.0)
    for k in range(blocks):
        u = (head(acc, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS, CAP) - peak) - log_sum
        if TWO:
            z = head(acc_aug, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS, CAP)
            u = tl.maximum(u, (z - peak_aug) - log_sum_aug)
        here, in_here = col, in_col
        # Threads wait for each other below: the next words are on their way before that.
        col = ((group * 32 + k + 1) * BLOCK_V + lane)[None, :]
        in_col = (col < V) & (k + 1 < blocks)
        acc = tl.load(z_row + col, mask=in_col, other=0.0)
        if TWO:
            acc_aug = tl.load(aug_row + col, mask=in_col, other=0.0)
        highest = tl.max(u, 0)[None, :]
        level = tl.minimum(tl.maximum(highest * -LEVELS_PER_NAT, 0.0), 255.0)
        level = tl.where(level == level, level, 0.0).to(tl.uint8)
        tl.store(level_ptr + (first // TILE + tile).to(tl.int64) * V + here, level, in_here)
        mark |= ((u >= listed_from) | (here == target)).to(tl.int32) << k
    mark_row = mark_ptr + r[:, None] * marks + group * BLOCK_V
    tl.store(mark_row + lane[None, :], mark, mask=live[:, None])
    # Sums of integers are the same in every order.
    tl.atomic_add(total_ptr + r, tl.sum(ones(mark), 1), mask=live)


@triton.jit
def ones(x):
    """How many bits of an int32 are 1."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    return (x + (x >> 16)) & 63


@triton.jit
def normaliser(part, N, live, sharpness):
    """A stream's peaks and logs of sums relative to them; part: where the peak stands in PARTS.

    Relative to the peak of a row that is not live, no word is likely.
    """
    peak = tl.load(part, mask=live, other=-LOG_ZERO) * sharpness
    return peak[:, None], tl.log(tl.load(part + N, mask=live, other=0.0) + 1.0)[:, None]


@triton.jit
def log_prob(z, stat, N, live, keep):
    """log p and p of logits z; `stat` points to the peaks in the stream's saved statistics."""
    peak = tl.load(stat, mask=live, other=0.0)[:, None]
    log_sum = tl.load(stat + LOG_SUM * N, mask=live, other=0.0)[:, None]
    log_p = (z - peak) - log_sum
    # the peak, whatever rounding did: see `equations.log_probs_again`. Where no word has more than
    # half of the mass, `peak` may be another one's.
    log_p = tl.where((log_p > LOG_HALF) & (log_sum < LOG_TWO), -log_sum, log_p)
    log_p = tl.where(log_p <= LOG_ZERO, LOG_ZERO, log_p)
    return log_p, tl.where(keep, tl.exp(log_p), 0.0)


@triton.jit
def slope(z, sharpness, softcap, CAP: tl.constexpr):
    if CAP:
        t = tl.maximum(z / (sharpness * softcap), -1.0)
        return (1.0 - t * t) * sharpness
    else:
        return sharpness
