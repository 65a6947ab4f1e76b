"""Row-chunked statistics and mass-certified sparse gradients in plain torch, on any device."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from papo_kernels import cpu_kernels
from papo_kernels.columns import TILE_ROWS, find_levels
from papo_kernels.reference import LOG_ZERO, compute_dtype
from papo_kernels.row_math import RowStats, row_statistics
from papo_kernels.sparse_backward import Backward

# Logits of one chunk and stream: 128 MiB of float32. A product packs the weight anew for each.
CHUNK_ELEMENTS = 1 << 25
# Elements of the weight that are gathered or upcast at a time: 16 MiB of float32.
COPY_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Head:
    """Everything between hidden states and logits; `dtype` is that of all arithmetic."""

    dtype: torch.dtype
    temperature: float
    softcap: float | None

    def logits(self, x, weight, bias, out=None):
        """(R, D) states to (R, V) logits."""
        z = out[: len(x)] if out is not None else self.empty(x, len(weight))
        self.multiply(x, weight, z)
        return self.finish(z, bias)

    def empty(self, x, words):
        return x.new_empty(len(x), words, dtype=self.dtype)

    def multiply(self, x, weight, out):
        """Writes the products x @ weight.T into (R, V) `out`."""
        if cpu_kernels.product(x, weight, out):
            return
        x = x.to(self.dtype)
        for block, w in self.blocks(weight):
            torch.mm(x, w.T, out=out[:, block])

    def finish(self, z, bias):
        """In place: products x @ weight.T to logits."""
        if bias is not None:
            z += bias.to(self.dtype)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.temperature != 1:
            z /= self.temperature
        return z

    def blocks(self, weight, cols=None, dtype=None):
        """(slice, weight[slice] or weight[cols[slice]]): copies of a bounded size in `dtype`.

        dtype: None for that of the arithmetic.
        """
        dtype = dtype or self.dtype
        if cols is None and weight.dtype == dtype:
            yield slice(None), weight
            return
        size = max(1, COPY_ELEMENTS // max(1, weight.shape[1]))
        for v in range(0, weight.shape[0] if cols is None else len(cols), size):
            block = slice(v, v + size)
            yield block, (weight[block] if cols is None else weight[cols[block]]).to(dtype)


@dataclass(frozen=True)
class Shard:
    """This rank's part of the vocabulary: words [start, start + len(weight)) of `vocab`."""

    vocab: int
    start: int = 0
    group: dist.ProcessGroup | None = None

    def place(self, labels, size):
        """(valid, owned, position) of (R,) labels: in the vocabulary, on this rank, and where."""
        local = labels - self.start
        owned = (local >= 0) & (local < size)
        valid = (labels >= 0) & (labels < self.vocab)
        return valid, owned, torch.where(owned, local, 0)


def make_head(hidden, aug_hidden, weight, bias, temperature, softcap):
    return Head(compute_dtype(hidden, aug_hidden, weight, bias), temperature, softcap)


def make_shard(weight, group):
    """group: name of a process group, "" for none."""
    if not group:
        return Shard(len(weight))
    found = dist.distributed_c10d._resolve_process_group(group)
    sizes = weight.new_empty(found.size(), dtype=torch.int64)
    mine = torch.tensor([len(weight)], device=weight.device)
    dist.all_gather_into_tensor(sizes, mine, group=found)
    sizes = sizes.tolist()
    return Shard(sum(sizes), sum(sizes[: found.rank()]), found)


def kept_rows(targets, ignore_index):
    """(n,) positions of rows whose target is not `ignore_index`; None where that is all of them."""
    kept = (targets != ignore_index).nonzero().squeeze(-1)
    return None if len(kept) == len(targets) else kept


def chunk_rows(vocab):
    """Rows of a chunk: whole tiles where that is more than one."""
    size = max(1, CHUNK_ELEMENTS // max(1, vocab))
    return size // TILE_ROWS * TILE_ROWS or size


def row_chunks(targets, kept, vocab):
    """(size, index objects that cover the kept rows so many at a time).

    Chunks are alike in size: a short one costs nearly as much as a whole one.
    """
    size, count = chunk_rows(vocab), len(targets) if kept is None else len(kept)
    if size >= TILE_ROWS and count:
        size = -(-count // -(-count // size))
        size = -(-size // TILE_ROWS) * TILE_ROWS
    return size, _split(targets, kept, size)


def _split(targets, kept, size):
    if kept is not None:
        return kept.split(size) if len(kept) else ()
    return tuple(slice(n, n + size) for n in range(0, len(targets), size))


def flat_rows_together(s):
    """(R,) order of a chunk's rows in which tiles are cut: by the flatter stream's entropy.

    A tile keeps what its flattest row needs, so one such row should not decide for 31 others.
    """
    entropy = s.entropy if s.aug_entropy is None else torch.maximum(s.entropy, s.aug_entropy)
    return entropy.flatten().argsort(stable=True)


def label_logprobs(z, peak, log_sum, labels, shard):
    """(R,) log-probs of (R,) labels: -inf on ranks without the word, NaN outside the vocabulary."""
    valid, owned, place = shard.place(labels, z.shape[1])
    chosen = z.gather(1, place[:, None])
    found = torch.where(owned, ((chosen - peak) - log_sum).squeeze(1), -torch.inf)
    return torch.where(valid, found, torch.nan)


def saved_rows(two):
    """Rows of the statistics that the backward needs: RowStats, then the labels' log-probs."""
    return 11 if two else 4


def levels_shape(n, vocab, dtype, sparse):
    tile = min(TILE_ROWS, chunk_rows(vocab))
    return (-(-n // tile) if sparse else 0), vocab


def forward(hidden, aug_hidden, weight, bias, targets, ignore_index, head, shard, sparse):
    """Two or five (N,) outputs, (saved_rows, N) statistics and `levels_shape` column levels."""
    n, vocab = len(targets), len(weight)
    two = aug_hidden is not None
    rows = torch.zeros(saved_rows(two), n, dtype=head.dtype, device=targets.device)
    levels = rows.new_zeros(levels_shape(n, vocab, head.dtype, sparse), dtype=torch.uint8)
    tile = min(TILE_ROWS, chunk_rows(vocab))
    kept = kept_rows(targets, ignore_index)
    count = n if kept is None else len(kept)
    size, chunks = row_chunks(targets, kept, vocab)
    buffers = [rows.new_empty(min(size, count), vocab) for _ in range(1 + two)]
    for first, at in zip(range(0, count, size), chunks, strict=True):
        if not vocab:
            _fill_without_words(rows, at, two)
            continue
        logits = [head.logits(hidden[at], weight, bias, buffers[0])]
        if two:
            logits.append(head.logits(aug_hidden[at], weight, bias, buffers[1]))
        statistics = row_statistics(logits, n * vocab)
        rows[: 9 if two else 3, at] = statistics
        s = RowStats(*statistics[:, :, None])
        labels = targets[at]
        rows[-1 - two, at] = label_logprobs(logits[0], s.peak, s.log_sum, labels, shard)
        if two:
            rows[-1, at] = label_logprobs(logits[1], s.aug_peak, s.aug_log_sum, labels, shard)
        if sparse:
            normalisers = statistics[[0, 1, 3, 4]] if two else statistics[:2]
            order = flat_rows_together(s)
            found = find_levels(logits, order, normalisers[:, :, None], n * vocab, tile)
            levels[first // tile : first // tile + len(found)] = found
    if shard.group is not None:
        rows = combine_shards(rows, two, shard.group)
        rows[:, targets == ignore_index] = 0
    outputs = (9, 2, 10, 5, 6) if two else (3, 2)
    return [rows[i].clone() for i in outputs], rows, levels


def _fill_without_words(rows, at, two):
    for peak, log_sum, label in ((0, 1, -1 - two), (3, 4, -1))[: 1 + two]:
        rows[peak, at] = LOG_ZERO
        rows[log_sum, at] = -torch.inf
        rows[label, at] = -torch.inf


def combine_shards(rows, two, group):
    """Statistics of the whole vocabulary from those of each rank's words, by one collective.

    With w a shard's mass: H = sum w (H_shard - log w), KL = sum w (KL_shard + log w - log w_aug).
    gap and ratio, which only a sparse backward uses, are not combined.
    """
    parts = rows.new_empty(group.size() * len(rows), rows.shape[1])
    dist.all_gather_into_tensor(parts, rows, group=group)
    parts = parts.view(group.size(), *rows.shape)
    out = torch.zeros_like(rows)
    log_w = []
    for first, label in ((0, -1 - two), (3, -1))[: 1 + two]:
        peak, log_sum, entropy = parts[:, first], parts[:, first + 1], parts[:, first + 2]
        out[first] = peak.amax(0)
        mass = (peak - out[first]) + log_sum
        out[first + 1] = mass.logsumexp(0)
        log_w.append(mass - out[first + 1])
        out[first + 2] = _weighted(log_w[-1].exp(), entropy - log_w[-1])
        out[label] = (parts[:, label] + log_w[-1]).amax(0)
    if two:
        out[6] = _weighted(log_w[0].exp(), parts[:, 6] + log_w[0] - log_w[1])
    return out


def _weighted(w, x):
    """(N,) sum over ranks of (ranks, N) w x; a rank without any mass adds nothing, not 0 * inf."""
    return torch.where(w == 0, 0, w * x).sum(0)


def backward(upstream, operands, needs, targets, rows, levels, ignore_index, head, shard, budget):
    """Gradients of the four operands, or None where `needs` is False."""
    run = Backward(operands, needs, upstream, rows, targets, head, shard)
    tiles = []
    kept = kept_rows(targets, ignore_index)
    size, chunks = row_chunks(targets, kept, len(run.weight))
    if levels is not None:  # as the forward made them
        everything = torch.arange(len(targets), device=targets.device)
        for at in chunks:
            at = everything[at]
            s = RowStats(*(None if x is None else x[at] for x in run.stats))
            tiles += at[flat_rows_together(s)].split(min(TILE_ROWS, size))
    else:
        tiles = chunks
    run.run(tiles, None if levels is None else levels[: len(tiles)], budget, size)
    return run.gradients()
