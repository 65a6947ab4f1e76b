"""The forward of `eager/` and `cpu/`: products by torch, a chunk of rows at a time.

Each of the two says how it multiplies and how it computes statistics and levels of a chunk's
logits. Logits of a chunk exist as a whole; those of a call do not.
"""

import torch
import torch.distributed as dist

from papo_kernels import rows
from papo_kernels.reference import LOG_ZERO
from papo_kernels.rows import Saved, kept_first, saved_names, statistics_names, unpack

# Rows of a tile, which share their choice of columns.
TILE_ROWS = 16


def names(streams):
    """Names of the statistics that this forward saves."""
    return saved_names(streams, rows.BY_PROBABILITY)


def tile_rows(vocab):
    """Rows of a tile: fewer than usual where a chunk holds fewer."""
    return min(TILE_ROWS, _most_rows(vocab))


def lists_size(n, vocab, streams, keep_levels):
    """Elements of `Saved.lists`: there are no lists here."""
    return 0


def levels_shape(n, vocab, keep_levels):
    """Shape of `Saved.levels` for n rows."""
    return (-(-n // tile_rows(vocab)) if keep_levels else 0), vocab


def chunk_size(count, vocab):
    """Rows of a chunk where `count` rows count.

    Chunks are alike in size, because a short one costs nearly as much as a whole one, and hold
    whole tiles.
    """
    size = _most_rows(vocab)
    if size >= TILE_ROWS and count:
        size = -(-count // -(-count // size))
        size = -(-size // TILE_ROWS) * TILE_ROWS
    return size


def _most_rows(vocab):
    size = max(1, rows.CHUNK_ELEMENTS // max(1, vocab))
    return size // TILE_ROWS * TILE_ROWS or size


def _apart(vocab):
    """How far rows of logits are apart: an odd number of a cache's lines, of 16 logits each.

    Rows that are a multiple of a power of two apart share few lines. With V = 49 152 a product took
    1.3 times as long.
    """
    return vocab if vocab < 1024 else (-(-vocab // 16) | 1) * 16


def forward(call, keep_levels, logits_of, row_statistics, find_levels):
    """`Saved` of a `Call`; keep_levels: whether the backward may be sparse.

    logits_of(head, states, weight, bias, out) writes logits as `Head.logits` does.
    row_statistics(logits) takes one or two (R, V) logits and returns the (F, R) statistics that
    `statistics_names` lists. find_levels(logits, order, s, tile) returns (ceil(R / tile), V) uint8
    levels of tiles that are cut in the (R,) `order` of their rows; s: RowStats of (R, 1).
    """
    n, vocab, streams = len(call.targets), len(call.weight), call.streams
    named = names(streams)
    computed = statistics_names(streams, rows.BY_PROBABILITY)
    saved = torch.zeros(len(named), n, dtype=call.head.dtype, device=call.targets.device)
    levels = saved.new_zeros(levels_shape(n, vocab, keep_levels), dtype=torch.uint8)
    tile = tile_rows(vocab)
    order, count = kept_first(call.targets, call.options.ignore_index)
    count = int(count)
    size = chunk_size(count, vocab)
    room = min(size, count), _apart(vocab)
    buffers = [saved.new_empty(room)[:, :vocab] for _ in range(streams)]
    for first in range(0, count, size):
        # a slice where nothing is ignored: it copies no states
        at = slice(first, first + size) if count == n else order[first : min(first + size, count)]
        if not vocab:
            _fill_without_words(saved, at, named)
            continue
        states = (call.hidden, call.aug_hidden)[:streams]
        logits = [
            _logits(call, x[at], out, logits_of) for x, out in zip(states, buffers, strict=True)
        ]
        statistics = row_statistics(logits)
        s = unpack(statistics[:, :, None], computed)
        targets = call.targets[at]
        logprobs = [
            _target_logprobs(z, stream, targets, call.shard)
            for z, stream in zip(logits, (s.full, s.aug), strict=False)
        ]
        saved[:, at] = torch.cat([statistics, torch.stack(logprobs)])
        if keep_levels:
            by_entropy = _flat_rows_together(s)
            found = find_levels(logits, by_entropy, s, tile)
            levels[first // tile : first // tile + len(found)] = found
            chunk = order[first : min(first + size, count)]
            order[first : first + len(chunk)] = chunk[by_entropy]
    if call.shard.group is not None:
        saved = combine_shards(saved, named, call.shard.group)
        saved[:, call.targets == call.options.ignore_index] = 0
    return Saved(saved, levels, order, order.new_empty(0, dtype=torch.int32))


def _logits(call, states, out, logits_of):
    """(R, V) logits of (R, D) states, in the first rows of `out`."""
    return logits_of(call.head, states, call.weight, call.bias, out[: len(states)])


def _flat_rows_together(s):
    """(R,) order of a chunk's rows in which tiles are cut: by the flatter stream's entropy.

    A tile keeps what its flattest row needs, so one such row should not decide for many others.
    """
    entropy = s.full.entropy
    if s.aug is not None:
        entropy = torch.maximum(entropy, s.aug.entropy)
    return entropy.flatten().argsort(stable=True)


def _target_logprobs(z, s, targets, shard):
    """(R,) log-probs of targets: -inf on ranks without the word, NaN outside the vocabulary."""
    valid, owned, place = shard.place(targets, z.shape[1])
    chosen = z.gather(1, place[:, None])
    found = torch.where(owned, ((chosen - s.peak) - s.log_sum).squeeze(1), -torch.inf)
    return torch.where(valid, found, torch.nan)


# ---- Shards of the vocabulary


def _fill_without_words(saved, at, named):
    """Statistics of a rank that has no words: it adds nothing when shards are combined."""
    nothing = {"peak": LOG_ZERO, "log_sum": -torch.inf, "logprobs": -torch.inf}
    for row, name in enumerate(named):
        name = name.removeprefix("aug_")
        if name in nothing:
            saved[row, at] = nothing[name]


def combine_shards(saved, named, group):
    """Statistics of the whole vocabulary from those of each rank's words, by one collective.

    With w a shard's mass: H = sum w (H_shard - log w), KL = sum w (KL_shard + log w - log w_aug).
    The sums that bound the KLs' gradients, which only a sparse backward uses, are not combined.
    """
    parts = saved.new_empty(group.size() * len(saved), saved.shape[1])
    dist.all_gather_into_tensor(parts, saved, group=group)
    part = dict(zip(named, parts.view(group.size(), *saved.shape).unbind(1), strict=True))
    whole, log_w = {}, {}
    for prefix in ("", "aug_") if "aug_peak" in part else ("",):
        peak, log_sum = part[prefix + "peak"], part[prefix + "log_sum"]
        whole[prefix + "peak"] = peak.amax(0)
        mass = (peak - whole[prefix + "peak"]) + log_sum
        whole[prefix + "log_sum"] = mass.logsumexp(0)
        log_w[prefix] = mass - whole[prefix + "log_sum"]
        whole[prefix + "entropy"] = _weighted(
            log_w[prefix].exp(), part[prefix + "entropy"] - log_w[prefix]
        )
        whole[prefix + "logprobs"] = (part[prefix + "logprobs"] + log_w[prefix]).amax(0)
    if "kl_prcp" in part:
        for name, of, to in (("kl_prcp", "", "aug_"), ("kl_reverse", "aug_", "")):
            terms = part[name] + log_w[of] - log_w[to]
            whole[name] = _weighted(log_w[of].exp(), terms)
    nothing = torch.zeros_like(saved[0])
    return torch.stack([whole.get(name, nothing) for name in named])


def _weighted(w, x):
    """(N,) sum over ranks of (ranks, N) w x; a rank without any mass adds nothing, not 0 * inf."""
    return torch.where(w == 0, 0, w * x).sum(0)
