"""The certificate of a backward pass of Triton: what rows drop, and what that is a share of.

The mathematics is that of `certificate.outside` and `sizes.Wholes`, for all rows at once: as one
kernel and a few operators on stacked tensors, because each operator costs the host 10 microseconds
whatever its size. `tests/kernels/test_account.py` holds them together.
"""

import torch
import triton
import triton.language as tl

from papo_kernels import certificate, sizes
from papo_kernels.rows import each
from papo_kernels.triton import gradients
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
from papo_kernels.triton.launch import LAUNCHES

ROUNDING = tl.constexpr(certificate.ROUNDING)
# Where sum |dz| of both streams and of their sum stand among the sums over candidates.
SIZES = [gradients.SUMS.index(name) for name in ("size", "aug_size", "net_size")]


class Account:
    """What the rows of a call may drop, by row of the call; it learns from the sums of rows."""

    def __init__(self, run):
        """run: a `words.Backward`."""
        call, wanted, stats = run.call, run.wanted, each(torch.Tensor.double, run.stats)
        upstream = each(torch.Tensor.double, run.upstream)
        self._run = run
        self._asked = certificate.certified(wanted)
        self._least = torch.stack(sizes.least_sizes(stats, upstream, wanted, call.head))
        ones = torch.ones_like(stats.full.peak)
        scales = sizes.scales_of_sizes(call, wanted, ones)
        found = [scales.get(i, [ones]) for i in range(len(SIZES))]
        self._scales = torch.stack([torch.stack([x[0], x[-1]]) for x in found])  # (3, 2, N)

    def shares(self, sums, beyond):
        """(3, N) float64 bounds on sum |dz| outside the candidates, and what they are shares of.

        sums: (len(SUMS), N) over candidates. beyond: `certificate.Beyond` of (N,) float64. Of what
        is not certified, the bound is 0.
        """
        run, blocks = self._run, LAUNCHES["outside"]
        n, g, w = run.operands.n, run.upstream, run.wanted
        bounds = torch.zeros(3, n, dtype=torch.float64, device=sums.device)
        outside_kernel[(triton.cdiv(n, blocks["BLOCK"]),)](
            sums, run.saved.rows, run.up, *beyond, bounds, n, 1 / run.call.head.temperature,
            TWO=run.call.streams == 2, FULL=w.full, AUG=w.aug, NET=w.net,
            LOGPROB=g.full.logprobs is not None, ENTROPY=g.full.entropy is not None,
            LOGPROB_AUG=g.aug.logprobs is not None, ENTROPY_AUG=g.aug.entropy is not None,
            KL=w.kl, KL_REVERSE=w.kl_reverse, **blocks,
        )  # fmt: skip
        held = torch.stack([sums[i] for i in SIZES]).double()
        self._least = torch.maximum(self._least, held.nan_to_num(0, 0, 0))
        if run.call.options.budget_of == "token":
            return bounds, held
        squares = (self._least[:, None] * self._scales).square().sum(2, keepdim=True)
        typical = (squares / run.live.sum()).sqrt() / self._scales.clamp_min(1e-300)
        return bounds, torch.maximum(held, typical.amin(1))

    def largest_share(self, bounds, whole):
        """(N,) the largest share of a stream or their sum; infinite where one is NaN."""
        shares = [bounds[i] / whole[i].clamp_min(1e-300) for i in self._asked]
        share = torch.stack(shares).amax(0)
        # NaN compares false with every budget; infinity says the same to a maximum.
        return torch.where(share.isnan(), torch.inf, share)

    def spare(self, bounds, whole, budget):
        """(3, N) float32: what rows may drop of their candidates; infinite where not certified."""
        spare = (budget * whole - bounds).float()
        for i in range(len(spare)):
            if i not in self._asked:
                spare[i] = torch.inf
        return spare


@triton.jit
def outside_kernel(
    sums_ptr, stats_ptr, up_ptr, mass_ptr, information_ptr, out_ptr, N, sharpness,
    TWO: tl.constexpr, FULL: tl.constexpr, AUG: tl.constexpr, NET: tl.constexpr,
    LOGPROB: tl.constexpr, ENTROPY: tl.constexpr, LOGPROB_AUG: tl.constexpr,
    ENTROPY_AUG: tl.constexpr, KL: tl.constexpr, KL_REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`certificate.outside` of BLOCK rows a program, in float64; NaN where anything is NaN.

    sums: (len(SUMS), N); stats: (F, N) as saved; up: (6, N); mass, information: (N,) what levels
    say of the other words; out: (3, N).
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < N
    sums, stats, up = sums_ptr + row, stats_ptr + row, up_ptr + row
    beyond = tl.load(mass_ptr + row, mask=live, other=0.0)
    information = tl.load(information_ptr + row, mask=live, other=0.0)
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
    if FULL:
        tl.store(out_ptr + row, full * sharpness + unsure, mask=live)
    if AUG:
        tl.store(out_ptr + N + row, aug * sharpness + unsure, mask=live)
    if NET:
        tl.store(out_ptr + 2 * N + row, net * sharpness + unsure, mask=live)


@triton.jit
def number(ptrs, live):
    return tl.load(ptrs, mask=live, other=0.0).to(tl.float64)


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
