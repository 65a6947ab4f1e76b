"""One backward pass of Triton: what it is about, its sums, and the gradients of some words."""

import functools
import itertools
from dataclasses import dataclass

import torch
import triton

from papo_kernels.rows import Call, RowStats, Saved, Upstream, Wanted
from papo_kernels.triton import gradients as kernels
from papo_kernels.triton import launch
from papo_kernels.triton.launch import LAUNCHES, KernelOperands, multiply, multiply_add


@dataclass(frozen=True)
class Backward:
    """What one backward pass is about; nothing of it changes."""

    call: Call
    operands: KernelOperands
    targets: torch.Tensor  # (N,) contiguous
    saved: Saved
    stats: RowStats  # (N,) each
    upstream: Upstream  # (N,) each
    up: torch.Tensor  # (6, N) float32: upstream gradients as the kernels read them
    wanted: Wanted
    live: torch.Tensor  # (N,) bool: rows that count

    @property
    def tiles(self):
        """Of all rows, so that the device need not be asked how many count."""
        return triton.cdiv(self.operands.n, launch.TILE)

    @functools.cached_property
    def switches(self):
        """What `dz_kernel` is compiled for in every launch of this pass."""
        g, w, head = self.upstream, self.wanted, self.call.head
        return dict(
            TWO=w.aug_logits,
            FULL=w.full,
            AUG=w.aug,
            LOGPROB=w.full and g.full.logprobs is not None,
            ENTROPY=w.full and g.full.entropy is not None,
            LOGPROB_AUG=w.aug and g.aug.logprobs is not None,
            ENTROPY_AUG=w.aug and g.aug.entropy is not None,
            KL=w.kl,
            KL_REVERSE=w.kl_reverse,
            HAS_BIAS=self.operands.has_bias,
            CAP=head.softcap is not None,
        )

    def states(self, at):
        """States of the (R,) rows `at`, those of the aug stream below those of the full one.

        Of both streams where the logits of both are needed.
        """
        streams = [self.operands.full]
        if self.wanted.aug_logits:
            streams.append(self.operands.aug)
        return launch.rows_of(streams, at)

    def differentiated(self, states):
        """The part of such states whose logits get gradients."""
        half = len(states) // 2
        if not self.wanted.aug:
            return states[:half] if self.wanted.aug_logits else states
        return states if self.wanted.full else states[half:]


class GradientSum:
    """The operands' gradients so far.

    hidden, aug_hidden: (N, D) each; weight: (V, D); bias: (V,); None where not wanted. A weight in
    bfloat16 has its gradient summed in 24 bits, of which `rest` has the last eight: sums over rows
    in 16 bits diverge, and float32 would take twice the gradient's own memory.
    """

    def __init__(self, run):
        call, wanted, o = run.call, run.wanted, run.operands
        self._operands, device = call.operands, run.targets.device
        # A row's gradients come whole but for the few rows that need more words; float16 needs the
        # range until they are scaled back.
        dtype = torch.float32 if o.dtype == torch.float16 else o.dtype
        self.hidden, self.aug_hidden = (
            torch.zeros(o.n, o.d, dtype=dtype, device=device) if asked else None
            for asked in (wanted.hidden, wanted.aug_hidden)
        )
        self.weight = self.rest = None
        self.split = wanted.weight and call.weight.dtype == torch.bfloat16
        if wanted.weight:
            dtype = torch.bfloat16 if self.split else torch.float32
            self.weight = torch.zeros(o.v, o.d, dtype=dtype, device=device)
        if self.split:
            self.rest = torch.zeros(o.v, o.d, dtype=torch.int8, device=device)
        self.bias = torch.zeros(o.v, dtype=torch.float32, device=device) if wanted.bias else None

    @property
    def weight_parts(self):
        """The weight's gradient as kernels take it: `out` and `rest` of `gradients.load_sum`."""
        return (self.weight.view(torch.int16), self.rest) if self.split else [self.weight] * 2

    def add_weight(self, more, at):
        """Adds float32 `more` to the (A,) rows `at` of the weight's gradient."""
        _add_rows(*self.weight_parts, more, at, self.split)

    def add_states(self, run, at, found):
        """Adds `found`, which `gradients_of_states` made, to the (R,) rows `at`."""
        if found is None:
            return
        parts = iter(found.split(len(at)))
        for wanted, total in ((run.wanted.full, self.hidden), (run.wanted.aug, self.aug_hidden)):
            part = next(parts) if wanted else None
            if wanted and total is not None:
                add_rows(total, part, at)

    def gradients(self, scale):
        """Of hidden, aug_hidden, weight and bias in their own dtypes, or None."""
        grads = (self.hidden, self.aug_hidden, self.weight, self.bias)
        if not isinstance(scale, float):
            grads = [None if g is None else g / scale for g in grads]
        return tuple(
            None if g is None else g.to(x.dtype) for g, x in zip(grads, self._operands, strict=True)
        )


def gradients_of_logits(run, at, states, weight, words, sums=None, done=None):
    """(S R, W) gradients of the products of the (R,) rows `at` with the (W, D) rows of `weight`.

    states: `run.states(at)`; S is the number of streams of `run.differentiated(states)`. words:
    the first of a span of words, or (W',) int32 words, of which the last stands in `weight` up to
    W. sums: (len(SUMS), N) to which those of listed words are added. done: (R, W) uint8, words to
    leave out where they are not 0, or None.
    """
    z = launch.padded(len(states), len(weight), torch.float32, states.device)
    multiply(states, weight.T, z)
    dtype, listed = run.operands.dtype, isinstance(words, torch.Tensor)
    dz = launch.padded(len(run.differentiated(states)), len(weight), dtype, states.device)
    launch_dz(
        run, LAUNCHES["dz"], at, z, words if listed else at, at if done is None else done, at, dz,
        at if sums is None else sums, len(words) if listed else len(weight),
        0 if listed else words, dz.shape[1], 0 if done is None else done.stride(0),
        GATHER=listed, NET=run.wanted.net and listed, SKIP=done is not None,
    )  # fmt: skip
    return dz


def launch_dz(
    run, blocks, at, z, col, done, start, dz, sums, words, first, width, stride_done, *, NET,
    GATHER=False, OWN_WORDS=False, SKIP=False,
):  # fmt: skip
    """Launches `gradients.dz_kernel` for the (R,) rows `at`; the other arguments are its own."""
    o, head = run.operands, run.call.head
    kernels.dz_kernel[(triton.cdiv(len(at), blocks["BLOCK_N"]),)](
        z, o.bias, run.targets, at, run.saved.rows, run.up, col, done, start, dz, sums, o.n, words,
        width, len(at), first, z.stride(0), dz.stride(0), stride_done, 1 / head.temperature,
        head.softcap or 1.0, GATHER=GATHER, OWN_WORDS=OWN_WORDS, NET=NET, SKIP=SKIP,
        **run.switches, **blocks,
    )  # fmt: skip


def add_products(run, dz, weight, states, words, found, first, total):
    """Adds what (S R, W) gradients of logits say to the weight's and bias's gradients and `found`.

    weight: (W, D), of which the first are those of `words`, a slice or (W',) different words.
    states: `run.states` of the rows. found: see `gradients_of_states`; the first products write it
    and others add to it.
    """
    seen, span = run.differentiated(states), isinstance(words, slice)
    if found is not None:
        if first:
            multiply(dz, weight, found)
        else:
            multiply_add(found, dz, weight)
    if total.weight is not None:
        if span and not total.split:
            multiply_add(total.weight[words], dz.T, seen)
        else:
            more = torch.empty(len(weight), weight.shape[1], dtype=torch.float32, device=dz.device)
            multiply(dz.T, seen, more)
            total.add_weight(more, numbers(words, dz.device) if span else words)
    if total.bias is not None:
        more = dz.sum(0, dtype=torch.float32)
        if span:
            total.bias[words] += more
        else:
            add_rows(total.bias[:, None], more[:, None], words)


def numbers(words, device):
    """A slice of words, listed."""
    return torch.arange(words.start, words.stop, dtype=torch.int32, device=device)


def spans(count, size):
    """Slices of at most `size` of `count` words; those over a multiple of EVEN come alone."""
    even = count // launch.EVEN * launch.EVEN
    for n, end in itertools.pairwise([*range(0, even, size), even, count]):
        if n < end:
            yield slice(n, end)


def evened(words):
    """Listed words, of which the last stands there again up to a multiple of EVEN."""
    missing = launch.even_up(len(words)) - len(words)
    return torch.cat([words, words[-1:].expand(missing)]) if missing else words


def add_rows(total, more, at):
    """total[at] += more, for (A,) different rows `at`; `more` may have rows beyond them."""
    _add_rows(total, total, more, at, False)


def _add_rows(out, rest, more, at, split):
    blocks, d = LAUNCHES["add_rows"], out.shape[1]
    grid = (triton.cdiv(len(at), blocks["BLOCK_N"]), triton.cdiv(d, blocks["BLOCK_D"]))
    kernels.add_rows_kernel[grid](out, rest, more, at, d, len(at), SPLIT=split, **blocks)


def gradients_of_states(run, states, total):
    """Room for the (S R, D) float32 gradients of `run.differentiated(states)`.

    None if nobody wants them.
    """
    if total.hidden is None and total.aug_hidden is None:
        return None
    return torch.empty_like(run.differentiated(states), dtype=torch.float32)
