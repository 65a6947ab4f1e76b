"""The Triton kernel that makes the forward's sums over the vocabulary.

Exponentials are taken of distances to a logit that is known before the first word is read, and not
to the highest so far: no sum has to be scaled while words pass. That logit is the target's or the
highest of the first words. Where it turns out to be far too low, the row is done once more.

Shapes: N rows of a call, V words. A chunk is some rows. A lane has WIDE words beside each other of
every LANES * WIDE, and keeps sums of its own: nothing is exchanged between threads until all words
are done. `sharpness` is 1 / temperature, and a raw logit is one before temperature.
"""

import triton
import triton.language as tl

from papo_kernels.triton.kernels import AUG_PART, LOG2E, LOG_ZERO, capped

# Words that a lane loads at once: 16 bytes.
WIDE = tl.constexpr(4)
# Nats by which one stream's sums may be above the other's in second-order terms of a KL. More than
# HIGHEST_SUM has, so that what is cut off here is never close to 0; float32 ends at 88.
FAR = tl.constexpr(85.0)
# Nats below the first words' highest logit from which on a target is unlikely.
FAR_BELOW = tl.constexpr(16.0)
# Sums from here on are too close to the end of float32.
HIGHEST_SUM = tl.constexpr(2.0**100)


@triton.jit(do_not_specialize=["N", "rows", "first"])
def stats_kernel(
    z_ptr, b_ptr, targets_ptr, rows_ptr, part_ptr, N, V, rows, first, stride_z, sharpness, softcap,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """The sums that `kernels.PARTS` lists, of BLOCK_N rows of a chunk a program.

    They go to part[:, first + row]. The products of row r stand in z[r], and those of the aug
    stream in z[rows + r]. OWN is at least the number of words that a lane has.
    """
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = r < rows
    r = tl.minimum(r, rows - 1)
    z_row = z_ptr + r.to(tl.int64) * stride_z
    aug_row = z_ptr + (r + rows).to(tl.int64) * stride_z
    target = tl.load(targets_ptr + tl.load(rows_ptr + first + r))
    logit = of_target(z_row, b_ptr, target, V, softcap, HAS_BIAS, CAP)
    base = tl.maximum(logit, highest(z_row, b_ptr, LANES * WIDE, V, softcap, HAS_BIAS, CAP, LANES))
    logit_aug, base_aug, centre = logit, base, logit
    if TWO:
        logit_aug = of_target(aug_row, b_ptr, target, V, softcap, HAS_BIAS, CAP)
        base_aug = highest(aug_row, b_ptr, LANES * WIDE, V, softcap, HAS_BIAS, CAP, LANES)
        base_aug = tl.maximum(logit_aug, base_aug)
        # z - z_aug of a word that was drawn from p: near to the mean over p. A target that was not
        # drawn says little, nor does one that is banned.
        below = tl.maximum(base - logit, base_aug - logit_aug) * sharpness
        centre = tl.where(below < FAR_BELOW, logit - logit_aug, base - base_aug) * sharpness
    s, a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug = sums(
        z_row, aug_row, b_ptr, base, base_aug, centre, V, sharpness, softcap, TWO, HAS_BIAS, CAP,
        BLOCK_N, STEPS, LANES,
    )  # fmt: skip
    # Of NaN it is not true either; that stays what it is.
    right = (tl.sum(s, 1) < HIGHEST_SUM) & (tl.sum(s_aug, 1) < HIGHEST_SUM)
    if tl.min(right.to(tl.int32), 0) == 0:
        found = highest(z_row, b_ptr, V, V, softcap, HAS_BIAS, CAP, LANES)
        base = tl.where(right, base, found)
        if TWO:
            found_aug = highest(aug_row, b_ptr, V, V, softcap, HAS_BIAS, CAP, LANES)
            base_aug = tl.where(right, base_aug, found_aug)
            # The target says little of a row in which it is that unlikely.
            centre = tl.where(right, centre, (found - found_aug) * sharpness)
        s, a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug = sums(
            z_row, aug_row, b_ptr, base, base_aug, centre, V, sharpness, softcap, TWO, HAS_BIAS,
            CAP, BLOCK_N, STEPS, LANES,
        )  # fmt: skip
    out = part_ptr + first + r
    scale = store_stream(
        out, z_row, b_ptr, base, s, a, logit, N, live, V, sharpness, softcap, HAS_BIAS, CAP, LANES,
        OWN,
    )  # fmt: skip
    if TWO:
        scale_aug = store_stream(
            out + AUG_PART * N, aug_row, b_ptr, base_aug, s_aug, a_aug, logit_aug, N, live, V,
            sharpness, softcap, HAS_BIAS, CAP, LANES, OWN,
        )  # fmt: skip
        tl.store(out + 8 * N, tl.sum(drift, 1) * scale, mask=live)
        tl.store(out + 9 * N, tl.sum(drift_aug, 1) * scale_aug, mask=live)
        # e exp(-x) is e_aug by this much; far policies' terms overflow, and are not used
        over = tl.exp2(tl.minimum((base_aug - base) * sharpness + centre, FAR) * LOG2E)
        terms = (tl.sum(terms, 1) + over * tl.sum(terms_aug, 1)) * scale
        tl.store(out + 10 * N, terms, mask=live)
        tl.store(out + 11 * N, tl.sum(gap, 1) * scale * sharpness, mask=live)
        tl.store(out + 12 * N, tl.sum(gap_aug, 1) * scale_aug * sharpness, mask=live)
        tl.store(out + 13 * N, centre, mask=live)


@triton.jit
def raw_logits(row, b_ptr, col, softcap, keep, HAS_BIAS: tl.constexpr, CAP: tl.constexpr):
    """Raw logits of words `col`, LOG_ZERO at least and where they are not kept; keep: None for all.

    row: pointers to the rows' products, whose shape can be broadcast to that of `col`.
    """
    if keep is None:
        z = capped(tl.load(row + col), b_ptr, col, keep, softcap, HAS_BIAS, CAP)
    else:
        z = capped(
            tl.load(row + col, mask=keep, other=0.0), b_ptr, col, keep, softcap, HAS_BIAS, CAP
        )
    z = tl.maximum(z, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
    return z if keep is None else tl.where(keep, z, LOG_ZERO)


@triton.jit
def of_target(row, b_ptr, target, V, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr):
    """(BLOCK_N,) raw logits of the rows' targets; LOG_ZERO where there is none."""
    known = (target >= 0) & (target < V)
    return raw_logits(row, b_ptr, tl.where(known, target, 0), softcap, known, HAS_BIAS, CAP)


@triton.jit
def highest(
    row, b_ptr, words, V, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr, LANES: tl.constexpr
):
    """(BLOCK_N,) the highest raw logit of the first `words` words of the rows, but for NaN.

    It is above LOG_ZERO: away from it, a banned word has the exponential 0.
    """
    found = tl.full((row.shape[0], LANES * WIDE), LOG_ZERO / 2, tl.float32)
    for v in range(0, words, LANES * WIDE):
        col = v + tl.arange(0, LANES * WIDE)[None, :]
        z = raw_logits(row[:, None], b_ptr, col, softcap, col < V, HAS_BIAS, CAP)
        found = tl.maximum(found, z)
    return tl.max(found, 1)


@triton.jit
def sums(
    z_row, aug_row, b_ptr, base, base_aug, centre, V, sharpness, softcap, TWO: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, LANES) sums of each lane over all words, and those of `terms` in two parts."""
    s = tl.zeros((BLOCK_N, LANES), tl.float32)
    a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug = (
        s, s, s, s, s, s, s, s, s
    )  # fmt: skip
    lane = tl.arange(0, LANES)[None, None, :, None] * WIDE + tl.arange(0, WIDE)[None, None, None, :]
    col = tl.arange(0, STEPS)[None, :, None, None] * (LANES * WIDE) + lane
    z_row, aug_row = z_row[:, None, None, None], aug_row[:, None, None, None]
    base, base_aug = base[:, None, None, None], base_aug[:, None, None, None]
    centre = centre[:, None, None, None]
    whole = V // (STEPS * LANES * WIDE) * (STEPS * LANES * WIDE)
    for v in range(0, whole, STEPS * LANES * WIDE):
        s, a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug = added(
            s, a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug,
            z_row, aug_row, b_ptr, v + col, base, base_aug, centre, sharpness, softcap, None, TWO,
            HAS_BIAS, CAP,
        )  # fmt: skip
    if whole < V:
        s, a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug = added(
            s, a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug,
            z_row, aug_row, b_ptr, whole + col, base, base_aug, centre, sharpness, softcap,
            whole + col < V, TWO, HAS_BIAS, CAP,
        )  # fmt: skip
    return s, a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug


@triton.jit
def added(
    s, a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug,
    z_row, aug_row, b_ptr, col, base, base_aug, centre, sharpness, softcap, keep,
    TWO: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The sums with those of the words `col`, (1, STEPS, LANES, WIDE), added."""
    z = raw_logits(z_row, b_ptr, col, softcap, keep, HAS_BIAS, CAP)
    e = tl.exp2((z - base) * (sharpness * LOG2E))
    s += of_lanes(e)
    a += of_lanes(e * (z - base))
    if TWO:
        z_aug = raw_logits(aug_row, b_ptr, col, softcap, keep, HAS_BIAS, CAP)
        e_aug = tl.exp2((z_aug - base_aug) * (sharpness * LOG2E))
        s_aug += of_lanes(e_aug)
        a_aug += of_lanes(e_aug * (z_aug - base_aug))
        d = z - z_aug
        gap += of_lanes(e * tl.abs(d))
        gap_aug += of_lanes(e_aug * tl.abs(d))
        x = d * sharpness - centre
        drift += of_lanes(e * x)
        drift_aug += of_lanes(e_aug * x)
        series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720)))))
        near = tl.abs(x) < 0.25
        terms += of_lanes(e * tl.where(near, series, x - 1.0))
        terms_aug += of_lanes(tl.where(near, 0.0, e_aug))
    return s, a, s_aug, a_aug, drift, drift_aug, terms, terms_aug, gap, gap_aug


@triton.jit
def of_lanes(x):
    """(BLOCK_N, LANES) sums of (BLOCK_N, STEPS, LANES, WIDE), which stay within each thread."""
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit
def store_stream(
    out, row, b_ptr, base, s, a, logit, N, live, V, sharpness, softcap, HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr, LANES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Stores a stream's first four PARTS; returns (BLOCK_N,) exp(base - peak), which scales others.

    Beside the peak's 1, a sum would lose the other terms of a confident row. So the words of the
    lane with the largest sum are summed once more, without the peak: it is one of them where it
    has more than half of the mass.
    """
    lane = tl.argmax(s, 1)[:, None]
    at = tl.arange(0, OWN)[None, :]
    col = at // WIDE * (LANES * WIDE) + lane * WIDE + at % WIDE
    z = raw_logits(row[:, None], b_ptr, col, softcap, col < V, HAS_BIAS, CAP)
    peak = tl.max(z, 1)
    away = z - peak[:, None]
    other = (at != tl.argmax(z, 1)[:, None]) & (z > LOG_ZERO)
    e = tl.where(other | (z != z), tl.exp2(away * (sharpness * LOG2E)), 0.0)
    rise = peak - base
    scale = tl.where(peak > LOG_ZERO, tl.exp2(-rise * (sharpness * LOG2E)), 0.0)
    elsewhere = tl.arange(0, LANES)[None, :] != lane
    s_else = tl.sum(tl.where(elsewhere, s, 0.0), 1)
    a_else = tl.sum(tl.where(elsewhere, a, 0.0), 1)
    others = tl.sum(e, 1) + scale * s_else
    weighted = tl.sum(e * away, 1) + scale * (a_else - rise * s_else)
    none = (peak <= LOG_ZERO) & (others == others)  # a lane may have NaN beside banned words alone
    tl.store(out, tl.where(none, LOG_ZERO, peak), mask=live)
    tl.store(out + N, tl.where(none, -1.0, others), mask=live)
    tl.store(out + 2 * N, tl.where(none, 0.0, weighted * sharpness), mask=live)
    tl.store(out + 3 * N, logit, mask=live)
    return scale
