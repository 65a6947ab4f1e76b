"""Triton kernel that makes the row statistics of the sums that `stats_kernel` leaves.

The arithmetic is float64, so that differences keep the bits that the sums have.
"""

import triton
import triton.language as tl

from papo_kernels.triton.float64 import larger, log1p, number
from papo_kernels.triton.kernels import (
    AUG_LOGIT_GAP_ROW,
    AUG_LOGPROBS_ROW,
    AUG_PART,
    AUG_STREAM,
    ENTROPY_ROW,
    KL_REVERSE_ROW,
    KL_ROW,
    LOG_SUM,
    LOG_ZERO,
    LOGIT_GAP_ROW,
    LOGPROBS_ROW,
    ONE_STREAM_LOGPROBS_ROW,
    PARTS,
)

# Below it, a KL's terms of second order are more exact than the difference of first-order sums.
CLOSE = tl.constexpr(0.25)

OTHERS, WEIGHTED = tl.constexpr(PARTS.index("others")), tl.constexpr(PARTS.index("weighted"))
TARGET, CENTRE = tl.constexpr(PARTS.index("target")), tl.constexpr(PARTS.index("centre"))
DRIFT, AUG_DRIFT = tl.constexpr(PARTS.index("drift")), tl.constexpr(PARTS.index("aug_drift"))
TERMS, GAP = tl.constexpr(PARTS.index("terms")), tl.constexpr(PARTS.index("logit_gap"))
AUG_GAP = tl.constexpr(PARTS.index("aug_logit_gap"))


@triton.jit(do_not_specialize=["N", "V", "count", "ignored"])
def combine_kernel(
    part_ptr, order_ptr, targets_ptr, out_ptr, N, V, count, ignored, sharpness, TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK rows a program, each at its place in (F, N) `out`.

    part: (len(PARTS), N) by the places of rows in `order`, of which the first `count` may count.
    Rows whose target is `ignored` are left alone. With x = z - z_aug - centre, KL(p || q) is
    E_p[x] + log E_p[exp(-x)]. Where q is close to p the two nearly cancel, and it is
    S - (u - log(1 + u)) instead, with S = E_p[exp(-x) - 1 + x] and u = S - E_p[x]: no term of first
    order is left. The sum of both KLs is E_p[x] - E_q[x].
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < count
    row = tl.load(order_ptr + i, mask=live, other=0)
    target = tl.load(targets_ptr + row, mask=live, other=0)
    live &= target != ignored
    is_word = (target >= 0) & (target < V)
    part, out = part_ptr + i, out_ptr + row
    logprobs = out + (LOGPROBS_ROW if TWO else ONE_STREAM_LOGPROBS_ROW) * N
    peak, log_sum, total = of_stream(part, out, logprobs, N, live, is_word, sharpness)
    if TWO:
        peak_aug, log_sum_aug, total_aug = of_stream(
            part + AUG_PART * N, out + AUG_STREAM * N, out + AUG_LOGPROBS_ROW * N, N, live, is_word,
            sharpness,
        )  # fmt: skip
        drift, terms = (
            number(part + DRIFT * N, live) / total,
            number(part + TERMS * N, live) / total,
        )
        aug_drift = number(part + AUG_DRIFT * N, live) / total_aug
        log_ratio = (peak - peak_aug) + (log_sum - log_sum_aug)
        centre = number(part + CENTRE * N, live)
        u = terms - drift
        close = (tl.abs(terms) < CLOSE) & (tl.abs(u) < CLOSE)
        small = tl.where(close, u, 0.0)
        kl = tl.where(
            close, larger(terms - (small - log1p(small)), 0.0), drift + centre - log_ratio
        )
        both = larger(drift - aug_drift, 0.0)
        reverse = tl.where(close, larger(both - kl, 0.0), log_ratio - (aug_drift + centre))
        put(out + KL_ROW * N, kl, live)
        put(out + KL_REVERSE_ROW * N, reverse, live)
        put(out + LOGIT_GAP_ROW * N, number(part + GAP * N, live) / total, live)
        put(out + AUG_LOGIT_GAP_ROW * N, number(part + AUG_GAP * N, live) / total_aug, live)


@triton.jit
def of_stream(part, out, logprobs_ptrs, N, live, is_word, sharpness):
    """Writes one stream's statistics; returns peak, log_sum and sum of exp(z - peak)."""
    # In float32, as the backward multiplies the logits beside it.
    scaled = tl.load(part, mask=live, other=0.0) * sharpness
    total = number(part + OTHERS * N, live) + 1.0
    log_sum = tl.log(total)
    entropy = log_sum - number(part + WEIGHTED * N, live) / total
    peak, logit = number(part, live) * sharpness, number(part + TARGET * N, live)
    logit = tl.where(logit <= LOG_ZERO, -float("inf"), logit * sharpness)
    logprob = tl.where(is_word, (logit - peak) - log_sum, float("nan"))
    tl.store(out, scaled, mask=live)
    put(out + LOG_SUM * N, log_sum, live)
    put(out + ENTROPY_ROW * N, entropy, live)
    put(logprobs_ptrs, logprob, live)
    return peak, log_sum, total


@triton.jit
def put(ptrs, x, live):
    tl.store(ptrs, x.to(tl.float32), mask=live)
