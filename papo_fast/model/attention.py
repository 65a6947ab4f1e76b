"""Attention over packed trees: a response sees its prompt and itself, never another response.

A packed sequence holds segments one after the other. The segment of a prompt attends causally to
itself; the segment of a response attends to the whole segment of its prompt, its *prefix*, and
causally to itself. The layout travels through transformers' models as the keyword `tree`; without
it (generation) the registered function is transformers' own SDPA.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from papo_fast.model.token_attention import is_grouped_token, one_token

_log = logging.getLogger(__name__)

NAME = "papo_tree"
# Segments share one SDPA call while padding them to one shape wastes less than this share of the
# work, or less than this many (query, key) pairs, which cost about as much as a call of its own.
MOST_WASTE = 0.25
CALL_PAIRS = 1 << 17


# (q, k, v) of (T, heads, D), where sequences begin in queries and keys, their most tokens, the
# scale, and whether attention is causal -> (T, heads, D)
VariableLength = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, bool], Tensor]


class Segment(NamedTuple):
    """Tokens [start, start + length) and the prefix that they may also attend to, if any."""

    start: int
    length: int
    prefix_start: int = 0
    prefix: int = 0

    @property
    def keys(self) -> int:
        return self.prefix + self.length

    @property
    def pairs(self) -> int:
        """(query, key) pairs that attend."""
        return self.length * self.prefix + self.length * (self.length + 1) // 2


@dataclass(frozen=True)
class Varlen:
    """Operands of a variable-length kernel: queries as they stand, keys gathered by `kv_index`."""

    kv_index: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class Block:
    """B segments padded to one shape: rows of the packed sequence to gather, and who sees whom.

    `q_index` (B * Q,), `kv_index` (B * K,) int64; `mask_BQK` is None where the segments have no
    prefix: padding stands at the end and causality alone hides it.
    """

    size: int
    q_index: Tensor
    kv_index: Tensor
    mask_BQK: Tensor | None


@dataclass(frozen=True)
class Padded:
    """B prompts, or B responses, padded to one length L for layers that carry a state along.

    `rows_BL` int64 are rows of the packed sequence to gather; `real_BL` bool says which of them are
    tokens. `parents_B` int64 says which prompt, in the order of the lists of prompts, a response
    continues; None for prompts. Prompts are padded in front, where a state is still zero, and
    responses behind, where nobody reads their state.
    """

    rows_BL: Tensor
    real_BL: Tensor
    parents_B: Tensor | None

    def to(self, device: torch.device) -> Padded:
        moved = (None if x is None else x.to(device) for x in vars(self).values())
        return Padded(*moved)


class TreeLayout:
    """Which token attends to which in one packed sequence.

    Args:
        segments: in the order in which they stand, covering all tokens without a gap.
        device: of the packed sequence.
    """

    def __init__(self, segments: list[Segment], device: torch.device | str = "cpu"):
        self.segments = segments
        self.device = torch.device(device)

    def to(self, device: torch.device) -> TreeLayout:
        return TreeLayout(self.segments, device)

    @property
    def pairs(self) -> int:
        return sum(s.pairs for s in self.segments)

    @cached_property
    def varlen(self) -> Varlen:
        keys = [torch.cat(_key_ranges(s)) for s in self.segments]
        q_lengths = [s.length for s in self.segments]
        k_lengths = [s.keys for s in self.segments]
        return Varlen(
            torch.cat(keys).to(self.device),
            _cumulative(q_lengths).to(self.device),
            _cumulative(k_lengths).to(self.device),
            max(q_lengths),
            max(k_lengths),
        )

    @cached_property
    def blocks(self) -> tuple[list[Block], Tensor]:
        """Blocks, and for each token its row in the blocks' outputs laid end to end."""
        blocks, position = [], torch.empty(sum(s.length for s in self.segments), dtype=torch.int64)
        offset = 0
        for members in _alike(self.segments):
            width = max(s.length for s in members)
            blocks.append(_block(members, width, self.device))
            for i, s in enumerate(members):
                first = offset + i * width
                position[s.start : s.start + s.length] = torch.arange(first, first + s.length)
            offset += len(members) * width
        return blocks, position.to(self.device)

    @cached_property
    def padded(self) -> tuple[list[Padded], list[Padded], Tensor]:
        """Prompts and responses, each in lists of similar length, and for each token its row in all
        of these lists laid end to end."""
        prompts = _alike([s for s in self.segments if not s.prefix])
        place = {s.start: i for i, s in enumerate(s for members in prompts for s in members)}
        prompt_of = {s.start: place[s.prefix_start] for s in self.segments if s.prefix}
        responses = _alike([Segment(s.start, s.length) for s in self.segments if s.prefix])
        padded = [_padded(members, None) for members in prompts]
        padded += [_padded(members, [prompt_of[s.start] for s in members]) for members in responses]
        real = torch.cat([p.real_BL.flatten() for p in padded])
        tokens = torch.cat([p.rows_BL.flatten() for p in padded])[real]
        row = real.nonzero()[:, 0][tokens.argsort()]
        padded = [p.to(self.device) for p in padded]
        return padded[: len(prompts)], padded[len(prompts) :], row.to(self.device)


def _key_ranges(s: Segment) -> list[Tensor]:
    return [
        torch.arange(s.prefix_start, s.prefix_start + s.prefix),
        torch.arange(s.start, s.start + s.length),
    ]


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _alike(segments: list[Segment]) -> list[list[Segment]]:
    """Segments in lists that waste little when padded to the largest of the list."""
    lists: list[list[Segment]] = []
    width = prefix = work = 0
    for s in sorted(segments, key=lambda s: (s.prefix, s.length), reverse=True):
        if lists and bool(s.prefix) == bool(prefix):
            padded = (len(lists[-1]) + 1) * max(width, s.length) * (prefix + max(width, s.length))
            waste = padded - work - s.length * s.keys
            if waste <= max(CALL_PAIRS, MOST_WASTE * padded):
                lists[-1].append(s)
                width, work = max(width, s.length), work + s.length * s.keys
                continue
        lists.append([s])
        width, prefix, work = s.length, s.prefix, s.length * s.keys
    return lists


def _block(members: list[Segment], width: int, device: torch.device) -> Block:
    prefix = max(s.prefix for s in members)
    own = torch.arange(width)
    starts = torch.tensor([s.start for s in members])[:, None]
    lengths = torch.tensor([s.length for s in members])[:, None]
    # padding repeats a segment's last token: a valid row, whose output nobody reads
    q_index = starts + torch.minimum(own, lengths - 1)
    if not prefix:
        return Block(len(members), *[q_index.flatten().to(device)] * 2, None)
    prefix_starts = torch.tensor([s.prefix_start for s in members])[:, None]
    prefix_lengths = torch.tensor([s.prefix for s in members])[:, None]
    before = torch.arange(prefix)
    kv_index = torch.cat([prefix_starts + torch.minimum(before, prefix_lengths - 1), q_index], 1)
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.cat(
        [
            (before < prefix_lengths)[:, None, :].expand(-1, width, -1),
            causal.expand(len(members), -1, -1),
        ],
        dim=2,
    )
    return Block(
        len(members),
        q_index.flatten().to(device),
        kv_index.flatten().to(device),
        mask.to(device),
    )


def _padded(members: list[Segment], parents: list[int] | None) -> Padded:
    # a layer takes a single token behind a state for a step of decoding
    width = max(1 if parents is None else 2, *(s.length for s in members))
    starts = torch.tensor([s.start for s in members])[:, None]
    lengths = torch.tensor([s.length for s in members])[:, None]
    at = torch.arange(width) - (width - lengths if parents is None else 0)
    rows = starts + torch.minimum(at.clamp(min=0), lengths - 1)  # padding repeats a token
    real = (at >= 0) & (at < lengths)
    return Padded(rows, real, None if parents is None else torch.tensor(parents))


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: TreeLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """An attention function of transformers' `AttentionInterface`.

    Args:
        query: (1, H, T, D). key, value: (1, H_kv, T, D), H a multiple of H_kv.
        attention_mask: None with `tree`; whatever SDPA takes without it.
        tree: layout of the T packed tokens.

    Returns:
        (1, T, H, D), and None for the attention weights.

    Raises:
        ValueError: a sliding window or dropout together with `tree`.
    """
    if tree is None and is_grouped_token(query, key, attention_mask, kwargs):
        return one_token(query, key, value, attention_mask, scaling, dropout), None
    if tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if kwargs.get("sliding_window") is not None or dropout:
        raise ValueError(
            f"packed trees support neither a sliding window ({kwargs.get('sliding_window')}) nor "
            f"attention dropout ({dropout}); set both off in the model's config.json"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        # float32 weights: rotary embedding has made queries and keys float32, which
        # variable-length kernels do not take
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    run = _implementation(query.device.type, query.dtype)
    return run(q, k, v, tree, scale)[None], None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, tree: TreeLayout, scale: float) -> Tensor:
    blocks, position = tree.blocks
    repeat = q.shape[1] // k.shape[1]
    outputs = []
    for b in blocks:
        qb, kb, vb = (
            x.flatten(1).index_select(0, index).view(b.size, -1, *x.shape[1:]).transpose(1, 2)
            for x, index in ((q, b.q_index), (k, b.kv_index), (v, b.kv_index))
        )
        if repeat > 1:
            kb, vb = (x.repeat_interleave(repeat, dim=1) for x in (kb, vb))
        mask = None if b.mask_BQK is None else b.mask_BQK[:, None]
        out = F.scaled_dot_product_attention(
            qb, kb, vb, attn_mask=mask, is_causal=mask is None, scale=scale
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, position).view_as(q)


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    repeat, gqa = q.shape[1] // k.shape[1], {}
    if repeat > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        gqa = {"enable_gqa": True}
    elif repeat > 1:  # torch 2.11
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    # a window of (-1, 0) is causal, aligned with the end of the keys
    window = (-1, 0 if causal else -1)
    return varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, **gqa
    )  # fmt: skip


def _flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal
    )


def _by(kernel: VariableLength) -> Callable[[Tensor, Tensor, Tensor, TreeLayout, float], Tensor]:
    """Attention of packed trees by a variable-length kernel."""

    def run(q: Tensor, k: Tensor, v: Tensor, tree: TreeLayout, scale: float) -> Tensor:
        t = tree.varlen
        k, v = k.index_select(0, t.kv_index), v.index_select(0, t.kv_index)
        return kernel(q, k, v, t.cu_q, t.cu_k, t.max_q, t.max_k, scale, True)

    return run


def variable_length(device: str, dtype: torch.dtype) -> VariableLength | None:
    """The variable-length kernel for operands like these; None where there is none."""
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    return _torch_varlen if importlib.util.find_spec("flash_attn") is None else _flash_varlen


class Path(NamedTuple):
    """A function that runs the attention of packed trees, and what it is, in words."""

    run: Callable[[Tensor, Tensor, Tensor, TreeLayout, float], Tensor]
    name: str
    kernel: VariableLength | None = None


def chosen_path(device: str, dtype: torch.dtype) -> Path:
    """Which attention packed trees of this dtype run on a device of this type."""
    if device != "cuda":
        return Path(_sdpa, "SDPA on padded blocks of segments")
    kernel = variable_length(device, dtype)
    if kernel is None:
        return Path(_sdpa, f"SDPA on padded blocks: variable-length kernels do not take {dtype}")
    if kernel is _flash_varlen:
        return Path(_by(kernel), "flash-attn's variable-length kernel", kernel)
    return Path(_by(kernel), "torch.nn.attention.varlen (flash-attn is not installed)", kernel)


@functools.cache
def _implementation(device: str, dtype: torch.dtype):
    """The function of `chosen_path`, logged once per device and dtype."""
    path = chosen_path(device, dtype)
    _log.info("packed trees attend by %s", path.name)
    return path.run


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
