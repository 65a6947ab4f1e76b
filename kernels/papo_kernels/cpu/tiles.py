"""Gradients of the rows of a tile on picked words, in C++: rows of the weight are read in place.

The functions that `chunked_backward` asks of a way; `eager/tiles.py` describes them. Operands are
float32 or bfloat16 on the CPU, arithmetic is float32. Matrices of a tile stand transposed, (words,
rows of both streams), and the rows of each stream are filled up to whole vectors.
"""

from typing import NamedTuple

import torch

from papo_kernels.certificate import WORTH_DROPPING, CandidateSums, StreamSums
from papo_kernels.cpu import library
from papo_kernels.cpu.forward import logits as logits
from papo_kernels.equations import slope

# Tiles have most of their words in common, so tiles that are tried together read each row of the
# weight only once.
TOGETHER, MOST_WAITING = 32, 1 << 22
# Rows of the weight are read where they stand, so a tile may keep more of them than if they were
# gathered.
DENSE_SHARE = 0.85
ROUNDS_WEIGHT = True


def d_products(z, s, g, target, run):
    """As in `eager/tiles.py`; `library.Halves` where all operands are bfloat16."""
    call, wanted = run.call, run.wanted
    operands = (call.hidden, call.aug_hidden, call.weight)
    halves = all(x is None or x.dtype == torch.bfloat16 for x in operands)
    # a bias sums the gradients, which are not rounded for that
    halves = halves and not wanted.bias and library.multiplies_bf16()
    present = tuple(x is not None for x in z)
    fields = _fields_of_rows(s, g, present, len(target.place))
    places = torch.where(target.owned, target.place, -1).int()
    of_them = [x for x, there in zip((wanted.full, wanted.aug), present, strict=True) if there]
    logits = [x for x in z if x is not None]
    found = iter(
        library.dense_gradients(
            logits, of_them, halves, wanted.kl_reverse, fields, places, call.head
        )
    )
    return [next(found) if there else None for there in present]


def add_products(grad, y, out, head):
    """As in `eager/tiles.py`."""
    if isinstance(grad, library.Halves):
        library.add_product(grad.rows, y, out)
    else:
        head.add_products(grad, y, out)


def add_transposed_products(grad, y, out, head, fresh):
    """As in `eager/tiles.py`."""
    if isinstance(grad, library.Halves):
        library.add_product_of_pairs(grad.pairs, y, out, fresh)
    else:
        head.add_products(grad.T, y, out.zero_() if fresh else out)


def put_rounded(block, out):
    """As in `eager/tiles.py`."""
    if out.dtype == torch.bfloat16 and out.is_contiguous():
        library.round_to_bf16(block, out)
    else:
        out.copy_(block)


class States(NamedTuple):
    """States of a tile's rows, both streams in one tensor, each filled up with zeros."""

    rows: torch.Tensor  # (S padded, D)
    present: tuple[bool, bool]  # whether the full and the aug stream are among them
    count: int  # R, the rows of the tile
    padded: int  # R in whole vectors

    def split(self, x):
        """(S padded, ...) `x` as (R, ...) of both streams; None for one that is not present."""
        parts = iter(x.split(self.padded))
        return tuple(next(parts)[: self.count] if present else None for present in self.present)

    def that_have(self, gradients):
        """These states without the aug stream, where `gradients` are the full one's alone."""
        if gradients.present == self.present:
            return self
        return self._replace(rows=self.rows[: self.padded], present=gradients.present)


class Gradients(NamedTuple):
    """Gradients of a tile on some words, S streams."""

    cols: torch.Tensor  # (K,) int64, ascending
    dz: torch.Tensor  # (K, S padded) of states @ weight.T + bias
    present: tuple[bool, bool]
    count: int


def states_of(states):
    given = [x for x in states if x is not None]
    count = len(given[0])
    padded = library.whole_vectors(count)
    # streams of unlike dtypes meet in the dtype of the arithmetic, so that neither is rounded
    alike = all(x.dtype == given[0].dtype for x in given)
    dtype = given[0].dtype if alike else torch.float32
    rows = given[0].new_zeros(len(given), padded, given[0].shape[1], dtype=dtype)
    for to, x in zip(rows, given, strict=True):
        to[:count] = x
    return States(rows.flatten(0, 1), tuple(x is not None for x in states), count, padded)


def picked_logits(states, cols, call):
    rows = [x.rows for x in states]
    return library.picked_logits(list(zip(rows, cols, strict=True)), call.weight)


def differentiate(states, candidates, logits, s, g, run):
    """As in `eager/tiles.py`; the full stream, if it is present, gets gradients, wanted or not."""
    call, wanted, z, present = run.call, run.wanted, logits, states.present
    bias = None if call.bias is None else call.bias[candidates.cols]
    call.head.finish(z.T, bias)
    rows = _fields_of_rows(s, g, states.present, states.padded)
    targets = torch.full((states.padded,), -1, dtype=torch.int32)
    targets[: states.count] = candidates.place
    both = all(present)
    fields = len(TWO_STREAM_SUMS if both else StreamSums._fields)
    dz, sums = library.column_gradients(
        z, sum(present), wanted.aug, wanted.kl_reverse, rows, targets, fields
    )
    if both and not wanted.aug:
        z, present = z[:, : states.padded], (True, False)
    gradients = Gradients(candidates.cols, dz, present, states.count)
    _behind_head(gradients, z, sums, both, call.head)
    sums = sums[:, : states.count, None]
    if both:
        at = dict(zip(TWO_STREAM_SUMS, sums, strict=True))
        full, aug = (
            StreamSums(*(at.pop(prefix + name) for name in StreamSums._fields))
            for prefix in ("", "aug_")
        )
        return CandidateSums(full, aug, **at), gradients
    one = StreamSums(*sums)
    found = CandidateSums(one) if present[0] else CandidateSums(StreamSums(), one)
    return found, gradients


def _behind_head(gradients, z, sums, both, head):
    """Takes gradients of the logits `z`, and their sizes among `sums`, on to the products."""
    dz = gradients.dz
    names = TWO_STREAM_SUMS if both else StreamSums._fields
    if head.softcap is None:
        if head.temperature != 1:
            dz /= head.temperature
            for i, name in enumerate(names):
                if name.endswith("size"):
                    sums[i] /= head.temperature
        return
    dz *= slope(z, head)
    padded = sums.shape[1]
    sums[names.index("size")] = dz[:, :padded].abs().sum(0)
    if dz.shape[1] > padded:
        sums[names.index("aug_size")] = dz[:, padded:].abs().sum(0)
        sums[names.index("net_size")] = (dz[:, :padded] + dz[:, padded:]).abs().sum(0)


# In the order in which the C++ writes them; one stream has the first three.
TWO_STREAM_SUMS = (
    "mass", "own", "size", "aug_mass", "aug_own", "aug_size", "prob_gap", "log_ratio", "kl_terms",
    "net_size", "aug_log_ratio", "kl_reverse_terms",
)  # fmt: skip


def _fields_of_rows(s, g, present, padded):
    """(5 or 14, padded) float32: the fields of the C++'s `Rows` for each stream that is `present`.

    Where both are, those of its `Kls` follow.
    """
    some = next(x for x, there in zip((s.full, s.aug), present, strict=True) if there)
    nothing = torch.zeros_like(some.peak)
    fields = []
    for stream, up, there in zip((s.full, s.aug), (g.full, g.aug), present, strict=True):
        if there:
            fields += [stream.peak, stream.log_sum, stream.entropy, *up]
    if all(present):
        fields += [s.kl_prcp, g.kl_prcp, s.kl_reverse, g.kl_reverse]
    rows = torch.zeros(len(fields), padded, dtype=torch.float32)
    given = [nothing if x is None else x for x in fields]
    rows[:, : len(nothing)] = torch.cat(given, 1).T
    return rows


def drop_least(gradients, allowances, run):
    order = [i for i, present in enumerate(gradients.present) if present]
    net = allowances[2] is not None
    given = [allowances[i] for i in order] + ([allowances[2]] if net else [])
    padded = gradients.dz.shape[1] // len(order)
    # A stream that is not asked for limits nothing.
    room = gradients.dz.new_full((len(given), padded), torch.inf)
    for to, allowance in zip(room, given, strict=True):
        if allowance is not None:
            to[: gradients.count] = allowance.squeeze(1)
    keep, dropped = library.drop_least(gradients.dz, len(order), net, room)
    if len(gradients.cols) - len(keep) <= WORTH_DROPPING * len(gradients.cols):
        return gradients, [0, 0, 0]
    found = dict(zip([*order, 2], dropped[:, : gradients.count, None], strict=False))
    kept = gradients._replace(cols=gradients.cols[keep], dz=gradients.dz[keep])
    return kept, [found.get(i, 0) for i in range(3)]


def add_gradients(states, gradients, call, d_weight, d_bias, dtype):
    cols = torch.cat([finished.cols for finished in gradients]).unique()
    states = [x.that_have(finished) for x, finished in zip(states, gradients, strict=True)]
    given = []
    for x, finished in zip(states, gradients, strict=True):
        d_x = None
        if dtype is not None:  # it may replace the states themselves: they are not needed again
            d_x = x.rows if x.rows.dtype == dtype else torch.empty_like(x.rows, dtype=dtype)
        places = torch.searchsorted(cols, finished.cols).int()
        given.append((finished.dz, places, x.rows, d_x))
    library.add_picked_gradients(given, call.weight, cols, d_weight)
    found = []
    for x, finished, (_, _, _, d_x) in zip(states, gradients, given, strict=True):
        if d_bias is not None:
            d_bias.index_add_(0, finished.cols, finished.dz.sum(1))
        found.append((None, None) if d_x is None else x.split(d_x))
    return found
