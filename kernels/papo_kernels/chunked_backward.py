"""The backward of `eager/` and `cpu/`: few words where few matter, all of them elsewhere.

A tile is some rows that share their choice of words. Tiles are tried on candidates first; the rows
of those that want too many words are done densely together (`dense_rows`).

Both ways bring a module of functions on tiles, here called `tiles`. It has the constants

- TOGETHER: tiles whose logits are computed in one call;
- MOST_WAITING: most logits that one such call computes, and most elements of finished tiles'
  gradients that wait for other tiles;
- DENSE_SHARE: share of the vocabulary above which a tile is done densely;
- ROUNDS_WEIGHT: whether `add_gradients` can round the weight's gradient itself;

and functions that `eager/tiles.py` describes: for tiles `states_of`, `picked_logits`,
`differentiate`, `drop_least` and `add_gradients`, and for dense rows `logits`, `d_products`,
`add_products`, `add_transposed_products` and `put_rounded`.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist

from papo_kernels import certificate, chunked_forward
from papo_kernels.certificate import ATTEMPTS, RESERVE, Beyond, record
from papo_kernels.dense_rows import add_dense
from papo_kernels.rows import Call, RowStats, Upstream, Wanted, each, make_wanted, unpack
from papo_kernels.sizes import Wholes

# Of the first tile, which nothing is known about: see `certificate.choose_levels`.
ASSUMED_TIGHTNESS = 1 / 16


@dataclass(frozen=True)
class Backward:
    """What one backward pass is about; nothing of it changes."""

    call: Call
    stats: RowStats  # (N,) each
    upstream: Upstream  # (N,) each, in the dtype of the arithmetic
    wanted: Wanted
    tiles: ModuleType

    def of_rows(self, at):
        """RowStats and Upstream of the rows `at`, (R, 1) each."""

        def column(x):
            return x[at][:, None]

        return each(column, self.stats), each(column, self.upstream)

    def states(self, at):
        """(R, D) states of the rows `at` in both streams; None where logits are not needed."""
        full = self.call.hidden[at] if self.wanted.full_logits else None
        return full, self.call.aug_hidden[at] if self.wanted.aug_logits else None


def backward(call, saved, upstream, needs, tiles):
    """Gradients of the four operands in their dtypes, or None where `needs` is False.

    saved: `rows.Saved` as the forward made it. upstream: Upstream of (N,). needs: four bools.
    """
    stats = unpack(saved.rows, chunked_forward.names(call.streams))
    upstream = each(lambda x: x.to(call.head.dtype), upstream)
    wanted = make_wanted(needs, upstream, call.options.aug_constant)
    run = Backward(call, stats, upstream, wanted, tiles)
    total = GradientSum(run)
    # Rows are counted in the order in which the forward cut its tiles.
    count = int((call.targets != call.options.ignore_index).sum())
    order = saved.order[:count]
    if (run.wanted.full or run.wanted.aug) and count and len(call.weight):
        dense = [order]
        if len(saved.levels):
            dense = _sparse(run, order, saved.levels, total)
        if dense:
            add_dense(run, torch.cat(dense), total)
    return total.gradients()


# ---- The sum over tiles and chunks


class GradientSum:
    """The operands' gradients so far, and finished tiles that are not yet added to them.

    Tiles share most of their words, so they wait for each other and go through the weight together.
    """

    def __init__(self, run):
        call, wanted, tiles = run.call, run.wanted, run.tiles
        self._run = run
        # Shards of the vocabulary add up to these, and so they are rounded after that.
        wide = {} if call.shard.group is None else {"dtype": call.head.dtype}
        self._hidden = torch.zeros_like(call.hidden, **wide) if wanted.hidden else None
        self._aug_hidden = torch.zeros_like(call.aug_hidden, **wide) if wanted.aug_hidden else None
        self._weight = None
        self._bias = torch.zeros_like(call.bias, dtype=call.head.dtype) if wanted.bias else None
        self._waiting, self._elements = [], 0
        # 16-bit weights: where all tiles are sparse and can wait for the last, their gradients' sum
        # is rounded at once, and no float32 copy of the weight's gradient is ever made.
        self._may_round = tiles.ROUNDS_WEIGHT and call.weight.dtype != call.head.dtype
        self._most_waiting = tiles.MOST_WAITING
        if self._may_round:
            self._most_waiting = max(self._most_waiting, call.weight.numel() // 4)

    def sum_of_weight(self, in_its_dtype=False):
        """Where the weight's gradient is summed; None where it is not asked for.

        in_its_dtype: nothing was summed there before, each word gets its whole sum at once.
        """
        # One rounding at the end: sums over rows in 16 bits diverge.
        if self._run.wanted.weight and self._weight is None:
            weight, dtype = self._run.call.weight, self._run.call.head.dtype
            self._weight = torch.zeros_like(weight, dtype=None if in_its_dtype else dtype)
        return self._weight

    def add_tile(self, at, states, finished):
        """Takes the finished gradients of the tile of rows `at`."""
        self._waiting.append((at, states, finished))
        self._elements += len(finished.cols) * len(states.rows)
        if self._elements > self._most_waiting:
            self._add_waiting()

    def end_tiles(self, all_were_sparse):
        """After the last tile, before dense rows."""
        unused = self._run.wanted.weight and self._weight is None
        if self._may_round and unused and all_were_sparse:
            self._weight = torch.zeros_like(self._run.call.weight)
        self._add_waiting()

    def _add_waiting(self):
        if not self._waiting:
            return
        waiting, self._waiting, self._elements = self._waiting, [], 0
        d_states = (self._hidden, self._aug_hidden)
        dtypes = {x.dtype for x in d_states if x is not None}
        dtype = self._run.call.head.dtype if len(dtypes) > 1 else next(iter(dtypes), None)
        found = self._run.tiles.add_gradients(
            [states for _, states, _ in waiting],
            [finished for _, _, finished in waiting],
            self._run.call,
            self.sum_of_weight(),
            self._bias,
            dtype,
        )
        for (at, _, _), parts in zip(waiting, found, strict=True):
            self.put_states(at, parts)

    def put_states(self, at, d_states):
        """Takes the whole gradients, (R, D) or None, of the states of the rows `at`."""
        for total, part in zip((self._hidden, self._aug_hidden), d_states, strict=True):
            if total is not None and part is not None:
                total[at] = part.to(total.dtype)

    def add_bias(self, words, dz):
        """Adds what (R, B) gradients of the products of some words, or None, give their bias."""
        if self._bias is not None:
            for grad in dz:
                if grad is not None:
                    self._bias[words] += grad.sum(0)

    def gradients(self):
        """Of hidden, aug_hidden, weight and bias in their own dtypes, or None."""
        call = self._run.call
        grads = (self._hidden, self._aug_hidden, self.sum_of_weight(), self._bias)
        if call.shard.group is not None:
            for g in grads[:2]:
                if g is not None:
                    dist.all_reduce(g, group=call.shard.group)
        return tuple(
            None if g is None else g.to(x.dtype) for g, x in zip(grads, call.operands, strict=True)
        )


# ---- Sparse tiles


@dataclass(frozen=True)
class Tile:
    """Some rows that share their choice of words."""

    at: torch.Tensor  # (R,) int64, which rows
    levels: torch.Tensor  # (V,) uint8
    s: RowStats  # (R, 1) each
    g: Upstream  # (R, 1) each
    highest_entropy: float
    states: object  # as `tiles.states_of` returns them


@dataclass(frozen=True)
class Candidates:
    """The words on which a tile is tried."""

    cols: torch.Tensor  # (K,) int64, ascending
    place: torch.Tensor  # (R,) where among them the rows' targets stand
    beyond: Beyond  # what the levels say of the other words


def _sparse(run, order, levels, total):
    """Adds the gradients of the tiles that few words serve; returns the rows of the others.

    order: (count,) rows that count; levels: (T, V).
    """
    budget = RESERVE * run.call.options.grad_budget
    wholes = Wholes(run, len(order))
    cut = list(zip(order.split(chunked_forward.tile_rows(levels.shape[1])), levels, strict=False))
    dense, tightness, first = [], None, 0
    while first < len(cut):
        # The first tile is tried alone, so that the others can learn from it.
        end = first + run.tiles.TOGETHER if first else 1
        found, tightness = _some_tiles(run, cut[first:end], budget, wholes, tightness, total)
        dense += found
        first = end
    total.end_tiles(not dense)
    return dense


def _some_tiles(run, cut, budget, wholes, tightness, total):
    """Adds what some tiles allow; returns (rows of the others, the tightness learned)."""
    todo, dense = [], []
    for at, levels in cut:
        tile = _tile(run, at, levels)
        if tile is None:
            record(len(at), 0, len(levels), 0.0)
        elif tile.highest_entropy != tile.highest_entropy:  # NaN
            dense.append(at)
        else:
            todo.append(tile)
    for attempt in range(ATTEMPTS):
        chosen = _levels_of(run, todo, budget, tightness, curious=attempt == 0)
        found = list(zip(todo, chosen, strict=True))
        tried = [(t, _candidates(run, t, *x)) for t, x in found if x is not None]
        if not tried:
            break
        # Those that seem to want too many words wait for what is learned now.
        todo = [t for t, x in found if x is None]
        for some in _that_fit(tried, run.tiles.MOST_WAITING):
            states, cols = [t.states for t, _ in some], [c.cols for _, c in some]
            logits = run.tiles.picked_logits(states, cols, run.call)
            for (tile, candidates), z in zip(some, logits, strict=True):
                lost, finished = _try(run, tile, candidates, z, budget, wholes)
                enough, mass = finished is not None, candidates.beyond.mass
                tightness = certificate.learn_tightness(tightness, lost, mass, enough)
                if enough:
                    total.add_tile(tile.at, tile.states, finished)
                else:
                    todo.append(tile)
    return dense + [t.at for t in todo], tightness


def _tile(run, at, levels):
    """The tile of the rows `at`; None where no row has an upstream gradient."""
    s, g = run.of_rows(at)
    if not any(x is not None and x.any() for x in g.flat):
        return None
    # A NaN of the aug stream alone may get lost here; its tile's levels are 0, which is dense too.
    # Only of a stream that gets gradients does the certificate need the words beyond the entropy.
    streams = (s.full, None if run.call.options.aug_constant else s.aug)
    highest = max(float(x.entropy.max()) for x in streams if x is not None)
    return Tile(at, levels, s, g, highest, run.tiles.states_of(run.states(at)))


def _levels_of(run, todo, budget, tightness, curious):
    """Of each tile (level, Beyond), or None where it wants too many words.

    curious: where all seem to want too many, one tries as many as are worth trying. What is known
    may come from a tile that was unlike the others.
    """
    if not todo:
        return []
    counts = torch.stack(
        [torch.bincount(t.levels, minlength=certificate.LEVELS).double() for t in todo]
    )
    highest = torch.tensor(
        [t.highest_entropy for t in todo], dtype=torch.float64, device=counts.device
    )
    most = run.tiles.DENSE_SHARE * len(run.call.weight)

    def choose(some, tightness, known):
        level, beyond, worth = certificate.choose_levels(
            counts[:some], highest[:some], tightness, known, budget, most
        )
        found = zip(level.tolist(), *(x.tolist() for x in beyond), worth.tolist(), strict=True)
        return [(x, Beyond(*b)) if ok else None for x, *b, ok in found]

    if tightness is None:
        return choose(len(todo), ASSUMED_TIGHTNESS, known=False)
    found = choose(len(todo), tightness, known=True)
    if curious and not any(found):
        found[:1] = choose(1, tightness, known=False)
    return found


def _candidates(run, tile, level, beyond):
    """All words up to a level, and the rows' targets."""
    mask = tile.levels <= level
    _, _, targets = run.call.shard.place(run.call.targets[tile.at], len(mask))
    mask[targets] = True
    cols = mask.nonzero().squeeze(1)
    return Candidates(cols, torch.searchsorted(cols, targets), beyond)


def _that_fit(tried, most):
    """`tried` in parts: of one tile each, or of no more than `most` logits."""
    part, size = [], 0
    for tile, candidates in tried:
        more = len(candidates.cols) * len(tile.states.rows)
        if part and size + more > most:
            yield part
            part, size = [], 0
        part.append((tile, candidates))
        size += more
    yield part


def _try(run, tile, candidates, logits, budget, wholes):
    """(largest share of a row's gradient that no candidate has, the finished gradients).

    The latter are None where these candidates are not enough.
    """
    s, g, tiles = tile.s, tile.g, run.tiles
    sums, gradients = tiles.differentiate(tile.states, candidates, logits, s, g, run)
    outside = certificate.outside(sums, s, g, run.wanted, candidates.beyond, run.call.head)
    at = tile.at[:, None]
    streams = certificate.certified(run.wanted)
    sizes = tuple(x if i in streams else None for i, x in enumerate(sums.sizes()))
    wholes.learn(at, sizes)
    whole_sizes = wholes.of_rows(at, sizes)
    whole = [whole_sizes[i] for i in streams]
    beyond = [outside[i] for i in streams]
    lost = _largest_share(beyond, whole)
    allowances = [budget * w - b for w, b in zip(whole, beyond, strict=True)]
    if not all((a >= 0).all() for a in allowances):
        return lost, None
    room = dict(zip(streams, allowances, strict=True))
    gradients, dropped = tiles.drop_least(gradients, [room.get(i) for i in range(3)], run)
    beyond = [b + dropped[i] for i, b in zip(streams, beyond, strict=True)]
    record(len(tile.at), len(gradients.cols), len(tile.levels), _largest_share(beyond, whole))
    return lost, gradients


def _largest_share(parts, wholes):
    return max(float((b / w).nan_to_num(0).max()) for b, w in zip(parts, wholes, strict=True))
