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
# Nats between the streams beyond which a KL needs no second-order terms.
FAR = tl.constexpr(40.0)
# log 2, whose first part has few enough bits that its multiples are exact.
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440054690583e-4)
LEVELS_PER_NAT = tl.constexpr(float(certificate.LEVELS_PER_NAT))
# Nats by which two ways to round a log-prob may differ, and far more than that.
SLACK = tl.constexpr(1e-3)

# The forward's sums over the vocabulary, as they stand in (F, N); one stream has the first four.
# With e = exp(z - max), `others` is sum e - 1 and `weighted` is sum e (z - max). With x = z - z_aug
# less `centre`, which is near to its mean, `drift` is sum e x, `aug_drift` is sum e_aug x, and
# `terms` is sum e (exp(-x) - 1 + x). The gaps are sum e |z - z_aug| and sum e_aug |z - z_aug|.
PARTS = (
    "max", "others", "weighted", "target", "aug_max", "aug_others", "aug_weighted", "aug_target",
    "drift", "aug_drift", "terms", "logit_gap", "aug_logit_gap", "centre",
)  # fmt: skip
ONE_STREAM_PARTS = 4
AUG_PART = tl.constexpr(PARTS.index("aug_max"))

# Where statistics stand in the saved (F, N) tensor; those of the aug stream begin at AUG_STREAM.
_SAVED = saved_names(2, BY_LOGIT)
LOG_SUM = tl.constexpr(_SAVED.index("log_sum"))
ENTROPY_ROW = tl.constexpr(_SAVED.index("entropy"))
AUG_STREAM = tl.constexpr(_SAVED.index("aug_peak"))
KL_ROW = tl.constexpr(_SAVED.index("kl_prcp"))
KL_REVERSE_ROW = tl.constexpr(_SAVED.index("kl_reverse"))
LOGIT_GAP_ROW = tl.constexpr(_SAVED.index("logit_gap"))
AUG_LOGIT_GAP_ROW = tl.constexpr(_SAVED.index("aug_logit_gap"))


@triton.jit
def head(acc, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr):
    """Logits from products, whose shape `col` and `in_col` can be broadcast to.

    LOG_ZERO for banned words and outside the vocabulary.
    """
    if HAS_BIAS:
        bias = tl.load(b_ptr + col, mask=in_col, other=0.0).to(tl.float32)
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
    z = acc * sharpness
    # Written so that NaN stays NaN.
    return tl.where((z <= LOG_ZERO) | ~in_col, LOG_ZERO, z)


@triton.jit
def precise_exp(x):
    """exp(x) for x <= 0, to 1e-7 of itself.

    A GPU's own is off by up to 2.4e-7, and a soft cap of 100 makes 1e-5 of that.
    """
    x = tl.where(x < -100.0, -100.0, x)  # of an infinity, the difference would be NaN
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    series = 1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720 + r * (1 / 5040))))
    return (1.0 + r * (1.0 + r * (1 / 2 + r * series))) * tl.exp2(k)


@triton.jit
def online(z, m, s, a):
    """Takes (BLOCK_N, STEPS, LANES) logits into each lane's running sums, (BLOCK_N, LANES) each.

    m is the max, s = sum e - 1 and a = sum e (z - m): beside the peak's 1, a sum would lose the
    other terms of a confident row. Before the first word, s is -1.

    Returns the three, e, and the factor by which older sums of e were scaled.
    """
    m_new = tl.maximum(m, tl.max(z, 1))
    away = z - m_new[:, None, :]
    e = tl.where(z <= LOG_ZERO, 0.0, tl.exp(away))
    shift = m - m_new
    scale = tl.exp(shift)
    a = scale * (a + (s + 1.0) * shift) + tl.sum(e * away, 1)
    peaks = tl.sum(tl.where(away < 0, 0.0, e), 1)
    others = tl.sum(tl.where(away < 0, e, 0.0), 1)
    s = tl.where(m_new > m, (scale * (s + 1.0) + others) + (peaks - 1.0), (s + others) + peaks)
    return m_new, s, a, e, scale


@triton.jit
def log_sum_of(m, s):
    """(BLOCK_N,) the log of a row's sum of exponentials so far, from those of its lanes."""
    peak = tl.max(m, 1)
    return peak + tl.log(tl.sum(tl.exp(m - peak[:, None]) * (s + 1.0), 1))


@triton.jit
def over_lanes(m, s, a, LANES: tl.constexpr):
    """A row's m, s and a from those of its lanes, and (BLOCK_N, LANES) scales of other sums."""
    peak = tl.max(m, 1)
    first = tl.argmax(m, 1)[:, None] == tl.arange(0, LANES)[None, :]
    shift = m - peak[:, None]
    scale = tl.exp(shift)
    a = tl.sum(scale * (a + (s + 1.0) * shift), 1)
    s = tl.sum(tl.where(first, s, scale * (s + 1.0)), 1)
    return peak, s, a, scale


@triton.jit(do_not_specialize=["N", "rows", "first"])
def stats_kernel(
    z_ptr, b_ptr, targets_ptr, rows_ptr, part_ptr, mark_ptr, N, V, rows, first, stride_z,
    listed_from, sharpness, softcap,
    TWO: tl.constexpr, LIST: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The sums that PARTS lists, of BLOCK_N rows of a chunk a program, into part[:, first + row].

    The products of row r stand in z[r], and those of the aug stream in z[rows + r]. A lane, which
    is a column of registers, keeps sums of its own: nothing is exchanged between threads until all
    words are done.

    With LIST it also marks the words that may turn out to be likely in (rows, G, LANES) int32
    `mark`: bit k of mark[r, g, l] stands for word (32 g + k) * LANES + l. Logits are compared with
    the log of the sum that is known by then, and the whole sum is larger. So words are marked that
    have no log-prob of `listed_from`, but none that has one is left out.
    """
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = r < rows
    z_row = z_ptr + r.to(tl.int64)[:, None, None] * stride_z
    aug_row = z_ptr + (r + rows).to(tl.int64)[:, None, None] * stride_z
    row = tl.load(rows_ptr + first + r, mask=live, other=0)
    target = tl.load(targets_ptr + row, mask=live, other=-1)[:, None, None]
    known = live[:, None, None] & (target >= 0) & (target < V)
    m = tl.full((BLOCK_N, LANES), LOG_ZERO, tl.float32)
    s = tl.full((BLOCK_N, LANES), -1.0, tl.float32)
    a = tl.zeros((BLOCK_N, LANES), tl.float32)
    m_aug, s_aug, a_aug = m, s, a
    drift, drift_aug, terms, terms_aug, gap, gap_aug = a, a, a, a, a, a
    logit = of_target(z_row, b_ptr, target, known, sharpness, softcap, HAS_BIAS, CAP)
    logit_aug, centre = logit, logit
    if TWO:
        logit_aug = of_target(aug_row, b_ptr, target, known, sharpness, softcap, HAS_BIAS, CAP)
        # z - z_aug of a word that was drawn from p: near to the mean over p
        both = (logit > LOG_ZERO) & (logit_aug > LOG_ZERO)
        centre = tl.where(both, logit - logit_aug, 0.0)
    lane = tl.arange(0, LANES)
    within = tl.arange(0, STEPS)[:, None] * LANES + lane[None, :]
    # Of what is passed. A target's logit is known before, and is most often among the highest.
    known_sum = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    known_sum_aug = known_sum
    own_word = tl.where(known, target, -1).to(tl.int32)
    marks = tl.zeros((BLOCK_N, LANES), tl.int32)
    step = tl.arange(0, STEPS)[None, :, None]
    blocks = tl.cdiv(V, STEPS * LANES)
    mark_row = mark_ptr + r[:, None] * (tl.cdiv(V, 32 * LANES) * LANES) + lane[None, :]
    for v in range(0, V, STEPS * LANES):
        col = (v + within)[None, :, :]
        in_col = col < V
        keep = live[:, None, None] & in_col
        z = logits(z_row + col, keep, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS, CAP)
        m, s, a, e, scale = online(z, m, s, a)
        if TWO:
            z_aug = logits(
                aug_row + col, keep, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS, CAP
            )
            m_aug, s_aug, a_aug, e_aug, scale_aug = online(z_aug, m_aug, s_aug, a_aug)
        if LIST:
            # Threads exchange their sums after 1, 2, 4, 8 ... blocks: to do so after each costs as
            # much as the sums, and the likeliest words are most often among the first.
            block = v // (STEPS * LANES)
            if (block & (block - 1)) == 0:
                known_sum = log_sum_of(m, s)
                if TWO:
                    known_sum_aug = log_sum_of(m_aug, s_aug)
            from_z = tl.maximum(known_sum, logit) + listed_from - SLACK
            likely = z >= from_z[:, None, None]
            if TWO:
                from_z = tl.maximum(known_sum_aug, logit_aug) + listed_from - SLACK
                likely = likely | (z_aug >= from_z[:, None, None])
            likely = ((likely | (col == own_word)) & in_col).to(tl.int32)
            bit = block * STEPS % 32
            marks |= tl.sum(likely << (bit + step), 1)
            if (bit + STEPS == 32) | (block + 1 == blocks):
                tl.store(mark_row + block * STEPS // 32 * LANES, marks, mask=live[:, None])
                marks = tl.zeros((BLOCK_N, LANES), tl.int32)
        if TWO:
            d = z - z_aug
            gap = scale * gap + tl.sum(e * tl.abs(d), 1)
            gap_aug = scale_aug * gap_aug + tl.sum(e_aug * tl.abs(d), 1)
            x = d - centre[:, None, None]
            drift = scale * drift + tl.sum(e * x, 1)
            drift_aug = scale_aug * drift_aug + tl.sum(e_aug * x, 1)
            series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720)))))
            near = tl.abs(x) < 0.25
            terms = scale * terms + tl.sum(e * tl.where(near, series, x - 1.0), 1)
            terms_aug = scale_aug * terms_aug + tl.sum(tl.where(near, 0.0, e_aug), 1)
    m, s, a, scale = over_lanes(m, s, a, LANES)
    out = part_ptr + first + r
    tl.store(out, m, mask=live)
    tl.store(out + N, s, mask=live)
    tl.store(out + 2 * N, a, mask=live)
    tl.store(out + 3 * N, logit, mask=live)
    if TWO:
        m_aug, s_aug, a_aug, scale_aug = over_lanes(m_aug, s_aug, a_aug, LANES)
        tl.store(out + 4 * N, m_aug, mask=live)
        tl.store(out + 5 * N, s_aug, mask=live)
        tl.store(out + 6 * N, a_aug, mask=live)
        tl.store(out + 7 * N, logit_aug, mask=live)
        tl.store(out + 8 * N, tl.sum(scale * drift, 1), mask=live)
        tl.store(out + 9 * N, tl.sum(scale_aug * drift_aug, 1), mask=live)
        # e exp(-x) is e_aug by this much; far policies overflow, and their terms are not used
        over = tl.exp(tl.minimum((m_aug - m) + centre, FAR))
        terms = tl.sum(scale * terms, 1) + over * tl.sum(scale_aug * terms_aug, 1)
        tl.store(out + 10 * N, terms, mask=live)
        tl.store(out + 11 * N, tl.sum(scale * gap, 1), mask=live)
        tl.store(out + 12 * N, tl.sum(scale_aug * gap_aug, 1), mask=live)
        tl.store(out + 13 * N, centre, mask=live)


@triton.jit
def of_target(
    z_row, b_ptr, target, known, sharpness, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr
):
    """(BLOCK_N,) logits of the rows' targets; LOG_ZERO where there is none."""
    z = logits(
        z_row + target, known, b_ptr, target, known, sharpness, softcap, HAS_BIAS, CAP
    )  # fmt: skip
    return tl.sum(tl.sum(z, 2), 1)


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
    """Well enough to sort by; part: where a stream's max stands in PARTS."""
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
    z_ptr, b_ptr, at_ptr, part_ptr, level_ptr, N, V, rows, first, stride_z, sharpness, softcap,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Levels of the words of a chunk's tiles; grid (blocks of words, tiles).

    `at` lists the chunk's rows in the order in which tiles are cut: tile t of the call has those of
    the positions [t * TILE, (t + 1) * TILE).
    """
    tile = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    in_col = col < V
    highest = tl.full((BLOCK_V,), LOG_ZERO, tl.float32)
    for n in range(0, TILE, BLOCK_N):
        position = tile * TILE + n + tl.arange(0, BLOCK_N)
        live = position < rows
        r = tl.load(at_ptr + position, mask=live, other=0)
        u = likelier_log_prob(
            z_ptr, b_ptr, part_ptr + first, r, live, rows, N, col, in_col, stride_z, sharpness,
            softcap, TWO, HAS_BIAS, CAP,
        )  # fmt: skip
        highest = tl.maximum(highest, tl.max(tl.where(live[:, None], u, LOG_ZERO), 0))
    level = tl.minimum(tl.maximum(highest * -LEVELS_PER_NAT, 0.0), 255.0)
    level = tl.where(level == level, level, 0.0)
    tl.store(level_ptr + (first // TILE + tile).to(tl.int64) * V + col, level.to(tl.uint8), in_col)


@triton.jit
def likelier_log_prob(
    z_ptr, b_ptr, part_ptr, r, live, rows, N, col, in_col, stride_z, sharpness, softcap,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_V) log-probs of words in the stream in which they are likelier.

    r: (BLOCK_N,) rows of a chunk of `rows`; part: PARTS of the chunk's first row.
    """
    u = below_sum(
        z_ptr, b_ptr, part_ptr, r, live, r, N, col, in_col, stride_z, sharpness, softcap, HAS_BIAS,
        CAP,
    )  # fmt: skip
    if TWO:
        u_aug = below_sum(
            z_ptr, b_ptr, part_ptr + AUG_PART * N, r, live, rows + r, N, col, in_col, stride_z,
            sharpness, softcap, HAS_BIAS, CAP,
        )  # fmt: skip
        u = tl.maximum(u, u_aug)
    return u


@triton.jit
def below_sum(
    z_ptr, b_ptr, part_ptr, r, live, z_row, N, col, in_col, stride_z, sharpness, softcap,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_V) log-probs of a stream; part: where its max stands in PARTS."""
    keep = live[:, None] & in_col[None, :]
    z_ptrs = z_ptr + z_row.to(tl.int64)[:, None] * stride_z + col[None, :]
    col, in_col = col[None, :], in_col[None, :]
    z = logits(z_ptrs, keep, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS, CAP)
    peak = tl.load(part_ptr + r, mask=live, other=0.0)
    others = tl.load(part_ptr + N + r, mask=live, other=0.0)
    return (z - peak[:, None]) - tl.log(others + 1.0)[:, None]


@triton.jit
def log_prob(z, stat, N, live, keep):
    """log p and p of logits z; `stat` points to the peaks in the stream's saved statistics."""
    peak = tl.load(stat, mask=live, other=0.0)[:, None]
    log_sum = tl.load(stat + LOG_SUM * N, mask=live, other=0.0)[:, None]
    log_p = (z - peak) - log_sum
    # the peak, whatever rounding did: see `equations.log_probs_again`
    log_p = tl.where(log_p > LOG_HALF, -log_sum, log_p)
    log_p = tl.where(log_p <= LOG_ZERO, LOG_ZERO, log_p)
    return log_p, tl.where(keep, tl.exp(log_p), 0.0)


@triton.jit
def slope(z, sharpness, softcap, CAP: tl.constexpr):
    if CAP:
        t = tl.maximum(z / (sharpness * softcap), -1.0)
        return (1.0 - t * t) * sharpness
    else:
        return sharpness
