"""Host side of the Triton backward: which rows go which way, and those that need all words.

Rows whose lists are enough are done first: see `lists`. The others go in groups: see `groups`.
Where the host has to know a number, it asks the device before it gives it more work, and reads the
answer after that.
"""

import torch

from papo_kernels import rows
from papo_kernels.certificate import RESERVE, Beyond, record
from papo_kernels.rows import each, make_wanted, unpack
from papo_kernels.triton import launch, lists
from papo_kernels.triton import plan_kernels as kernels
from papo_kernels.triton.account import Account
from papo_kernels.triton.forward import names
from papo_kernels.triton.groups import COUNT_PARTS, Groups, Left, count_levels
from papo_kernels.triton.launch import LAUNCHES, kernel_operands
from papo_kernels.triton.words import (
    Backward,
    GradientSum,
    add_products,
    gradients_of_logits,
    gradients_of_states,
    spans,
)

# Rows that are done densely together. Their states' gradients stay in float32 meanwhile.
DENSE_ROWS = 4096


def backward(call, saved, upstream, needs):
    """Gradients of the four operands in their dtypes, or None where `needs` is False.

    saved: `rows.Saved` as the forward made it. upstream: Upstream of (N,). needs: four bools.
    """
    with torch.cuda.device_of(call.hidden):
        scale = _scale(call, upstream)
        if not isinstance(scale, float):
            upstream = each(lambda x: x * scale, upstream)
        run = _backward_of(call, saved, upstream, needs)
        total = GradientSum(run)
        if len(run.targets) and (run.wanted.full or run.wanted.aug):
            if len(saved.levels):
                left = _sparse(run, RESERVE * call.options.grad_budget, total)
            else:
                left = Left(saved.order[: int(run.live.sum())])
            _dense(run, left, total)
        return total.gradients(scale)


def _scale(call, upstream):
    """A power of two that keeps gradients of logits within float16, or 1.

    The mean over many rows has upstream gradients that float16's smallest numbers do not resolve,
    and a scaler of the loss has some that it does not hold.
    """
    if torch.float16 not in (call.hidden.dtype, call.weight.dtype):
        return 1.0
    given = [g.abs().amax() for g in upstream.flat if g is not None and len(g)]
    if not given:
        return 1.0
    _, exponent = torch.frexp(torch.stack(given).amax().float().nan_to_num(1, 1, 1))
    return torch.ldexp(torch.ones((), device=exponent.device), -exponent.clamp(-60, 60))


def _backward_of(call, saved, upstream, needs):
    zeros = torch.zeros_like(saved.rows[0])
    return Backward(
        call,
        kernel_operands(call),
        call.targets.contiguous(),
        saved,
        unpack(saved.rows, names(call.streams)),
        upstream,
        torch.stack([zeros if g is None else g.to(torch.float32) for g in upstream.flat]),
        make_wanted(needs, upstream, call.options.aug_constant),
        call.targets != call.options.ignore_index,
    )


# ---- Dense rows


def _dense(run, left, total):
    """Adds to the sum what some rows still lack."""
    o = run.operands
    for n in range(0, len(left.rows), DENSE_ROWS):
        some = slice(n, n + DENSE_ROWS)
        at = left.rows[some]
        states = run.states(at)
        found = gradients_of_states(run, states, total)
        for words in spans(o.v, launch.even_down(rows.CHUNK_ELEMENTS // len(at))):
            done = None if left.done is None else left.done[:, words][left.group[some]]
            weight = o.weight[words]
            dz = gradients_of_logits(run, at, states, weight, words.start, done=done)
            add_products(run, dz, weight, states, words, found, words.start == 0, total)
        total.add_states(run, at, found)
        record(len(at), o.v, o.v, None)


# ---- Sparse tiles


def _sparse(run, budget, total):
    """Adds the gradients of the rows that few words serve; returns the others, a `Left`.

    Where the host has to know a number, the device still has work of before it is told.
    """
    counts, o, device = count_levels(run.saved.levels), run.operands, run.targets.device
    tile = torch.empty(o.n, dtype=torch.int32, device=device)
    beyond = Beyond(*torch.empty(2, run.tiles, dtype=torch.float64, device=device))
    kernels.begin_kernel[(run.tiles,)](
        run.saved.order, counts, tile, *beyond, o.n, counts.shape[1],
        lists.least_log_prob(run.call.options.grad_budget), PARTS=COUNT_PARTS, TILE=launch.TILE,
        **LAUNCHES["begin"],
    )  # fmt: skip
    account = Account(run, tile, run.live.sum()[None], budget)
    served = lists.Served(run, beyond, account)
    served.add_short(total)
    entries, long, left = served.asked.tolist()
    served.add_long(long, total)
    if not left:
        served.add_weight(entries, total)
        return Left(run.saved.order[:0])
    groups = Groups(run, served.left, left, tile, counts, budget, account)
    served.add_weight(entries, total)
    del served  # and all lists
    return groups.add(total)
