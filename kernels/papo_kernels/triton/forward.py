"""Host side of the Triton forward: one kernel for both streams, then a sum over its splits."""

import torch
import triton

from papo_kernels import rows
from papo_kernels.rows import Saved, kept_first, saved_names
from papo_kernels.triton import kernels, launch
from papo_kernels.triton.launch import kernel_operands

# Below it, a KL's terms of second order are more exact than the difference of first-order sums.
CLOSE = 0.25


def names(streams):
    """Names of the statistics that this forward saves."""
    return saved_names(streams, rows.BY_LOGIT)


def levels_shape(n, vocab, keep_levels):
    """Shape of `Saved.levels` for n rows."""
    return (-(-n // launch.TILE) if keep_levels else 0), vocab


def forward(call, keep_levels):
    """`Saved` of a `Call`; keep_levels: whether the backward may be sparse."""
    o, head, device = kernel_operands(call), call.head, call.targets.device
    targets, named = call.targets.contiguous(), names(call.streams)
    blocks, tile = o.launch.forward, launch.TILE
    levels = torch.zeros(levels_shape(o.n, o.v, keep_levels), dtype=torch.uint8, device=device)
    saved = torch.zeros(len(named), o.n, dtype=torch.float32, device=device)
    order, count = kept_first(targets, call.options.ignore_index)
    if o.n == 0:
        return Saved(saved, levels, order)
    tiles = triton.cdiv(o.n, tile)
    splits = _splits(tiles, o.v, blocks, device)
    per_split = triton.cdiv(triton.cdiv(o.v, splits), blocks.v) * blocks.v
    splits = triton.cdiv(o.v, per_split)
    sums = kernels.PARTS if o.two else kernels.PARTS[: kernels.ONE_STREAM_PARTS.value]
    part = torch.zeros(splits, len(sums), o.n, dtype=torch.float32, device=device)
    kernels.forward_kernel[(tiles, splits)](
        o.full, o.aug, o.weight, o.bias, targets, order, count, part, levels,
        o.n, o.v, o.d, per_split, *o.strides(), head.temperature, head.softcap or 1.0,
        TWO=o.two, HAS_BIAS=o.has_bias, CAP=head.softcap is not None, LEVELS=keep_levels,
        UPCAST=o.upcast, BLOCK_N=tile, BLOCK_V=blocks.v, BLOCK_D=blocks.d,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    found = combine(dict(zip(sums, part.unbind(1), strict=True)), targets[order], o.v)
    live = torch.arange(o.n, device=device) < count
    stats = torch.stack([found[name] for name in named])
    saved[:, order] = torch.where(live, stats, 0)
    return Saved(saved, levels, order)


def _splits(tiles, vocab, blocks, device):
    """Programs along the vocabulary: enough to fill the device where rows are few."""
    if device.type != "cuda":
        wanted = 2
    else:
        units = torch.cuda.get_device_properties(device).multi_processor_count
        wanted = -(-2 * units // tiles)
    return max(1, min(wanted, vocab // (8 * blocks.v)))


def combine(part, targets, vocab):
    """Row statistics by name, (N,) each, from the (splits, N) sums that `kernels.PARTS` lists.

    The arithmetic is float64, so that differences keep the bits that the sums have.
    """
    part = {name: x.double() for name, x in part.items()}
    valid = (targets >= 0) & (targets < vocab)
    stats, weights, totals = {}, {}, {}
    for prefix in ("", "aug_") if "aug_max" in part else ("",):
        maxima, sums = part[prefix + "max"], part[prefix + "others"] + 1
        peak = maxima.amax(0)
        shift = maxima - peak
        weight = shift.exp()
        total = (weight * sums).sum(0)
        log_sum = total.log()
        weighted = (weight * (part[prefix + "weighted"] + sums * shift)).sum(0)
        logit = part[prefix + "target"].sum(0)
        logit = torch.where(logit <= kernels.LOG_ZERO.value, -torch.inf, logit)
        weights[prefix], totals[prefix] = weight, total
        stats |= {
            prefix + "peak": peak,
            prefix + "log_sum": log_sum,
            prefix + "entropy": log_sum - weighted / total,
            prefix + "logprobs": torch.where(valid, (logit - peak) - log_sum, torch.nan),
        }
    if "drift" in part:
        stats |= _compare(part, stats, weights, totals)
    return {name: x.float() for name, x in stats.items()}


def _compare(part, stats, weights, totals):
    """What `combine` returns of both streams together.

    With x = z - z_aug - centre, KL(p || q) = E_p[x] + log E_p[exp(-x)]. Where q is close to p the
    two nearly cancel, and it is S - (u - log(1 + u)) instead, with S = E_p[exp(-x) - 1 + x] and
    u = S - E_p[x]: no term of first order is left. The sum of both KLs is E_p[x] - E_q[x].
    """
    drift, aug_drift, terms, gap, aug_gap = (
        (weights[prefix] * part[prefix + name]).sum(0) / totals[prefix]
        for prefix, name in (
            ("", "drift"), ("aug_", "drift"), ("", "terms"), ("", "logit_gap"),
            ("aug_", "logit_gap"),
        )
    )  # fmt: skip
    centre = part["centre"][0]
    log_ratio = (stats["peak"] - stats["aug_peak"]) + (stats["log_sum"] - stats["aug_log_sum"])
    u = terms - drift
    close = (terms.abs() < CLOSE) & (u.abs() < CLOSE)
    u = torch.where(close, u, 0)
    kl = torch.where(close, (terms - (u - torch.log1p(u))).clamp_min(0), drift + centre - log_ratio)
    both = (drift - aug_drift).clamp_min(0)
    return {
        "kl_prcp": kl,
        "kl_reverse": torch.where(
            close, (both - kl).clamp_min(0), log_ratio - (aug_drift + centre)
        ),
        "logit_gap": gap,
        "aug_logit_gap": aug_gap,
    }
