"""Triton kernels of the certificate: `certificate.outside` and `sizes.Wholes`, of all rows.

All arithmetic is float64, as it is there. A comparison that NaN is lost in would make a row that
holds one look certified: `larger` and `unsure` keep it.

Shapes: N rows of a call, T tiles. stats: (F, N) as saved; up: (6, N) upstream gradients; sums:
(len(SUMS), N) over a row's candidates. Three numbers of a row are those of both streams and of
their sum, in this order.
"""

import triton
import triton.language as tl

from papo_kernels import certificate
from papo_kernels.triton import gradients
from papo_kernels.triton.float64 import finite_or_0, larger, number
from papo_kernels.triton.gradients import (
    AUG_LOGIT_GAP,
    AUG_MASS,
    AUG_OWN,
    KL_REVERSE_TERMS,
    KL_TERMS,
    LOGIT_GAP,
    MASS,
    OWN,
    UP_ENTROPY,
    UP_ENTROPY_AUG,
    UP_KL,
    UP_KL_REVERSE,
    UP_LOGPROB,
    UP_LOGPROB_AUG,
)
from papo_kernels.triton.kernels import (
    AUG_LOGIT_GAP_ROW,
    AUG_STREAM,
    ENTROPY_ROW,
    KL_REVERSE_ROW,
    KL_ROW,
    LOG_SUM,
    LOGIT_GAP_ROW,
)

ROUNDING = tl.constexpr(certificate.ROUNDING)
# Where sum |dz| of both streams and of their sum stand among the sums over candidates.
SIZE, AUG_SIZE, NET_SIZE = gradients.SIZE, gradients.AUG_SIZE, gradients.NET_SIZE
# Squares are summed of sum |dz| and of sum |dz| |h|, of three sizes each.
SQUARES = tl.constexpr(6)


@triton.jit(do_not_specialize=["N"])
def outside_kernel(
    sums_ptr, stats_ptr, up_ptr, tile_ptr, mass_ptr, information_ptr, norms_ptr, least_ptr,
    squares_ptr, out_ptr, N, sharpness, WEIGHT: tl.constexpr,
    TWO: tl.constexpr, FULL: tl.constexpr, AUG: tl.constexpr, NET: tl.constexpr,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, LOGPROB_AUG: tl.constexpr,
    ENTROPY_AUG: tl.constexpr, KL: tl.constexpr, KL_REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`certificate.outside` of BLOCK rows a program; NaN where anything is NaN.

    tile: (N,) each row's; mass, information: (T,) what levels say of the other words; out: (3, N).
    least: (3, N), which learns from `sums`; norms: (2, N) of states, where WEIGHT; squares:
    (programs, SQUARES), the sums of least^2 and of (least norms)^2 over the program's rows.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    sums, stats, up = sums_ptr + row, stats_ptr + row, up_ptr + row
    tile = tl.load(tile_ptr + row, mask=live, other=0)
    beyond = tl.load(mass_ptr + tile, mask=live, other=0.0)
    information = tl.load(information_ptr + tile, mask=live, other=0.0)
    mass = tl.minimum(left(1.0, number(sums + MASS * N, live)), beyond)
    unsure = number(sums + MASS * N, live) * 0.0
    own, own_aug, aug_mass = unsure, unsure, unsure
    if LOGPROB:
        own += tl.abs(number(up + UP_LOGPROB * N, live)) * mass
    if ENTROPY:
        own += tl.abs(number(up + UP_ENTROPY * N, live)) * own_outside(
            number(sums + OWN * N, live), number(stats + ENTROPY_ROW * N, live), information
        )
    full, net = own, own
    if TWO:
        aug_mass = tl.minimum(left(1.0, number(sums + AUG_MASS * N, live)), beyond)
        unsure += number(sums + AUG_MASS * N, live) * 0.0
        if LOGPROB_AUG:
            own_aug += tl.abs(number(up + UP_LOGPROB_AUG * N, live)) * aug_mass
        if ENTROPY_AUG:
            own_aug += tl.abs(number(up + UP_ENTROPY_AUG * N, live)) * own_outside(
                number(sums + AUG_OWN * N, live),
                number(stats + (AUG_STREAM + ENTROPY_ROW) * N, live),
                information,
            )
        net = own + own_aug
    aug = own_aug
    if KL or KL_REVERSE:
        peaks = number(stats, live) - number(stats + AUG_STREAM * N, live)
        log_sums = number(stats + LOG_SUM * N, live) - number(
            stats + (AUG_STREAM + LOG_SUM) * N, live
        )
        normalisers = tl.abs(peaks + log_sums)
        gap = left(number(stats + LOGIT_GAP_ROW * N, live), number(sums + LOGIT_GAP * N, live))
        aug_gap = left(
            number(stats + AUG_LOGIT_GAP_ROW * N, live), number(sums + AUG_LOGIT_GAP * N, live)
        )
        unsure += (gap + aug_gap + normalisers) * 0.0
        both = tl.minimum(mass + aug_mass, beyond)
        moved = tl.minimum(gap + aug_gap + normalisers * both, both)
    if KL:
        weight = tl.abs(number(up + UP_KL * N, live))
        kl = number(stats + KL_ROW * N, live)
        terms = terms_outside(kl, number(sums + KL_TERMS * N, live))
        unsure += terms * 0.0
        ratio = tl.minimum(gap + normalisers * mass, by_terms(terms, mass))
        full += weight * (ratio + tl.abs(kl) * mass)
        aug += weight * moved
        net += weight * (terms + tl.abs(kl) * mass)
    if KL_REVERSE:
        weight = tl.abs(number(up + UP_KL_REVERSE * N, live))
        kl = number(stats + KL_REVERSE_ROW * N, live)
        terms = terms_outside(kl, number(sums + KL_REVERSE_TERMS * N, live))
        unsure += terms * 0.0
        ratio = tl.minimum(aug_gap + normalisers * aug_mass, by_terms(terms, aug_mass))
        full += weight * moved
        aug += weight * (ratio + tl.abs(kl) * aug_mass)
        net += weight * (terms + tl.abs(kl) * aug_mass)
    # A minimum may lose a NaN: this does not.
    squares = squares_ptr + tl.program_id(0) * SQUARES
    norms = norms_ptr + row
    if FULL:
        tl.store(out_ptr + row, full * sharpness + unsure, mask=live)
        learn(sums + SIZE * N, least_ptr + row, norms, live, squares, WEIGHT)
    if AUG:
        tl.store(out_ptr + N + row, aug * sharpness + unsure, mask=live)
        learn(sums + AUG_SIZE * N, least_ptr + N + row, norms + N, live, squares + 2, WEIGHT)
    if NET:
        tl.store(out_ptr + 2 * N + row, net * sharpness + unsure, mask=live)
        learn(sums + NET_SIZE * N, least_ptr + 2 * N + row, norms, live, squares + 4, WEIGHT)


@triton.jit
def learn(size_ptrs, least_ptrs, norm_ptrs, live, squares_ptr, WEIGHT: tl.constexpr):
    """Takes into the least sizes what candidates have, and squares them."""
    least = tl.load(least_ptrs, mask=live, other=0.0)
    least = tl.maximum(least, finite_or_0(number(size_ptrs, live)))
    tl.store(least_ptrs, least, mask=live)
    tl.store(squares_ptr, tl.sum(least * least, 0))
    if WEIGHT:
        long = least * tl.load(norm_ptrs, mask=live, other=0.0)
        tl.store(squares_ptr + 1, tl.sum(long * long, 0))


@triton.jit(do_not_specialize=["N", "parts"])
def whole_kernel(
    sums_ptr, norms_ptr, squares_ptr, rows_ptr, bounds_ptr, whole_ptr, spare_ptr, share_ptr, N,
    parts, budget, FULL: tl.constexpr, AUG: tl.constexpr, NET: tl.constexpr,
    OF_TOKEN: tl.constexpr, WEIGHT: tl.constexpr, PLAIN: tl.constexpr, PLAIN_AUG: tl.constexpr,
    PLAIN_NET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What shares are of, and the shares, of BLOCK rows a program.

    sums, norms, squares, bounds: as `outside_kernel` has and leaves them, of `parts` programs.
    rows: (1,) int64, rows that count. OF_TOKEN: a share is of the row's own sum |dz|. Else of the
    root mean square of it where that is larger, as the weight's gradient (WEIGHT) and the other
    ones (PLAIN) see it. Writes (3, N) `whole`, (3, N) float32 `spare`, what rows may drop of their
    candidates, infinite where not certified, and (N,) `share`, the largest, infinite for NaN.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    sums, bounds, whole, spare = sums_ptr + row, bounds_ptr + row, whole_ptr + row, spare_ptr + row
    norms = norms_ptr + row
    share = tl.zeros((BLOCK,), tl.float64)
    count = tl.load(rows_ptr).to(tl.float64)
    if FULL:
        typical = typical_size(
            squares_ptr, parts, norms, count, live, OF_TOKEN, WEIGHT, PLAIN, BLOCK
        )
        share = larger(share, take(sums + SIZE * N, typical, bounds, whole, spare, budget, live))
    else:
        tl.store(spare, tl.full((BLOCK,), float("inf"), tl.float32), mask=live)
    if AUG:
        typical = typical_size(
            squares_ptr + 2, parts, norms + N, count, live, OF_TOKEN, WEIGHT, PLAIN_AUG, BLOCK
        )
        found = take(sums + AUG_SIZE * N, typical, bounds + N, whole + N, spare + N, budget, live)
        share = larger(share, found)
    else:
        tl.store(spare + N, tl.full((BLOCK,), float("inf"), tl.float32), mask=live)
    if NET:
        typical = typical_size(
            squares_ptr + 4, parts, norms, count, live, OF_TOKEN, WEIGHT, PLAIN_NET, BLOCK
        )
        found = take(
            sums + NET_SIZE * N, typical, bounds + 2 * N, whole + 2 * N, spare + 2 * N, budget,
            live,
        )  # fmt: skip
        share = larger(share, found)
    else:
        tl.store(spare + 2 * N, tl.full((BLOCK,), float("inf"), tl.float32), mask=live)
    # NaN compares false with every budget; infinity says the same to a maximum.
    tl.store(share_ptr + row, tl.where(share == share, share, float("inf")), mask=live)


@triton.jit
def typical_size(
    squares_ptr, parts, norm_ptrs, count, live, OF_TOKEN: tl.constexpr, WEIGHT: tl.constexpr,
    PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The root mean square of rows' sizes, in units of a row."""
    nothing = tl.zeros((BLOCK,), tl.float64)
    if OF_TOKEN:
        return nothing
    else:
        plain, long = nothing, nothing
        for n in range(0, parts, BLOCK):
            part = n + tl.arange(0, BLOCK)
            squares = squares_ptr + part * SQUARES
            plain += tl.load(squares, mask=part < parts, other=0.0)
            if WEIGHT:
                long += tl.load(squares + 1, mask=part < parts, other=0.0)
        plain = nothing + tl.sqrt(tl.sum(plain, 0) / count)
        if not WEIGHT:
            return plain
        else:
            norm = tl.load(norm_ptrs, mask=live, other=0.0)
            long = tl.sqrt(tl.sum(long, 0) / count) / tl.maximum(norm, 1e-300)
            if PLAIN:
                long = tl.minimum(plain, long)
            return long


@triton.jit
def take(size_ptrs, typical, bound_ptrs, whole_ptrs, spare_ptrs, budget, live):
    """Writes one of a row's three `whole` and `spare`; returns its share."""
    whole = larger(number(size_ptrs, live), typical)
    bound = tl.load(bound_ptrs, mask=live, other=0.0)
    tl.store(whole_ptrs, whole, mask=live)
    tl.store(spare_ptrs, (budget * whole - bound).to(tl.float32), mask=live)
    return bound / larger(whole, 1e-300)


@triton.jit
def left(whole, part):
    """What is left of a sum over the vocabulary beside the candidates' part, at most."""
    return tl.maximum(whole - part, 0.0) + ROUNDING * (1.0 + whole)


@triton.jit
def own_outside(own, entropy, information):
    """Bound on sum |p (log p + H)|; sums over all words are 0, and so it is the candidates' sum."""
    return tl.minimum(tl.maximum(own, 0.0) + ROUNDING * (1.0 + entropy), information) + own * 0.0


@triton.jit
def terms_outside(kl, terms):
    """Bound on a KL's non-negative terms."""
    rounding = ROUNDING * (tl.sqrt(2.0 * tl.abs(kl)) + tl.abs(kl))
    return tl.maximum(kl - terms, 0.0) + rounding + (kl - terms) * 0.0


@triton.jit
def by_terms(terms, mass):
    """Bound on sum p |x| by that on sum p (e^x - 1 - x)."""
    return tl.sqrt(3.0 * terms * mass) + 2.718281828459045 * terms
