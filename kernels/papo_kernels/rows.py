"""The data of a call: what it is given, what its forward saves, and what its backward is asked for.

Every way (`eager/`, `cpu/`, `triton/`) reads and fills these structures, and this module imports
none of the ways.

Shapes: N rows of a call, R rows of a chunk or of a tile, D features, V words of this rank's part of
the vocabulary, T tiles. The two streams are `full` (the real image) and `aug` (the corrupted one).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from papo_kernels.reference import bans, compute_dtype

# What `token_stats` returns, in this order. Of one stream it returns the first two.
OUTPUTS = ("logprobs", "entropy", "aug_logprobs", "aug_entropy", "kl_prcp", "kl_reverse")
# Logits of one chunk and stream: 128 MiB of float32. A product packs the weight anew for each.
CHUNK_ELEMENTS = 1 << 25
# Elements of the weight that are gathered or upcast at a time: 16 MiB of float32.
COPY_ELEMENTS = 1 << 22

# ---- What a call is given


@dataclass(frozen=True)
class Options:
    """The arguments of `token_stats` that are not tensors, in the order of the custom operators."""

    temperature: float
    softcap: float | None
    ignore_index: int
    grad_budget: float  # 0.0: the backward is dense
    backend: str  # "triton", "torch" or "reference"
    group: str  # name of the process group whose ranks hold shards of `weight`; "" for none
    validate: bool
    aug_constant: bool  # no gradient passes through the aug stream
    budget_of: str  # what `grad_budget` is a share of: "call" or "token", see `token_stats`


@dataclass(frozen=True)
class Head:
    """Everything between hidden states and logits; `dtype` is that of all arithmetic."""

    dtype: torch.dtype
    temperature: float
    softcap: float | None

    def empty(self, states, words):
        """Room for the (R, `words`) logits of (R, D) `states`."""
        return states.new_empty(len(states), words, dtype=self.dtype)

    def multiply(self, states, weight, out):
        """Writes the products of (R, D) `states` with (V, D) `weight` into (R, V) `out`."""
        states = states.to(self.dtype)
        for block, copied in self.blocks(weight):
            torch.mm(states, copied.T, out=out[:, block])

    def logits(self, states, weight, bias, out):
        """Writes the logits of (R, D) `states` into (R, V) `out`, which it returns.

        weight: (V, D); bias: (V,) or None.
        """
        self.multiply(states, weight, out)
        return self.finish(out, bias)

    def add_products(self, x, y, out):
        """Adds the products of (R, K) `x`, of this dtype, with (K, C) `y` to (R, C) `out`."""
        for block, copied in self.blocks(y):
            out.addmm_(x[:, block], copied)

    def finish(self, z, bias):
        """Turns (R, V) products into logits, in place."""
        if bias is not None:
            bias = bias.to(self.dtype)
            banned = bans(bias)
            z += bias + banned
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
            if bias is not None:
                z += banned
        if self.temperature != 1:
            z /= self.temperature
        return z

    def blocks(self, weight, cols=None, dtype=None):
        """Pairs of a slice and that part of `weight`, or of `weight[cols]`, copied to `dtype`.

        The copies have a bounded size. dtype: None stands for that of the arithmetic.
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
    """This rank's part of the vocabulary: words [start, start + V) of `vocab`."""

    vocab: int
    start: int = 0
    group: dist.ProcessGroup | None = None

    def from_word(self, first):
        """The part that begins at the `first` word of this one."""
        return replace(self, start=self.start + first)

    def place(self, targets, size):
        """Where (R,) `targets` stand among this rank's `size` words.

        Returns (valid, owned, position), (R,) each: whether the target is a word at all, whether
        this rank has it, and its position here, which is 0 where this rank does not have it.
        """
        local = targets - self.start
        owned = (local >= 0) & (local < size)
        valid = (targets >= 0) & (targets < self.vocab)
        return valid, owned, torch.where(owned, local, 0)


@dataclass(frozen=True)
class Call:
    """One call of `token_stats`.

    hidden and aug_hidden are (N, D), weight is (V, D), bias is (V,), targets are (N,) int64;
    aug_hidden and bias may be None.
    """

    hidden: torch.Tensor
    aug_hidden: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    options: Options
    head: Head
    shard: Shard

    @property
    def operands(self):
        """The tensors that may want a gradient, in the order of the operators' arguments."""
        return self.hidden, self.aug_hidden, self.weight, self.bias

    @property
    def streams(self):
        """1 or 2."""
        return 1 if self.aug_hidden is None else 2

    @property
    def logits(self):
        """Number of the logits of one stream."""
        return len(self.targets) * len(self.weight)


def make_call(hidden, aug_hidden, weight, bias, targets, options):
    """The call with its head and shard; collective where `options.group` is given."""
    dtype = compute_dtype(hidden, aug_hidden, weight, bias)
    head = Head(dtype, options.temperature, options.softcap)
    shard = _make_shard(weight, options.group)
    return Call(hidden, aug_hidden, weight, bias, targets, options, head, shard)


def _make_shard(weight, group):
    if not group:
        return Shard(len(weight))
    found = dist.distributed_c10d._resolve_process_group(group)
    sizes = weight.new_empty(found.size(), dtype=torch.int64)
    mine = torch.tensor([len(weight)], device=weight.device)
    dist.all_gather_into_tensor(sizes, mine, group=found)
    sizes = sizes.tolist()
    return Shard(sum(sizes), sum(sizes[: found.rank()]), found)


def kept_first(targets, ignore_index):
    """(N,) order of the rows in which the ones that count come first, and their number, (1,).

    It does not synchronise with a GPU.
    """
    ignored = targets == ignore_index
    return ignored.to(torch.int8).argsort(stable=True), (~ignored).sum()[None]


# ---- What the forward saves


class StreamStats(NamedTuple):
    """Statistics of one stream's rows, (R,) or (R, 1) each.

    log p = (z - peak) - log_sum: the two are kept apart because their sum loses bits at |z| = 1e4.
    `peak` is the highest logit, but for Triton's kernels, which promise that only where one word
    has more than half of the mass: elsewhere it is the logit of another likely word.
    """

    peak: torch.Tensor
    log_sum: torch.Tensor
    entropy: torch.Tensor
    logprobs: torch.Tensor | None = None  # of the targets


class RowStats(NamedTuple):
    """What a row's gradients need besides its logits, (R,) or (R, 1) each.

    The certificate bounds what the KLs add to the gradient by either of two groups of sums over the
    vocabulary. A way fills one group and leaves None in the other.
    """

    full: StreamStats
    aug: StreamStats | None = None
    kl_prcp: torch.Tensor | None = None  # KL(p || q)
    kl_reverse: torch.Tensor | None = None  # KL(q || p)
    prob_gap: torch.Tensor | None = None  # sum |q - p|
    log_ratio: torch.Tensor | None = None  # sum p |log q - log p|
    aug_log_ratio: torch.Tensor | None = None  # sum q |log q - log p|
    logit_gap: torch.Tensor | None = None  # sum p |z - z_aug|
    aug_logit_gap: torch.Tensor | None = None  # sum q |z - z_aug|


BY_PROBABILITY = ("prob_gap", "log_ratio", "aug_log_ratio")
BY_LOGIT = ("logit_gap", "aug_logit_gap")


def statistics_names(streams, bound):
    """Names of the statistics that need all of a row's logits, as they stand in (F, R) tensors.

    bound: the sums that bound the KLs' gradients, BY_PROBABILITY or BY_LOGIT.
    """
    names = ("peak", "log_sum", "entropy")
    if streams == 1:
        return names
    return (*names, *(f"aug_{name}" for name in names), "kl_prcp", "kl_reverse", *bound)


def saved_names(streams, bound):
    """Names of all statistics that a forward saves: the targets' log-probs come last."""
    logprobs = ("logprobs", "aug_logprobs")
    return statistics_names(streams, bound) + logprobs[:streams]


def unpack(rows, names):
    """RowStats of the (F, R) tensor `rows`, or of its first rows where `names` has more than F."""
    at = dict(zip(names, rows, strict=False))

    def stream(prefix):
        return StreamStats(*(at.pop(prefix + field, None) for field in StreamStats._fields))

    full, aug = stream(""), stream("aug_")
    return RowStats(full, None if aug.peak is None else aug, **at)


@dataclass(frozen=True)
class Saved:
    """What the forward hands to the backward."""

    rows: torch.Tensor  # (F, N) statistics, which `saved_names` lists
    levels: torch.Tensor  # (T, V) uint8, see `certificate`; (0, V): the backward is dense
    order: torch.Tensor  # (N,) rows: in the order in which tiles are cut, ignored ones last
    lists: torch.Tensor  # int32, each row's own words, see `triton.lists`; of other ways empty

    def outputs(self, names):
        """The outputs that exist, (N,) each, in the order of OUTPUTS."""
        at = dict(zip(names, self.rows, strict=True))
        return [at[name].clone() for name in OUTPUTS if name in at]


# ---- What the backward is asked for


class StreamUpstream(NamedTuple):
    """Gradients of the loss with respect to one stream's outputs, (R,) or (R, 1) each or None."""

    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    @property
    def given(self):
        return self.logprobs is not None or self.entropy is not None


class Upstream(NamedTuple):
    """Gradients of the loss with respect to all outputs."""

    full: StreamUpstream
    aug: StreamUpstream
    kl_prcp: torch.Tensor | None = None
    kl_reverse: torch.Tensor | None = None

    @property
    def flat(self):
        """In the order of OUTPUTS."""
        return (*self.full, *self.aug, self.kl_prcp, self.kl_reverse)


def make_upstream(logprobs, entropy, aug_logprobs, aug_entropy, kl_prcp, kl_reverse):
    full, aug = StreamUpstream(logprobs, entropy), StreamUpstream(aug_logprobs, aug_entropy)
    return Upstream(full, aug, kl_prcp, kl_reverse)


def of_words(upstream, targets, shard, ignore_index):
    """`upstream` with NaN for the log-prob of a target that is no word.

    It is NaN only where a gradient is asked for: a loss that leaves such a row out gets none there.
    """
    valid = shard.place(targets, 0)[0] | (targets == ignore_index)

    def of(stream):
        up = stream.logprobs
        if up is None:
            return stream
        return stream._replace(logprobs=torch.where(valid | (up == 0), up, torch.nan))

    return upstream._replace(full=of(upstream.full), aug=of(upstream.aug))


@dataclass(frozen=True)
class Wanted:
    """Which gradients a backward computes."""

    # of the operands
    hidden: bool
    aug_hidden: bool
    weight: bool
    bias: bool
    # of the logits of either stream, because an operand's gradient needs them
    full: bool
    aug: bool
    kl: bool  # KL(p || q) has an upstream gradient
    kl_reverse: bool  # KL(q || p) has one
    # Where q is close to p a KL's two gradients nearly cancel in the weight's, and what is
    # dropped must be small beside that: the streams' sum is certified too.
    net: bool

    @property
    def any_kl(self):
        """Whether a gradient compares the streams, and so needs the logits of both."""
        return self.kl or self.kl_reverse

    @property
    def full_logits(self):
        """Whether the backward needs the logits of that stream."""
        return self.full or self.any_kl

    @property
    def aug_logits(self):
        return self.aug or self.any_kl


def make_wanted(needs, upstream, aug_constant):
    """What a backward computes.

    needs: for hidden, aug_hidden, weight and bias, whether it wants a gradient. aug_constant: no
    gradient passes through the aug stream, neither to its states nor to weight and bias.
    """
    hidden, aug_hidden, weight, bias = needs
    shared = weight or bias
    kl, kl_reverse = upstream.kl_prcp is not None, upstream.kl_reverse is not None
    any_kl, aug_hidden = kl or kl_reverse, aug_hidden and not aug_constant
    full = (hidden or shared) and (any_kl or upstream.full.given)
    aug = (aug_hidden or shared) and (any_kl or upstream.aug.given) and not aug_constant
    net = full and aug and any_kl and shared
    return Wanted(hidden, aug_hidden, weight, bias, full, aug, kl, kl_reverse, net)


def each(function: Callable, value):
    """`value`, a tensor or nested tuples of tensors, with `function` of every tensor in it."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return type(value)(*(each(function, x) for x in value))
    return function(value)
