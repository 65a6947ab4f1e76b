"""Triton kernels of the backward: gradients of logits from products, sums that certify them, and
the sum of the weight's gradients.

Names and shapes are those of `kernels`.
"""

import triton
import triton.language as tl

from papo_kernels.rows import OUTPUTS
from papo_kernels.triton.kernels import (
    AUG_STREAM,
    ENTROPY_ROW,
    KL_REVERSE_ROW,
    KL_ROW,
    LOG_ZERO,
    log_prob,
    logits,
    slope,
)

# A row's sums over its candidates, as they stand in (len(SUMS), N): see
# `certificate.CandidateSums`. `dz_kernel` leaves alone what its flags make needless.
SUMS = (
    "mass", "own", "logit_gap", "size", "aug_mass", "aug_own", "aug_logit_gap", "aug_size",
    "kl_terms", "net_size", "kl_reverse_terms",
)  # fmt: skip
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


@triton.jit(do_not_specialize=["N", "rows", "words", "start"])
def dz_kernel(
    z_ptr, b_ptr, targets_ptr, rows_ptr, stats_ptr, up_ptr, col_ptr, done_ptr, start_ptr, dz_ptr,
    sums_ptr, N, words, width, rows, start, stride_z, stride_dz, stride_done, sharpness, softcap,
    TWO: tl.constexpr, FULL: tl.constexpr, AUG: tl.constexpr, LOGPROB: tl.constexpr,
    ENTROPY: tl.constexpr, LOGPROB_AUG: tl.constexpr, ENTROPY_AUG: tl.constexpr, KL: tl.constexpr,
    KL_REVERSE: tl.constexpr, GATHER: tl.constexpr, OWN_WORDS: tl.constexpr, NET: tl.constexpr,
    SKIP: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of both streams' products for some words, of BLOCK_N rows a program.

    Row r of these rows is row rows_ptr[r] of the call. Its products stand in z[r], those of the aug
    stream in z[rows + r]. Of `words` words, the k-th is col_ptr[k] where GATHER, else start + k.
    Gradients go to dz[r], those of the aug stream to the next `rows` rows where FULL, else to
    dz[r]. GATHER adds to the call's `sums`: see SUMS. SKIP: words k whose done[r, k] is not 0 get a
    gradient of 0, because they have been added, and so do the places from `words` to `width`.
    OWN_WORDS: row r has words of its own, done[r] of them, from place start[r] on of `col`, of dz
    and of z, whose rows are the streams and which holds logits themselves. It adds to `sums` too.
    """
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = r < rows
    row = tl.load(rows_ptr + r, mask=live, other=0)
    target = tl.load(targets_ptr + row, mask=live, other=-1)[:, None]
    stat, up, sums = stats_ptr + row, up_ptr + row, sums_ptr + row
    r = r.to(tl.int64)[:, None]
    z_row, aug_row = z_ptr + r * stride_z, z_ptr + (r + rows) * stride_z
    out = dz_ptr + r * stride_dz
    out_aug = out
    if FULL:
        out_aug = dz_ptr + (r + rows) * stride_dz
    if OWN_WORDS:
        own_words = tl.load(done_ptr + row, mask=live, other=0)
        width = tl.max(own_words, 0)
        own_words = own_words[:, None]
        start_own = tl.load(start_ptr + row, mask=live, other=0).to(tl.int64)[:, None]
        z_row, out = z_ptr + start_own, dz_ptr + start_own
        aug_row, out_aug = z_row + stride_z, out
        if FULL:
            out_aug = out + stride_dz
    entropy = tl.load(stat + ENTROPY_ROW * N, mask=live, other=0.0)[:, None]
    g, g_entropy, g_aug, g_entropy_aug = entropy, entropy, entropy, entropy
    g_kl, g_reverse, kl, kl_reverse, entropy_aug = entropy, entropy, entropy, entropy, entropy
    if LOGPROB:
        g = tl.load(up + UP_LOGPROB * N, mask=live, other=0.0)[:, None]
    if ENTROPY:
        g_entropy = tl.load(up + UP_ENTROPY * N, mask=live, other=0.0)[:, None]
    if LOGPROB_AUG:
        g_aug = tl.load(up + UP_LOGPROB_AUG * N, mask=live, other=0.0)[:, None]
    if ENTROPY_AUG:
        g_entropy_aug = tl.load(up + UP_ENTROPY_AUG * N, mask=live, other=0.0)[:, None]
    if AUG:
        entropy_aug = tl.load(stat + (AUG_STREAM + ENTROPY_ROW) * N, mask=live, other=0.0)[:, None]
    if KL:
        g_kl = tl.load(up + UP_KL * N, mask=live, other=0.0)[:, None]
        kl = tl.load(stat + KL_ROW * N, mask=live, other=0.0)[:, None]
    if KL_REVERSE:
        g_reverse = tl.load(up + UP_KL_REVERSE * N, mask=live, other=0.0)[:, None]
        kl_reverse = tl.load(stat + KL_REVERSE_ROW * N, mask=live, other=0.0)[:, None]
    mass = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    own, size, gap, aug_mass, aug_own, aug_size = mass, mass, mass, mass, mass, mass
    aug_gap, kl_terms, reverse_terms, net_size = mass, mass, mass, mass
    for k in range(0, width, BLOCK_V):
        place = k + tl.arange(0, BLOCK_V)[None, :]
        in_col = place < words
        room = live[:, None] & (place < width)
        col = start + place.to(tl.int64)
        if GATHER:
            col = tl.load(col_ptr + place, mask=in_col, other=0).to(tl.int64)
        keep = live[:, None] & in_col
        if OWN_WORDS:
            keep = live[:, None] & (place < own_words)
            room = keep
            col = tl.load(col_ptr + start_own + place, mask=keep, other=0).to(tl.int64)
        hit = (col == target) & keep
        new = keep
        if SKIP:
            new = keep & (tl.load(done_ptr + r * stride_done + place, mask=keep, other=1) == 0)
        z = some_logits(
            z_row + place, keep, b_ptr, col, in_col, sharpness, softcap, OWN_WORDS, HAS_BIAS, CAP
        )
        log_p, p = log_prob(z, stat, N, live, keep)
        mass += p
        log_q, q, distance, x, away = log_p, p, p, p, p
        if TWO:
            z_aug = some_logits(
                aug_row + place, keep, b_ptr, col, in_col, sharpness, softcap, OWN_WORDS, HAS_BIAS,
                CAP,
            )  # fmt: skip
            log_q, q = log_prob(z_aug, stat + AUG_STREAM * N, N, live, keep)
            aug_mass += q
        if KL or KL_REVERSE:
            distance = tl.abs(z - z_aug)
            x = log_q - log_p
            away = q_minus_p(p, q, x)
            gap += tl.where(keep, p * distance, 0.0)
            aug_gap += tl.where(keep, q * distance, 0.0)
        if KL:
            kl_terms += tl.where(keep, away - p * x, 0.0)
        if KL_REVERSE:
            reverse_terms += tl.where(keep, q * x - away, 0.0)
        net = p
        if FULL:
            # p first: the log of a banned word times a large upstream gradient overflows
            dz = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            if ENTROPY:
                dz -= g_entropy * (p * (log_p + entropy))
            if KL:
                dz -= g_kl * (p * (x + kl))
            if LOGPROB:
                dz -= g * d_log_prob(hit, p, log_p)
            if KL_REVERSE:
                dz -= g_reverse * away
            dz = tl.where(new, dz * slope(z, sharpness, softcap, CAP), 0.0)
            own += tl.where(keep, p * (log_p + entropy), 0.0)
            size += tl.abs(dz)
            net = dz
            tl.store(out + place, dz.to(dz_ptr.dtype.element_ty), mask=room)
        if AUG:
            dz = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
            if ENTROPY_AUG:
                dz -= g_entropy_aug * q * (log_q + entropy_aug)
            if KL:
                dz += g_kl * away
            if KL_REVERSE:
                dz += g_reverse * q * (x - kl_reverse)
            if LOGPROB_AUG:
                dz -= g_aug * d_log_prob(hit, q, log_q)
            dz = tl.where(new, dz * slope(z_aug, sharpness, softcap, CAP), 0.0)
            aug_own += tl.where(keep, q * (log_q + entropy_aug), 0.0)
            aug_size += tl.abs(dz)
            if NET:
                net_size += tl.abs(net + dz)
            tl.store(out_aug + place, dz.to(dz_ptr.dtype.element_ty), mask=room)
    if GATHER or OWN_WORDS:
        add_sum(sums + MASS * N, mass, live)
        if TWO:
            add_sum(sums + AUG_MASS * N, aug_mass, live)
        if FULL:
            add_sum(sums + OWN * N, own, live)
            add_sum(sums + SIZE * N, size, live)
        if AUG:
            add_sum(sums + AUG_OWN * N, aug_own, live)
            add_sum(sums + AUG_SIZE * N, aug_size, live)
        if NET:
            add_sum(sums + NET_SIZE * N, net_size, live)
        if KL or KL_REVERSE:
            add_sum(sums + LOGIT_GAP * N, gap, live)
            add_sum(sums + AUG_LOGIT_GAP * N, aug_gap, live)
        if KL:
            add_sum(sums + KL_TERMS * N, kl_terms, live)
        if KL_REVERSE:
            add_sum(sums + KL_REVERSE_TERMS * N, reverse_terms, live)


@triton.jit
def some_logits(
    z_ptrs, keep, b_ptr, col, in_col, sharpness, softcap, MADE: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Logits that stand at `z_ptrs`, or whose products stand there where they are not MADE."""
    if MADE:
        return tl.load(z_ptrs, mask=keep, other=LOG_ZERO)
    else:
        return logits(z_ptrs, keep, b_ptr, col, in_col, sharpness, softcap, HAS_BIAS, CAP)


@triton.jit
def add_sum(total_ptrs, x, live):
    """A row is one program's, and launches come in order: no two of them add at once."""
    total = tl.load(total_ptrs, mask=live, other=0.0)
    tl.store(total_ptrs, total + tl.sum(x, 1), mask=live)


@triton.jit
def d_log_prob(hit, p, log_p):
    """p, less 1 at the target without the loss of bits where p is close to 1."""
    return tl.where(hit, q_minus_p(1.0, p, log_p), p)


@triton.jit
def q_minus_p(p, q, x):
    """q - p as in `equations.q_minus_p`: by a series where q is close to p; x: log q - log p."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(tl.abs(x) < 0.25, p * series, q - p)


@triton.jit(do_not_specialize=["rows"])
def add_rows_kernel(
    out_ptr, rest_ptr, add_ptr, at_ptr, D, rows, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[at[k]] += add[k] for contiguous (A, D) float32 `add` and (B, D) `out`.

    No row of `out` occurs twice, so nothing is atomic and the sums have one order. SPLIT: the sum
    stands in `out` and `rest`, see `load_sum`.
    """
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = k < rows
    at = tl.load(at_ptr + k, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & (d < D)[None, :]
    place = at[:, None] * D + d[None, :]
    add = tl.load(add_ptr + k.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0)
    total = load_sum(out_ptr + place, rest_ptr + place, mask, SPLIT) + add
    store_sum(out_ptr + place, rest_ptr + place, total, mask, SPLIT)


@triton.jit
def load_sum(out_ptrs, rest_ptrs, mask, SPLIT: tl.constexpr):
    """A sum in float32.

    SPLIT: its first 24 bits are kept, as the int16 of the nearest bfloat16 in `out`, and what that
    lacks in `rest`, an int8 of a 256th of bfloat16's last bit.
    """
    if SPLIT:
        high = tl.load(out_ptrs, mask=mask, other=0).to(tl.int32)
        rest = tl.load(rest_ptrs, mask=mask, other=0).to(tl.int32)
        return ((high << 16) + (rest << 8)).to(tl.float32, bitcast=True)
    else:
        return tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_sum(out_ptrs, rest_ptrs, total, mask, SPLIT: tl.constexpr):
    if SPLIT:
        # A float's bits without its sign count up with its size: adding to them rounds.
        bits = (total.to(tl.int32, bitcast=True) + 0x80) >> 8
        high = (bits + 0x80) >> 8
        rest = bits - (high << 8)
        high = tl.where(total == total, high, 0x7FC0)  # of some NaNs that makes a number
        rest = tl.where(total == total, rest, 0)
        tl.store(out_ptrs, high.to(tl.int16), mask=mask)
        tl.store(rest_ptrs, rest.to(tl.int8), mask=mask)
    else:
        tl.store(out_ptrs, total.to(out_ptrs.dtype.element_ty), mask=mask)
