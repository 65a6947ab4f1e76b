"""Host side of the Triton forward: products of a chunk of rows, one pass over them, and levels."""

import torch
import triton

from papo_kernels import rows
from papo_kernels.rows import Saved, kept_first, saved_names
from papo_kernels.triton import combine_kernels, kernels, launch, lists, stats_kernels
from papo_kernels.triton.launch import LAUNCHES, kernel_operands, multiply

# A chunk is as large as so many that other ways take: 256 MiB of float32 of each stream. Each chunk
# is eight launches, all of which leave a gap, and the backward needs more memory than that.
CHUNKS = 2


def names(streams):
    """Names of the statistics that this forward saves."""
    return saved_names(streams, rows.BY_LOGIT)


def levels_shape(n, vocab, keep_levels):
    """Shape of `Saved.levels` for n rows."""
    return (-(-n // launch.TILE) if keep_levels else 0), vocab


def lists_size(n, vocab, streams, keep_levels):
    """Elements of `Saved.lists` for n rows."""
    return lists.size(n, vocab, streams) if keep_levels else 0


def forward(call, keep_levels):
    """`Saved` of a `Call`; keep_levels: whether the backward may be sparse."""
    with torch.cuda.device_of(call.hidden):
        return _forward(call, kernel_operands(call), keep_levels)


def _forward(call, o, keep_levels):
    device, named = call.targets.device, names(call.streams)
    targets = call.targets.contiguous()
    levels = torch.zeros(levels_shape(o.n, o.v, keep_levels), dtype=torch.uint8, device=device)
    saved = torch.zeros(len(named), o.n, dtype=torch.float32, device=device)
    listed = torch.empty(
        lists_size(o.n, o.v, call.streams, keep_levels), dtype=torch.int32, device=device
    )
    listed[: 2 * o.n] = 0  # a row that does not count has no words
    order, count = kept_first(targets, call.options.ignore_index)
    # A graph that is being captured cannot be asked for a number: it takes all rows.
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    count = o.n if capturing else int(count)
    if count == 0:
        return Saved(saved, levels, order, listed)
    sums = kernels.PARTS if call.streams == 2 else kernels.PARTS[: kernels.ONE_STREAM_PARTS]
    part = torch.zeros(len(sums), o.n, dtype=torch.float32, device=device)
    size = min(_chunk_rows(o.v), triton.cdiv(count, launch.TILE) * launch.TILE)
    z = launch.padded(call.streams * size, o.v, torch.float32, device)
    cut = order.clone()
    writer = lists.Writer(call, o, size, listed) if keep_levels else None
    for first in range(0, count, size):
        chunk = order[first : min(first + size, count)]
        products = _products(o, chunk, z)
        _take_sums(call, o, products, targets, order, first, part)
        if writer is not None:
            _take_levels(call, o, products, targets, order, first, part, cut, levels, writer)
            writer.write(products, order, first)
    combine = LAUNCHES["combine"]
    combine_kernels.combine_kernel[(triton.cdiv(count, combine["BLOCK"]),)](
        part, order, targets, saved, o.n, o.v, count, call.options.ignore_index,
        1 / call.head.temperature, TWO=call.streams == 2, **combine,
    )  # fmt: skip
    return Saved(saved, levels, cut, listed)


def _chunk_rows(vocab):
    """About CHUNKS * CHUNK_ELEMENTS / vocab, in whole tiles.

    A program does a row, and 8 tiles more are nearly two for each processor of a large GPU, which
    is what it takes at once: a chunk of 384 rows keeps 132 of them as long as one of 512 does.
    """
    about = CHUNKS * rows.CHUNK_ELEMENTS / vocab
    step = launch.TILE * (8 if about > 8 * launch.TILE else 1)
    return max(1, round(about / step)) * step


def _products(o, chunk, z):
    """(streams * R, V) products of the (R,) rows `chunk`: those of the aug stream come last."""
    states = launch.rows_of([o.full] if o.aug is None else [o.full, o.aug], chunk)
    z = z[: len(states)]
    multiply(states, o.weight.T, z)
    return z


def _take_sums(call, o, z, targets, order, first, part):
    """Writes a chunk's part of `part`, whose rows are the `order` from `first` on."""
    blocks, count = LAUNCHES["stats"], len(z) // call.streams
    at_once = blocks["LANES"] * stats_kernels.WIDE.value
    own = triton.next_power_of_2(triton.cdiv(o.v, at_once)) * stats_kernels.WIDE.value
    stats_kernels.stats_kernel[(triton.cdiv(count, blocks["BLOCK_N"]),)](
        z, o.bias, targets, order, part, o.n, o.v, count, first, z.stride(0),
        1 / call.head.temperature, call.head.softcap or 1.0, TWO=call.streams == 2,
        HAS_BIAS=o.has_bias, CAP=call.head.softcap is not None, OWN=own, **blocks,
    )  # fmt: skip


def _take_levels(call, o, z, targets, order, first, part, cut, levels, writer):
    """Writes the levels of a chunk's tiles, the order in which these are cut into `cut`, and marks.

    writer: `lists.Writer`, whose marks these are.
    """
    sort, blocks, count = LAUNCHES["sort"], LAUNCHES["levels"], len(z) // call.streams
    two, within = call.streams == 2, torch.empty_like(order[:count])
    kernels.sort_kernel[(triton.cdiv(count, sort["BLOCK_N"]),)](
        part, within, order, cut, o.n, count, first, TWO=two, **sort
    )
    marks, totals = writer.marks, writer.totals[first : first + count]
    grid = (marks.shape[1] // blocks["BLOCK_V"], triton.cdiv(count, launch.TILE))
    kernels.levels_kernel[grid](
        z, o.bias, within, cut, targets, part, levels, marks, totals, o.n, o.v, count, first,
        marks.shape[1], z.stride(0), lists.least_log_prob(call.options.grad_budget),
        1 / call.head.temperature, call.head.softcap or 1.0, TWO=two, HAS_BIAS=o.has_bias,
        CAP=call.head.softcap is not None, TILE=launch.TILE, **blocks,
    )  # fmt: skip
