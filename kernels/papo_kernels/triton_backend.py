"""Host side of the Triton backend: the forward, and the entry to the backward.

The forward is one kernel for both streams; the backward recomputes the logits of few columns where
few matter, and of all of them, a chunk of rows at a time, elsewhere.
"""

import torch
import triton

from papo_kernels import triton_kernels as kernels
from papo_kernels import triton_launch
from papo_kernels.sparse_backward import RESERVE
from papo_kernels.torch_backend import saved_rows
from papo_kernels.triton_backward import Backward
from papo_kernels.triton_launch import Operands, kept_first


def _splits(tiles, vocab, blocks, device):
    """Programs along the vocabulary: enough to fill the device where rows are few."""
    if device.type != "cuda":
        wanted = 2
    else:
        units = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = -(-2 * units // tiles)
    return max(1, min(wanted, vocab // (8 * blocks.v)))


def levels_shape(n, vocab, dtype, sparse):
    del dtype  # The same height for all, so that the shape needs no more than the sizes.
    return (-(-n // triton_launch.TILE) if sparse else 0), vocab


def forward(hidden, aug_hidden, weight, bias, targets, ignore_index, head, shard, sparse):
    """As `torch_backend.forward`; `gap` and `ratio` hold E_p|z - z_aug| and E_q|z - z_aug|."""
    o, targets = Operands(hidden, aug_hidden, weight, bias), targets.contiguous()
    blocks, block_n = o.launch.forward, triton_launch.TILE
    fields = saved_rows(o.two)
    levels = torch.zeros(
        levels_shape(o.n, o.v, o.dtype, sparse), dtype=torch.uint8, device=hidden.device
    )
    saved = torch.zeros(fields, o.n, device=hidden.device)
    outputs = (9, 2, 10, 5, 6) if o.two else (3, 2)
    if o.n == 0:
        return [saved[i].clone() for i in outputs], saved, levels
    rows, count = kept_first(targets, ignore_index)
    tiles = triton.cdiv(o.n, block_n)
    splits = _splits(tiles, o.v, blocks, hidden.device)
    per_split = triton.cdiv(triton.cdiv(o.v, splits), blocks.v) * blocks.v
    splits = triton.cdiv(o.v, per_split)
    part = torch.zeros(splits, fields, o.n, device=hidden.device)
    kernels.forward_kernel[(tiles, splits)](
        o.x, o.xa, o.w, o.b, targets, rows, count, part, levels,
        o.n, o.v, o.d, per_split, *o.strides(), head.temperature, head.softcap or 1.0,
        TWO=o.two, HAS_BIAS=o.has_bias, CAP=head.softcap is not None, LEVELS=sparse,
        UPCAST=o.upcast, BLOCK_N=block_n, BLOCK_V=blocks.v, BLOCK_D=blocks.d,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    stats = combine(part, targets[rows], o.v, o.two)
    live = torch.arange(o.n, device=hidden.device) < count
    saved[:, rows] = torch.where(live, stats, 0)
    return [saved[i].clone() for i in outputs], saved, levels


def combine(part, labels, vocab, two):
    """(splits, fields, N) partial sums of the forward kernel to (fields, N) row statistics."""
    valid = (labels >= 0) & (labels < vocab)
    streams, weights = [], []
    for p in (part[:, :4], part[:, 4:8])[: 1 + two]:
        peak = p[:, 0].amax(0)
        shift = p[:, 0] - peak
        weight = shift.exp()
        total = (weight * p[:, 1]).sum(0)
        log_sum = total.log()
        entropy = log_sum - (weight * (p[:, 2] + p[:, 1] * shift)).sum(0) / total
        logit = p[:, 3].sum(0)
        logit = torch.where(logit <= kernels.LOG_ZERO.value, -torch.inf, logit)
        label = torch.where(valid, (logit - peak) - log_sum, torch.nan)
        streams.append((peak, log_sum, entropy, label, total))
        weights.append(weight)
    peak, log_sum, entropy, label, total = streams[0]
    if not two:
        return torch.stack([peak, log_sum, entropy, label])
    peak_aug, log_sum_aug, entropy_aug, label_aug, total_aug = streams[1]
    cross, ratio = ((weights[0] * part[:, i]).sum(0) / total for i in (8, 9))
    ratio_aug = (weights[1] * part[:, 10]).sum(0) / total_aug
    kl = cross - ((peak - peak_aug) + (log_sum - log_sum_aug))
    aug = [peak_aug, log_sum_aug, entropy_aug]
    return torch.stack([peak, log_sum, entropy, *aug, kl, ratio, ratio_aug, label, label_aug])


def backward(upstream, operands, needs, targets, saved, levels, ignore_index, head, shard, budget):
    """As `torch_backend.backward`."""
    run = Backward(upstream, operands, needs, targets.contiguous(), saved, ignore_index, head)
    if run.count and (run.full or run.aug):
        dense = torch.arange(run.tiles, device=targets.device)
        if levels is not None:
            dense = run.sparse(levels[: run.tiles], RESERVE * budget)
        run.dense(dense)
    return run.gradients()
