"""Triton kernels: the two-stream forward, and what it shares with the backward.

Shapes: N rows, V words, D features. `rows` lists the rows, the `count` that count first; a tile is
BLOCK_N rows of that list. Logits live in registers only, in float32.
UPCAST is for interpreted tests: the interpreter's bfloat16 arithmetic is wrong.
"""

import triton
import triton.language as tl

from papo_kernels import certificate, equations, reference
from papo_kernels.rows import BY_LOGIT, saved_names

LOG_ZERO = tl.constexpr(reference.LOG_ZERO)
LOG_HALF = tl.constexpr(equations.LOG_HALF)
# Nats between the streams beyond which a KL needs no second-order terms.
FAR = tl.constexpr(40.0)
LEVELS_PER_NAT = tl.constexpr(float(certificate.LEVELS_PER_NAT))

# The forward's partial sums, as they stand in (splits, F, N); one stream has the first four.
# With e = exp(z - max), `others` is sum e - 1 and `weighted` is sum e (z - max). With x = z - z_aug
# less `centre`, which is near to its mean, `drift` is sum e x, `aug_drift` is sum e_aug x, and
# `terms` is sum e (exp(-x) - 1 + x).
PARTS = (
    "max", "others", "weighted", "target", "aug_max", "aug_others", "aug_weighted", "aug_target",
    "drift", "aug_drift", "terms", "logit_gap", "aug_logit_gap", "centre",
)  # fmt: skip
ONE_STREAM_PARTS, TWO_STREAM_PARTS = tl.constexpr(4), tl.constexpr(len(PARTS))

# Where statistics stand in the saved (F, N) tensor; those of the aug stream begin at AUG_STREAM.
_SAVED = saved_names(2, BY_LOGIT)
LOG_SUM = tl.constexpr(_SAVED.index("log_sum"))
ENTROPY_ROW = tl.constexpr(_SAVED.index("entropy"))
AUG_STREAM = tl.constexpr(_SAVED.index("aug_peak"))
KL_ROW = tl.constexpr(_SAVED.index("kl_prcp"))
KL_REVERSE_ROW = tl.constexpr(_SAVED.index("kl_reverse"))


@triton.jit
def product(
    x_ptr, row, live, w_ptr, col, in_col, D, stride_xn, stride_xd, stride_wv, stride_wd,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_V) float32 x[row] @ w[col].T."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        in_d = offs_d < D
        x = tl.load(
            x_ptr + row[:, None] * stride_xn + offs_d[None, :] * stride_xd,
            mask=live[:, None] & in_d[None, :], other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptr + col[None, :] * stride_wv + offs_d[:, None] * stride_wd,
            mask=in_col[None, :] & in_d[:, None], other=0.0,
        )  # fmt: skip
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def two_products(
    x_ptr, aug_ptr, row, live, w_ptr, col, in_col, D, stride_xn, stride_xd, stride_an, stride_ad,
    stride_wv, stride_wd,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `product` for both streams: one load of each weight tile serves both."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    acc_aug = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        in_d = offs_d < D
        mask = live[:, None] & in_d[None, :]
        x = tl.load(
            x_ptr + row[:, None] * stride_xn + offs_d[None, :] * stride_xd, mask=mask, other=0.0
        )
        xa = tl.load(
            aug_ptr + row[:, None] * stride_an + offs_d[None, :] * stride_ad, mask=mask, other=0.0
        )
        w = tl.load(
            w_ptr + col[None, :] * stride_wv + offs_d[:, None] * stride_wd,
            mask=in_col[None, :] & in_d[:, None], other=0.0,
        )  # fmt: skip
        if UPCAST:
            x, xa, w = x.to(tl.float32), xa.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        acc_aug = tl.dot(xa, w, acc_aug, input_precision="ieee")
    return acc, acc_aug


@triton.jit
def head(acc, b_ptr, col, in_col, temperature, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr):
    """Logits from products; LOG_ZERO for banned words and outside the vocabulary."""
    if HAS_BIAS:
        bias = tl.load(b_ptr + col, mask=in_col, other=0.0).to(tl.float32)
        ban = tl.where(bias <= LOG_ZERO, -float("inf"), 0.0)[None, :]
        acc += bias[None, :] + ban
    if CAP:
        t = tl.abs(acc) / softcap
        shrink = tl.exp(-2.0 * t)
        size = softcap * (1.0 - shrink) / (1.0 + shrink)
        # far below the cap 1 - shrink has few bits left: Taylor, to 1e-8 where t < 1/4
        u = t * t
        series = 1.0 - u * (1 / 3 - u * (2 / 15 - u * (17 / 315 - u * (62 / 2835))))
        size = tl.where(t < 0.25, tl.abs(acc) * series, size)
        acc = tl.where(acc < 0, -size, size)
        if HAS_BIAS:  # the cap turns -inf into a number
            acc += ban
    z = acc / temperature
    # Written so that NaN stays NaN.
    return tl.where((z <= LOG_ZERO) | ~in_col[None, :], LOG_ZERO, z)


@triton.jit
def online(z, live_z, m, s, a):
    """Takes (BLOCK_N, BLOCK_V) logits into the running max m, s = sum e - 1 and a = sum e (z - m).

    Beside the peak's 1, a sum would lose the other terms of a confident row. Before the first word,
    s is -1.

    Returns the three, e, and the factor by which older sums of e were scaled.
    """
    m_new = tl.maximum(m, tl.max(z, 1))
    e = tl.where(live_z, tl.exp(z - m_new[:, None]), 0.0)
    shift = m - m_new
    scale = tl.exp(shift)
    a = scale * (a + (s + 1.0) * shift) + tl.sum(e * (z - m_new[:, None]), 1)
    below = z < m_new[:, None]
    peaks = tl.sum(tl.where(below, 0.0, e), 1)
    others = tl.sum(tl.where(below, e, 0.0), 1)
    s = tl.where(m_new > m, (scale * (s + 1.0) + others) + (peaks - 1.0), (s + others) + peaks)
    return m_new, s, a, e, scale


@triton.jit
def forward_kernel(
    x_ptr, aug_ptr, w_ptr, b_ptr, targets_ptr, rows_ptr, count_ptr, part_ptr, level_ptr,
    N, V, D, per_split, stride_xn, stride_xd, stride_an, stride_ad, stride_wv, stride_wd,
    temperature, softcap,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr, LEVELS: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial sums (splits, 4 or 14, N) over words [split * per_split, ...), and levels of words.

    PARTS lists the sums; the gaps are sum e |z - z_aug| and sum e_aug |z - z_aug|.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    count = tl.load(count_ptr)
    if tile * BLOCK_N >= count:
        return
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live = offs_n < count
    row = tl.load(rows_ptr + offs_n, mask=live, other=0)
    target = tl.load(targets_ptr + row, mask=live, other=-1)

    # A lower bound on the log-sum-exp before it is known: a sampled word is rarely far below it.
    bound = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    bound_aug = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    if LEVELS or TWO:
        known = live & (target >= 0) & (target < V)
        bound = target_logit(
            x_ptr, w_ptr, b_ptr, row, target, known, D, stride_xn, stride_xd, stride_wv, stride_wd,
            temperature, softcap, HAS_BIAS, CAP, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if TWO:
            bound_aug = target_logit(
                aug_ptr, w_ptr, b_ptr, row, target, known, D, stride_an, stride_ad, stride_wv,
                stride_wd, temperature, softcap, HAS_BIAS, CAP, BLOCK_N, BLOCK_D,
            )  # fmt: skip

    # z - z_aug of a word that was drawn from p: near to the mean over p.
    near = (bound > LOG_ZERO) & (bound_aug > LOG_ZERO)
    centre = tl.where(near, bound - bound_aug, 0.0)

    m = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    s = tl.full((BLOCK_N,), -1.0, tl.float32)
    a = tl.zeros((BLOCK_N,), tl.float32)
    logit = tl.zeros((BLOCK_N,), tl.float32)
    m_aug = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    s_aug = tl.full((BLOCK_N,), -1.0, tl.float32)
    a_aug = tl.zeros((BLOCK_N,), tl.float32)
    logit_aug = tl.zeros((BLOCK_N,), tl.float32)
    drift = tl.zeros((BLOCK_N,), tl.float32)
    drift_aug = tl.zeros((BLOCK_N,), tl.float32)
    terms = tl.zeros((BLOCK_N,), tl.float32)
    gap = tl.zeros((BLOCK_N,), tl.float32)
    gap_aug = tl.zeros((BLOCK_N,), tl.float32)

    first = split * per_split
    for v in range(first, tl.minimum(first + per_split, V), BLOCK_V):
        col = v + tl.arange(0, BLOCK_V).to(tl.int64)
        in_col = col < V
        hit = col[None, :] == target[:, None]
        if TWO:
            acc, acc_aug = two_products(
                x_ptr, aug_ptr, row, live, w_ptr, col, in_col, D, stride_xn, stride_xd, stride_an,
                stride_ad, stride_wv, stride_wd, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
        else:
            acc = product(
                x_ptr, row, live, w_ptr, col, in_col, D, stride_xn, stride_xd, stride_wv,
                stride_wd, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
            )  # fmt: skip
        z = head(acc, b_ptr, col, in_col, temperature, softcap, HAS_BIAS, CAP)
        m, s, a, e, scale = online(z, ~(z <= LOG_ZERO), m, s, a)
        logit += tl.sum(tl.where(hit, z, 0.0), 1)
        if TWO:
            z_aug = head(acc_aug, b_ptr, col, in_col, temperature, softcap, HAS_BIAS, CAP)
            m_aug, s_aug, a_aug, e_aug, scale_aug = online(
                z_aug, ~(z_aug <= LOG_ZERO), m_aug, s_aug, a_aug
            )
            logit_aug += tl.sum(tl.where(hit, z_aug, 0.0), 1)
            d = z - z_aug
            gap = scale * gap + tl.sum(e * tl.abs(d), 1)
            gap_aug = scale_aug * gap_aug + tl.sum(e_aug * tl.abs(d), 1)
            x = d - centre[:, None]
            drift = scale * drift + tl.sum(e * x, 1)
            drift_aug = scale_aug * drift_aug + tl.sum(e_aug * x, 1)
            # exp(-x) is e_aug / e by this much; far policies overflow, and their terms are not used
            over = tl.exp(tl.minimum((m_aug - m) + centre, FAR))[:, None]
            series = x * x * 0.5 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5 * (1 - x / 6))))
            more = tl.where(tl.abs(x) < 0.25, e * series, (e_aug * over - e) + e * x)
            terms = scale * terms + tl.sum(more, 1)
        if LEVELS:
            u = z - tl.maximum(bound, m + tl.log(s + 1.0))[:, None]
            if TWO:
                u = tl.maximum(
                    u, z_aug - tl.maximum(bound_aug, m_aug + tl.log(s_aug + 1.0))[:, None]
                )
            highest = tl.max(tl.where(live[:, None], u, LOG_ZERO), 0)
            level = tl.minimum(tl.maximum(highest * -LEVELS_PER_NAT, 0.0), 255.0)
            level = tl.where(level == level, level, 0.0)
            tl.store(level_ptr + tile.to(tl.int64) * V + col, level.to(tl.uint8), mask=in_col)

    fields = TWO_STREAM_PARTS if TWO else ONE_STREAM_PARTS
    out = part_ptr + split.to(tl.int64) * fields * N + offs_n
    tl.store(out, m, mask=live)
    tl.store(out + N, s, mask=live)
    tl.store(out + 2 * N, a, mask=live)
    tl.store(out + 3 * N, logit, mask=live)
    if TWO:
        tl.store(out + 4 * N, m_aug, mask=live)
        tl.store(out + 5 * N, s_aug, mask=live)
        tl.store(out + 6 * N, a_aug, mask=live)
        tl.store(out + 7 * N, logit_aug, mask=live)
        tl.store(out + 8 * N, drift, mask=live)
        tl.store(out + 9 * N, drift_aug, mask=live)
        tl.store(out + 10 * N, terms, mask=live)
        tl.store(out + 11 * N, gap, mask=live)
        tl.store(out + 12 * N, gap_aug, mask=live)
        tl.store(out + 13 * N, centre, mask=live)


@triton.jit
def target_logit(
    x_ptr, w_ptr, b_ptr, row, target, known, D, stride_xn, stride_xd, stride_wv, stride_wd,
    temperature, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N,) logits of the targets; LOG_ZERO where unknown."""
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = known[:, None] & (offs_d < D)[None, :]
        x = tl.load(
            x_ptr + row[:, None] * stride_xn + offs_d[None, :] * stride_xd, mask=mask, other=0.0
        )
        w = tl.load(
            w_ptr + target[:, None] * stride_wv + offs_d[None, :] * stride_wd, mask=mask, other=0.0
        )
        acc += tl.sum(x.to(tl.float32) * w.to(tl.float32), 1)
    z = head(acc[None, :], b_ptr, target, known, temperature, softcap, HAS_BIAS, CAP)
    return tl.reshape(z, (BLOCK_N,))


@triton.jit
def log_prob(z, stat, N, live, keep):
    """log p and p of logits z; `stat` points to the peak in the stream's saved statistics."""
    peak = tl.load(stat, mask=live, other=0.0)[:, None]
    log_sum = tl.load(stat + LOG_SUM * N, mask=live, other=0.0)[:, None]
    log_p = (z - peak) - log_sum
    # the peak, whatever rounding did: see `equations.log_probs_again`
    log_p = tl.where(log_p > LOG_HALF, -log_sum, log_p)
    log_p = tl.where(log_p <= LOG_ZERO, LOG_ZERO, log_p)
    return log_p, tl.where(keep, tl.exp(log_p), 0.0)


@triton.jit
def slope(z, temperature, softcap, CAP: tl.constexpr):
    if CAP:
        t = tl.maximum(z * (temperature / softcap), -1.0)
        return (1.0 - t * t) / temperature
    else:
        return 1.0 / temperature
