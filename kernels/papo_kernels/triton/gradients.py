"""Triton kernels of the backward: gradients of logits, and their products with weight and states.

Shapes and names are those of `kernels`.
"""

import triton
import triton.language as tl

from papo_kernels.rows import OUTPUTS
from papo_kernels.triton.kernels import (
    AUG_STREAM,
    ENTROPY_ROW,
    KL_REVERSE_ROW,
    KL_ROW,
    head,
    log_prob,
    product,
    slope,
    two_products,
)

# The sums of a block's entries, as they stand in (blocks, len(SUMS), BLOCK_N): see
# `certificate.CandidateSums`. `dz_kernel` leaves alone what its flags make needless.
SUMS = (
    "mass", "own", "logit_gap", "size", "aug_mass", "aug_own", "aug_logit_gap", "aug_size",
    "kl_terms", "net_size", "kl_reverse_terms",
)  # fmt: skip
N_SUMS = tl.constexpr(len(SUMS))
MASS, AUG_MASS = tl.constexpr(SUMS.index("mass")), tl.constexpr(SUMS.index("aug_mass"))
OWN, AUG_OWN = tl.constexpr(SUMS.index("own")), tl.constexpr(SUMS.index("aug_own"))
SIZE, AUG_SIZE = tl.constexpr(SUMS.index("size")), tl.constexpr(SUMS.index("aug_size"))
LOGIT_GAP = tl.constexpr(SUMS.index("logit_gap"))
AUG_LOGIT_GAP = tl.constexpr(SUMS.index("aug_logit_gap"))
KL_TERMS = tl.constexpr(SUMS.index("kl_terms"))
NET_SIZE = tl.constexpr(SUMS.index("net_size"))
KL_REVERSE_TERMS = tl.constexpr(SUMS.index("kl_reverse_terms"))

# Where upstream gradients stand in (len(OUTPUTS), N).
UP_LOGPROB = tl.constexpr(OUTPUTS.index("logprobs"))
UP_ENTROPY = tl.constexpr(OUTPUTS.index("entropy"))
UP_LOGPROB_AUG = tl.constexpr(OUTPUTS.index("aug_logprobs"))
UP_ENTROPY_AUG = tl.constexpr(OUTPUTS.index("aug_entropy"))
UP_KL = tl.constexpr(OUTPUTS.index("kl_prcp"))
UP_KL_REVERSE = tl.constexpr(OUTPUTS.index("kl_reverse"))


@triton.jit
def dz_kernel(
    x_ptr, aug_ptr, w_ptr, b_ptr, targets_ptr, rows_ptr, stats_ptr, up_ptr, tile_ptr, first_ptr,
    last_ptr, col_ptr, dz_ptr, dz_aug_ptr, sums_ptr,
    N, V, D, count, first_tile, stride_xn, stride_xd, stride_an, stride_ad, stride_wv, stride_wd,
    stride_entry, stride_tile, temperature, softcap,
    TWO: tl.constexpr, FULL: tl.constexpr, AUG: tl.constexpr, LOGPROB: tl.constexpr,
    ENTROPY: tl.constexpr, LOGPROB_AUG: tl.constexpr, ENTROPY_AUG: tl.constexpr, KL: tl.constexpr,
    KL_REVERSE: tl.constexpr, GATHER: tl.constexpr, NET: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of both streams' products for some columns of one tile, and sums that certify them.

    q - p is written out where it is used: kept from the first use to the last it costs registers,
    84 bytes of which spill on sm_90.

    GATHER: block b holds the entries [first[b], last[b]) of tile tile[b], whose words are `col`.
    Else: grid (word blocks, tiles), all words. Entry k of row r of a tile goes to
    dz[k * stride_entry + r + tile * stride_tile]. sums: see SUMS.
    """
    block = tl.program_id(0)
    if GATHER:
        tile = tl.load(tile_ptr + block)
        entry = tl.load(first_ptr + block) + tl.arange(0, BLOCK_V).to(tl.int64)
        in_col = entry < tl.load(last_ptr + block)
        col = tl.load(col_ptr + entry, mask=in_col, other=0)
    else:
        tile = first_tile + tl.program_id(1)
        entry = block * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
        in_col = entry < V
        col = entry
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    live = offs_n < count
    row = tl.load(rows_ptr + offs_n, mask=live, other=0)
    target = tl.load(targets_ptr + row, mask=live, other=0)
    hit = (col[None, :] == target[:, None]) & in_col[None, :]
    stat = stats_ptr + row
    up = up_ptr + row
    if TWO:
        acc, acc_aug = two_products(
            x_ptr, aug_ptr, row, live, w_ptr, col, in_col, D, stride_xn, stride_xd, stride_an,
            stride_ad, stride_wv, stride_wd, UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
    else:
        acc = product(
            x_ptr, row, live, w_ptr, col, in_col, D, stride_xn, stride_xd, stride_wv, stride_wd,
            UPCAST, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
    keep = live[:, None] & in_col[None, :]
    z = head(acc, b_ptr, col, in_col, temperature, softcap, HAS_BIAS, CAP)
    log_p, p = log_prob(z, stat, N, live, keep)
    entropy = tl.load(stat + ENTROPY_ROW * N, mask=live, other=0.0)[:, None]
    log_q, q, distance = log_p, p, p
    if TWO:
        z_aug = head(acc_aug, b_ptr, col, in_col, temperature, softcap, HAS_BIAS, CAP)
        log_q, q = log_prob(z_aug, stat + AUG_STREAM * N, N, live, keep)
        distance = tl.abs(z - z_aug)
    g_kl = tl.zeros((BLOCK_N, 1), tl.float32)
    if KL:
        g_kl = tl.load(up + UP_KL * N, mask=live, other=0.0)[:, None]
    if KL_REVERSE:
        g_reverse = tl.load(up + UP_KL_REVERSE * N, mask=live, other=0.0)[:, None]
        kl_reverse = tl.load(stat + KL_REVERSE_ROW * N, mask=live, other=0.0)[:, None]
    out = entry[None, :] * stride_entry + (
        tl.arange(0, BLOCK_N)[:, None] + (tile - first_tile) * stride_tile
    )
    sums = sums_ptr + block.to(tl.int64) * N_SUMS * BLOCK_N + tl.arange(0, BLOCK_N)
    if GATHER:
        tl.store(sums + MASS * BLOCK_N, tl.sum(p, 1))
        if TWO:
            tl.store(sums + AUG_MASS * BLOCK_N, tl.sum(q, 1))
    if FULL:
        factor = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        if ENTROPY:
            g = tl.load(up + UP_ENTROPY * N, mask=live, other=0.0)[:, None]
            factor -= g * (log_p + entropy)
        if KL:
            kl = tl.load(stat + KL_ROW * N, mask=live, other=0.0)[:, None]
            factor -= g_kl * (log_q - log_p + kl)
        dz = p * factor
        if LOGPROB:
            g = tl.load(up + UP_LOGPROB * N, mask=live, other=0.0)[:, None]
            dz -= g * d_log_prob(hit, p, log_p)
        if KL_REVERSE:
            dz -= g_reverse * q_minus_p(p, q, log_q - log_p)
        dz = tl.where(keep, dz, 0.0) * slope(z, temperature, softcap, CAP)
        if GATHER:
            tl.store(sums + OWN * BLOCK_N, tl.sum(tl.where(keep, p * (log_p + entropy), 0.0), 1))
            tl.store(sums + SIZE * BLOCK_N, tl.sum(tl.abs(dz), 1))
        net = dz
        tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=in_col[None, :])
    if GATHER and (KL or KL_REVERSE):
        tl.store(sums + LOGIT_GAP * BLOCK_N, tl.sum(tl.where(keep, p * distance, 0.0), 1))
        tl.store(sums + AUG_LOGIT_GAP * BLOCK_N, tl.sum(tl.where(keep, q * distance, 0.0), 1))
        x = log_q - log_p
        gap = q_minus_p(p, q, x)
        if KL:
            terms = tl.where(keep, gap - p * x, 0.0)
            tl.store(sums + KL_TERMS * BLOCK_N, tl.sum(terms, 1))
        if KL_REVERSE:
            terms = tl.where(keep, q * x - gap, 0.0)
            tl.store(sums + KL_REVERSE_TERMS * BLOCK_N, tl.sum(terms, 1))
    if AUG:
        entropy_aug = tl.load(stat + (AUG_STREAM + ENTROPY_ROW) * N, mask=live, other=0.0)[:, None]
        dz = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        if ENTROPY_AUG:
            g = tl.load(up + UP_ENTROPY_AUG * N, mask=live, other=0.0)[:, None]
            dz -= g * q * (log_q + entropy_aug)
        if KL:
            dz += g_kl * q_minus_p(p, q, log_q - log_p)
        if KL_REVERSE:
            dz += g_reverse * q * (log_q - log_p - kl_reverse)
        if LOGPROB_AUG:
            g = tl.load(up + UP_LOGPROB_AUG * N, mask=live, other=0.0)[:, None]
            dz -= g * d_log_prob(hit, q, log_q)
        dz = tl.where(keep, dz, 0.0) * slope(z_aug, temperature, softcap, CAP)
        if GATHER:
            own_aug = tl.where(keep, q * (log_q + entropy_aug), 0.0)
            tl.store(sums + AUG_OWN * BLOCK_N, tl.sum(own_aug, 1))
            tl.store(sums + AUG_SIZE * BLOCK_N, tl.sum(tl.abs(dz), 1))
        if NET:
            tl.store(sums + NET_SIZE * BLOCK_N, tl.sum(tl.abs(net + dz), 1))
        tl.store(dz_aug_ptr + out, dz.to(dz_aug_ptr.dtype.element_ty), mask=in_col[None, :])


@triton.jit
def d_log_prob(hit, p, log_p):
    """p, less 1 at the target without the loss of bits where p is close to 1."""
    return tl.where(hit, q_minus_p(1.0, p, log_p), p)


@triton.jit
def q_minus_p(p, q, x):
    """q - p as in `equations.q_minus_p`: by a series where q is close to p; x: log q - log p."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(tl.abs(x) < 0.25, p * series, q - p)


@triton.jit
def d_hidden_kernel(
    dz_ptr, w_ptr, rows_ptr, col_ptr, offset_ptr, out_ptr,
    D, count, first_tile, stride_wv, stride_wd, stride_on, stride_od,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[row] = sum over the tile's entries of dz[entry, row] w[col[entry]]; overwrites."""
    local = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    first = tl.load(offset_ptr + local)
    last = tl.load(offset_ptr + local + 1)
    offs_r = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for k in range(first, last, BLOCK_V):
        entry = k + tl.arange(0, BLOCK_V).to(tl.int64)
        in_col = entry < last
        col = tl.load(col_ptr + entry, mask=in_col, other=0)
        dz = tl.load(
            dz_ptr + entry[None, :] * BLOCK_N + offs_r[:, None], mask=in_col[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + col[:, None] * stride_wv + offs_d[None, :] * stride_wd,
            mask=in_col[:, None] & in_d[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            dz, w = dz.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(dz, w, acc, input_precision="ieee")
    offs_n = (first_tile + local) * BLOCK_N + offs_r
    live = (offs_n < count) & (last > first)
    row = tl.load(rows_ptr + offs_n, mask=live, other=0)
    tl.store(
        out_ptr + row[:, None] * stride_on + offs_d[None, :] * stride_od,
        acc.to(out_ptr.dtype.element_ty),
        mask=live[:, None] & in_d[None, :],
    )


@triton.jit
def d_weight_kernel(
    dz_ptr, x_ptr, rows_ptr, tile_ptr, first_ptr, last_ptr, col_ptr, dw_ptr, db_ptr,
    D, count, first_block, stride_xn, stride_xd, stride_wv, stride_wd,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dw[col[entry]] += dz[entry] @ x[rows of the tile], atomically in float32.

    Within one tile a word occurs once: launched tile by tile, the sums have one order.
    """
    block = first_block + tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    tile = tl.load(tile_ptr + block)
    entry = tl.load(first_ptr + block) + tl.arange(0, BLOCK_V).to(tl.int64)
    in_col = entry < tl.load(last_ptr + block)
    col = tl.load(col_ptr + entry, mask=in_col, other=0)
    offs_r = tl.arange(0, BLOCK_N)
    offs_n = tile * BLOCK_N + offs_r
    live = offs_n < count
    row = tl.load(rows_ptr + offs_n, mask=live, other=0)
    dz = tl.load(
        dz_ptr + entry[:, None] * BLOCK_N + offs_r[None, :], mask=in_col[:, None], other=0.0
    )
    if BIAS:
        if tl.program_id(1) == 0:
            tl.atomic_add(db_ptr + col, tl.sum(dz.to(tl.float32), 1), mask=in_col)
    if WEIGHT:
        x = tl.load(
            x_ptr + row[:, None] * stride_xn + offs_d[None, :] * stride_xd,
            mask=live[:, None] & in_d[None, :], other=0.0,
        )  # fmt: skip
        if UPCAST:
            dz, x = dz.to(tl.float32), x.to(tl.float32)
        update = tl.dot(dz, x, input_precision="ieee")
        tl.atomic_add(
            dw_ptr + col[:, None] * stride_wv + offs_d[None, :] * stride_wd,
            update, mask=in_col[:, None] & in_d[None, :],
        )  # fmt: skip
