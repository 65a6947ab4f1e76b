"""Triton kernels of what a row's gradient is at least: `sizes.least_sizes`, and norms of states.

The arithmetic is float64. Shapes: N rows of a call; stats: (F, N) as saved; up: (6, N) upstream
gradients. Three numbers of a row are those of both streams and of their sum, in this order.
"""

import triton
import triton.language as tl

from papo_kernels.triton.float64 import expm1, finite_or_0, larger, number
from papo_kernels.triton.gradients import (
    UP_ENTROPY,
    UP_ENTROPY_AUG,
    UP_KL,
    UP_KL_REVERSE,
    UP_LOGPROB,
    UP_LOGPROB_AUG,
)
from papo_kernels.triton.kernels import (
    AUG_LOGIT_GAP_ROW,
    AUG_LOGPROBS_ROW,
    AUG_STREAM,
    ENTROPY_ROW,
    KL_REVERSE_ROW,
    KL_ROW,
    LOG_SUM,
    LOG_ZERO,
    LOGIT_GAP_ROW,
    LOGPROBS_ROW,
    ONE_STREAM_LOGPROBS_ROW,
)


@triton.jit
def norms_kernel(
    hidden_ptr, aug_ptr, out_ptr, D, stride_h, stride_h_d, stride_aug, stride_aug_d,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(S, N) float64 norms of (N, D) states, 0 where one is not finite; grid (N, S)."""
    row, stream = tl.program_id(0).to(tl.int64), tl.program_id(1)
    states, stride = hidden_ptr + row * stride_h, stride_h_d
    if stream == 1:
        states, stride = aug_ptr + row * stride_aug, stride_aug_d
    total = tl.zeros((BLOCK_D,), tl.float64)
    for n in range(0, D, BLOCK_D):
        d = n + tl.arange(0, BLOCK_D)
        x = tl.load(states + d.to(tl.int64) * stride, mask=d < D, other=0.0).to(tl.float64)
        total += x * x
    norm = tl.sqrt(tl.sum(total, 0))
    tl.store(out_ptr + stream * tl.num_programs(0) + row, finite_or_0(norm))


@triton.jit(do_not_specialize=["N"])
def least_kernel(
    stats_ptr, up_ptr, out_ptr, N, sharpness, softcap,
    TWO: tl.constexpr, FULL: tl.constexpr, AUG: tl.constexpr, NET: tl.constexpr,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, LOGPROB_AUG: tl.constexpr,
    ENTROPY_AUG: tl.constexpr, KL: tl.constexpr, KL_REVERSE: tl.constexpr, CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`sizes.least_sizes`: (3, N) float64, what sum |dz| is at least; BLOCK rows a program."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    stats, up = stats_ptr + row, up_ptr + row
    nothing = tl.zeros((BLOCK,), tl.float64)
    g, g_entropy, g_aug, g_entropy_aug = nothing, nothing, nothing, nothing
    g_kl, g_reverse, kl, kl_reverse = nothing, nothing, nothing, nothing
    if LOGPROB:
        g = number(up + UP_LOGPROB * N, live)
    if ENTROPY:
        g_entropy = number(up + UP_ENTROPY * N, live)
    if LOGPROB_AUG:
        g_aug = number(up + UP_LOGPROB_AUG * N, live)
    if ENTROPY_AUG:
        g_entropy_aug = number(up + UP_ENTROPY_AUG * N, live)
    if KL:
        g_kl, kl = number(up + UP_KL * N, live), number(stats + KL_ROW * N, live)
    if KL_REVERSE:
        g_reverse = number(up + UP_KL_REVERSE * N, live)
        kl_reverse = number(stats + KL_REVERSE_ROW * N, live)
    peak, log_sum = number(stats, live), number(stats + LOG_SUM * N, live)
    entropy = number(stats + ENTROPY_ROW * N, live)
    logprob = number(stats + (LOGPROBS_ROW if TWO else ONE_STREAM_LOGPROBS_ROW) * N, live)
    peak_aug, log_sum_aug, entropy_aug, logprob_aug = peak, log_sum, entropy, logprob
    if TWO:
        aug = stats + AUG_STREAM * N
        peak_aug, log_sum_aug = number(aug, live), number(aug + LOG_SUM * N, live)
        entropy_aug = number(aug + ENTROPY_ROW * N, live)
        logprob_aug = number(stats + AUG_LOGPROBS_ROW * N, live)
    # At the target.
    log_p, log_q = larger(logprob, LOG_ZERO), larger(logprob_aug, LOG_ZERO)
    p, q = tl.exp(log_p), tl.exp(log_q)
    ratio = log_q - log_p
    gap = tl.where(tl.abs(ratio) < 0.25, p * expm1(ratio), q - p)
    y, y_aug = nothing, nothing
    if FULL:
        y = own_gradient(log_p, entropy, g, g_entropy, True)
        if KL or KL_REVERSE:  # else nothing of the other stream counts, and so no NaN there
            y -= g_kl * p * (ratio + kl) + g_reverse * gap
        y *= slope_at(log_p + (log_sum + peak), sharpness, softcap, CAP)
    if AUG:
        y_aug = own_gradient(log_q, entropy_aug, g_aug, g_entropy_aug, True)
        if KL or KL_REVERSE:
            y_aug += g_kl * gap + g_reverse * q * (ratio - kl_reverse)
        y_aug *= slope_at(log_q + (log_sum_aug + peak_aug), sharpness, softcap, CAP)
    size, size_aug, size_net = tl.abs(y), tl.abs(y_aug), tl.abs(y + y_aug)
    if not CAP:
        low, high = own_bounds(log_p, logprob, log_sum, entropy, g, g_entropy)
        part, part_aug, part_net = low, nothing, nothing
        if TWO:
            low_aug, high_aug = own_bounds(
                log_q, logprob_aug, log_sum_aug, entropy_aug, g_aug, g_entropy_aug
            )
            least, most, least_aug, most_aug = nothing, nothing, nothing, nothing
            if KL or KL_REVERSE:
                normalisers = tl.abs((peak - peak_aug) + (log_sum - log_sum_aug))
                by_logit = number(stats + LOGIT_GAP_ROW * N, live)
                by_logit_aug = number(stats + AUG_LOGIT_GAP_ROW * N, live)
                away = by_logit + by_logit_aug + normalisers
                away = tl.where(away > 2.0, 2.0, away)
                kl, kl_reverse = tl.abs(kl), tl.abs(kl_reverse)
                g_kl, g_reverse = tl.abs(g_kl), tl.abs(g_reverse)
                # What the KLs add, in the stream that each averages over and in the other.
                least = g_kl * larger(by_logit - normalisers - kl, 0.0) - g_reverse * away
                most = g_kl * (by_logit + normalisers + kl) + g_reverse * away
                least_aug = g_reverse * larger(by_logit_aug - normalisers - kl_reverse, 0.0)
                least_aug -= g_kl * away
                most_aug = g_reverse * (by_logit_aug + normalisers + kl_reverse) + g_kl * away
            part = larger(low - most, larger(least, 0.0) - high)
            part_aug = larger(low_aug - most_aug, larger(least_aug, 0.0) - high_aug)
            part_net = low - high_aug - 2.0 * (g_kl * kl + g_reverse * kl_reverse)
        size = larger(2.0 * size, part * sharpness)
        size_aug = larger(2.0 * size_aug, part_aug * sharpness)
        size_net = larger(2.0 * size_net, part_net * sharpness)
    tl.store(out_ptr + row, tl.maximum(finite_or_0(size), 0.0), mask=live)
    tl.store(out_ptr + N + row, tl.maximum(finite_or_0(size_aug), 0.0), mask=live)
    tl.store(out_ptr + 2 * N + row, tl.maximum(finite_or_0(size_net), 0.0), mask=live)


@triton.jit
def own_gradient(log_p, entropy, g, g_entropy, TARGET: tl.constexpr):
    """`equations.own_part` of the target, or of another word."""
    p = tl.exp(log_p)
    of_logprob = -g * p
    if TARGET:
        of_logprob = -g * expm1(log_p)
    return of_logprob - g_entropy * p * (log_p + entropy)


@triton.jit
def own_bounds(log_p, logprob, log_sum, entropy, g, g_entropy):
    """`sizes._own_bounds`; log_p: `logprob`, at least LOG_ZERO."""
    least = 2.0 * tl.abs(own_gradient(log_p, entropy, g, g_entropy, True))
    peak = 2.0 * tl.abs(own_gradient(-log_sum, entropy, g, g_entropy, False))
    least = tl.where(logprob < -log_sum, larger(least, peak), least)
    return least, 2.0 * (tl.abs(g_entropy) * entropy - tl.abs(g) * expm1(logprob))


@triton.jit
def slope_at(z, sharpness, softcap, CAP: tl.constexpr):
    """`equations.slope`."""
    if CAP:
        t = z / sharpness / softcap
        t = tl.where(t > 1.0, 1.0, tl.where(t < -1.0, -1.0, t))
        return (1.0 - t * t) * sharpness
    else:
        return sharpness
