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
    def sums(self):
        """The weight's gradient as kernels take it: `out` and `rest` of `gradients.load_sum`."""
        return (self.weight.view(torch.int16), self.rest) if self.split else [self.weight] * 2

    def add_weight(self, more, at):
        """Adds float32 `more` to the (A,) rows `at` of the weight's gradient."""
        _add_rows(*self.sums, more, at, self.split)

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


@dataclass(frozen=True)
class Words:
    """Words whose gradients some rows get: some that are listed, or a span."""

    start: int
    count: int
    listed: torch.Tensor | None = None  # (count,) int32

    def split(self, size):
        """Parts of at most `size` words; those over a multiple of EVEN come alone."""
        even = self.count // launch.EVEN * launch.EVEN
        starts = (
            [*range(0, even, size), even] if self.listed is None else range(0, self.count, size)
        )
        for n, end in itertools.pairwise([*starts, self.count]):
            if n < end:
                listed = None if self.listed is None else self.listed[n:end]
                yield Words(self.start + n, end - n, listed)

    def evened(self):
        """Listed words, of which the last stands there again up to a multiple of EVEN."""
        missing = launch.even_up(self.count) - self.count
        return (
            torch.cat([self.listed, self.listed[-1:].expand(missing)]) if missing else self.listed
        )


def add(run, at, states, words, done, sums, found, total):
    """Adds the gradients of some words and of the rows `at` to the weight's, and to `found`.

    states: `run.states(at)`. done: (R, V) uint8, words to leave out where they are not 0, or None.
    sums: (len(SUMS), N) to add to where words are listed. found: (S R, D) float32 gradients of
    `run.differentiated(states)`, or None where nobody wants them. The words that start at 0 write
    them, and the others add to them.
    """
    o, span = run.operands, slice(words.start, words.start + words.count)
    listed = None if words.listed is None else words.evened()
    weight = o.weight[span] if listed is None else o.weight.index_select(0, listed)
    z = launch.padded(len(states), len(weight), torch.float32, states.device)
    multiply(states, weight.T, z)
    seen = run.differentiated(states)
    dz = launch.padded(len(seen), len(weight), o.dtype, states.device)
    _launch_dz(run, at, words, listed, done, z, dz, sums)
    del z  # what comes next has room there
    if found is not None:
        if words.start == 0:
            multiply(dz, weight, found)
        else:
            multiply_add(found, dz, weight)
    if total.weight is not None:
        if listed is None and not total.split:
            multiply_add(total.weight[span], dz.T, seen)
        else:
            del weight
            more = torch.empty(dz.shape[1], o.d, dtype=torch.float32, device=states.device)
            multiply(dz.T, seen, more)
            numbers = torch.arange(span.start, span.stop, dtype=torch.int32, device=states.device)
            total.add_weight(more, numbers if listed is None else words.listed)
    if total.bias is not None:
        more = dz.sum(0, dtype=torch.float32)
        if listed is None:
            total.bias[span] += more
        else:
            add_rows(total.bias[:, None], more[:, None], words.listed)


def _launch_dz(run, at, words, listed, done, z, dz, sums):
    o, head, blocks = run.operands, run.call.head, LAUNCHES["dz"]
    gather = listed is not None
    kernels.dz_kernel[(triton.cdiv(len(at), blocks["BLOCK_N"]),)](
        z, o.bias, run.targets, at, run.saved.rows, run.up, listed if gather else at,
        at if done is None else done, at, dz, sums, o.n, words.count, dz.shape[1], len(at),
        words.start, z.stride(0), dz.stride(0), 0 if done is None else done.stride(0),
        1 / head.temperature, head.softcap or 1.0, GATHER=gather, OWN_WORDS=False,
        NET=run.wanted.net and gather, SKIP=done is not None, **run.switches, **blocks,
    )  # fmt: skip


def add_rows(total, more, at):
    """total[at] += more, for (A,) different rows `at`; `more` may have rows beyond them."""
    _add_rows(total, total, more, at, False)


def _add_rows(out, rest, more, at, split):
    blocks, d = LAUNCHES["add_rows"], out.shape[1]
    grid = (triton.cdiv(len(at), blocks["BLOCK_N"]), triton.cdiv(d, blocks["BLOCK_D"]))
    kernels.add_rows_kernel[grid](out, rest, more, at, d, len(at), SPLIT=split, **blocks)


def gradients_of_states(run, states, total):
    """Room for what `add` finds of `run.differentiated(states)`, or None if nobody wants it."""
    if total.hidden is None and total.aug_hidden is None:
        return None
    return torch.empty_like(run.differentiated(states), dtype=torch.float32)
