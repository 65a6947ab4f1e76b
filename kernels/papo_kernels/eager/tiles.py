"""Gradients of the rows of a tile on picked words, by torch's operators.

The functions that `chunked_backward` asks of a way. R rows of a tile, S streams of them present,
K words picked.
"""

from typing import NamedTuple

import torch

from papo_kernels import certificate
from papo_kernels.certificate import WORTH_DROPPING, CandidateSums, StreamSums
from papo_kernels.equations import (
    TargetPlace,
    d_logits,
    d_products_,
    log_probs_again,
    q_minus_p,
    slope,
)
from papo_kernels.rows import Head

# torch has no product that serves many tiles at once, so none is tried with or waits for another.
TOGETHER, MOST_WAITING = 1, 0
DENSE_SHARE = certificate.DENSE_SHARE
ROUNDS_WEIGHT = False

logits = Head.logits


def d_products(z, s, g, target, run):
    """Gradients of the products of R rows with B words: of both streams, None where not wanted.

    z: (R, B) logits of both streams, None where nothing needs them; they may be overwritten. s, g:
    RowStats and Upstream of (R, 1). target: TargetPlace. `add_products` and
    `add_transposed_products` take what this returns; where the bias wants a gradient it is (R, B).
    """
    wanted = run.wanted
    d_products_(*z, s, g, wanted, target, run.call.head)
    return [x if of_it else None for x, of_it in zip(z, (wanted.full, wanted.aug), strict=True)]


def add_products(grad, y, out, head):
    """Adds the products of (R, B) gradients, as `d_products` returns them, with (B, D) y to out."""
    head.add_products(grad, y, out)


def add_transposed_products(grad, y, out, head, fresh):
    """Adds those of the transposed gradients with (R, D) y to (B, D) out; fresh: writes them."""
    head.add_products(grad.T, y, out.zero_() if fresh else out)


def put_rounded(block, out):
    """Writes the sums of a block of words, contiguous, into their part of the gradient."""
    out.copy_(block)


class States(NamedTuple):
    """States of a tile's rows, both streams in one tensor.

    One product serves both streams: a tile alone is too thin to keep the arithmetic busy.
    """

    rows: torch.Tensor  # (S R, D)
    present: tuple[bool, bool]  # whether the full and the aug stream are among them

    def split(self, x):
        """(S R, ...) `x` as (R, ...) of both streams; None for a stream that is not present."""
        parts = iter(x.split(len(self.rows) // sum(self.present)))
        return tuple(next(parts) if present else None for present in self.present)


class Gradients(NamedTuple):
    """Gradients of a tile on some words; of both streams, None where not wanted."""

    cols: torch.Tensor  # (K,) int64, ascending
    dz: tuple  # (R, K) of states @ weight.T + bias


def states_of(states):
    """States of (R, D) `states` of both streams, None where logits are not needed."""
    return States(
        torch.cat([x for x in states if x is not None]), tuple(x is not None for x in states)
    )


def picked_logits(states, cols, call):
    """Products, or logits, for `differentiate`: of each tile on its own (K,) ascending words."""
    return [_logits(x, c, call) for x, c in zip(states, cols, strict=True)]


def _logits(states, cols, call):
    """(R, K) logits of both streams; None for a stream that is not present."""
    head, weight = call.head, call.weight
    z = head.empty(states.rows, len(cols))
    for block, gathered in head.blocks(weight, cols, weight.dtype):
        head.multiply(states.rows, gathered, z[:, block])
    head.finish(z, None if call.bias is None else call.bias[cols])
    return states.split(z)


def differentiate(states, candidates, logits, s, g, run):
    """(CandidateSums, Gradients) of a tile on its candidates; sizes are those of the Gradients.

    s, g: RowStats and Upstream of (R, 1). run: `chunked_backward.Backward`.
    """
    del states
    wanted = run.wanted
    z, z_aug = logits
    log_p = p = log_q = q = None
    full, aug, of_kl = {}, {}, {}
    if z is not None:
        log_p = log_probs_again(z, s.full)
        p = log_p.exp()
        full |= {"mass": p, "own": p * (log_p + s.full.entropy)}
    if z_aug is not None:
        log_q = log_probs_again(z_aug, s.aug)
        q = log_q.exp()
    if wanted.aug:
        aug |= {"mass": q, "own": q * (log_q + s.aug.entropy)}
    if wanted.any_kl:
        x = log_q - log_p
        gap = q_minus_p(p, q, x)
        of_kl = {"prob_gap": gap.abs()}
        if wanted.kl:
            of_kl |= {"log_ratio": p * x.abs(), "kl_terms": gap - p * x}
        if wanted.kl_reverse:
            of_kl |= {"aug_log_ratio": q * x.abs(), "kl_reverse_terms": q * x - gap}
    place = candidates.place[:, None]
    target = TargetPlace(torch.ones_like(place, dtype=torch.bool), place)
    dz, dz_aug = d_logits(log_p, p, log_q, q, s, g, wanted, target)
    head = run.call.head
    dz, dz_aug = (
        None if x is None else x * slope(of, head) for x, of in ((dz, z), (dz_aug, z_aug))
    )
    if dz is not None:
        full["size"] = dz.abs()
    if dz_aug is not None:
        aug["size"] = dz_aug.abs()
    if dz is not None and dz_aug is not None:
        of_kl["net_size"] = (dz + dz_aug).abs()
    full, aug, of_kl = (
        {name: x.sum(1, keepdim=True) for name, x in sums.items()} for sums in (full, aug, of_kl)
    )
    sums = CandidateSums(StreamSums(**full), StreamSums(**aug), **of_kl)
    return sums, Gradients(candidates.cols, (dz, dz_aug))


def drop_least(gradients, allowances, run):
    """Drops the words that matter least.

    allowances: (R, 1) sum |dz| that rows may still drop in both streams and in their sum; None
    where that is not certified.

    Returns:
        (Gradients on the other words, what was dropped, as `allowances`, or 0).
    """
    dz, dz_aug = gradients.dz
    kinds = [i for i, a in enumerate(allowances) if a is not None]
    sizes = [(dz, dz_aug, dz + dz_aug if i == 2 else None)[i].abs() for i in kinds]
    keep, dropped = least(sizes, [allowances[i] for i in kinds])
    if len(gradients.cols) - len(keep) <= WORTH_DROPPING * len(gradients.cols):
        return gradients, [0, 0, 0]
    kept = tuple(None if x is None else x[:, keep] for x in gradients.dz)
    found = dict(zip(kinds, dropped, strict=True))
    return Gradients(gradients.cols[keep], kept), [found.get(i, 0) for i in range(3)]


def least(sizes, allowances):
    """Which words to keep, and what the others hold.

    Args:
        sizes: per stream, (R, K) |dz|.
        allowances: per stream, (R, 1) sum |dz| that a row may drop, >= 0.

    Returns:
        (keep, dropped): ascending (K',) int64 positions, and per stream the (R, 1) sums dropped.
    """
    need = None
    for size, allowance in zip(sizes, allowances, strict=True):
        worst = (size / allowance.clamp_min(1e-38)).amax(0)
        need = worst if need is None else torch.maximum(need, worst)
    order = need.argsort()
    sums = [size[:, order].cumsum(1) for size in sizes]
    fits = [(c <= a).all(0) for c, a in zip(sums, allowances, strict=True)]
    count = int(torch.stack(fits).all(0).sum())
    dropped = [c[:, count - 1 : count] if count else torch.zeros_like(c[:, :1]) for c in sums]
    return order[count:].sort().values, dropped


def add_gradients(states, gradients, call, d_weight, d_bias, dtype):
    """Adds those of finished tiles to (V, D) `d_weight` and (V,) `d_bias`, where given.

    dtype: of the states' gradients; None where nobody wants them. A way may leave them in another
    dtype. A tile's States must not be used after this: their memory may hold the result.

    Returns:
        Of each tile the gradients of its states, (R, D) of both streams, or None.
    """
    return [
        _add(x, finished, call, d_weight, d_bias, dtype is not None)
        for x, finished in zip(states, gradients, strict=True)
    ]


def _add(states, finished, call, d_weight, d_bias, states_too):
    head, cols = call.head, finished.cols
    pairs = [(x, g) for x, g in zip(states.split(states.rows), finished.dz, strict=True)]
    states = states_of([None if g is None else x for x, g in pairs])
    grads = torch.cat([g for _, g in pairs if g is not None])
    rows = states.rows.to(head.dtype)
    total = torch.zeros_like(rows) if states_too else None
    for block, weight in head.blocks(call.weight, cols):
        if total is not None:
            total.addmm_(grads[:, block], weight)
        if d_weight is not None:
            d_weight.index_add_(0, cols[block], grads[:, block].T @ rows)
    if d_bias is not None:
        d_bias.index_add_(0, cols, grads.sum(0))
    return (None, None) if total is None else states.split(total)
