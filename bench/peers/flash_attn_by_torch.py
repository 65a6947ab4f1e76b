"""flash-attn has no CPU version: its calls in verl's and EasyR1's models, by torch."""

from __future__ import annotations

import itertools
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional


def use_torch(module: ModuleType) -> None:
    """Let `module` attend by torch, causally and each sequence by itself, in any dtype."""
    module.flash_attn_varlen_func = _varlen
    module._flash_attention_forward = _one_sequence
    # flash-attn has no float32
    module.fa_peft_integration_check = lambda q, k, v, **_: (q, k, v)
    module._flash_supports_window_size = True
    module._flash_supports_deterministic = False
    module._flash_use_top_left_mask = False


def _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k=None, dropout_p=0.0, softmax_scale=None, **_):
    parts = [
        _causal(q[a:b], k[a:b], v[a:b], softmax_scale)
        for a, b in itertools.pairwise(cu_seqlens_q.tolist())
    ]
    return torch.cat(parts)


def _one_sequence(q, k, v, attention_mask, query_length, softmax_scale=None, **_):
    return torch.stack([_causal(*row, softmax_scale) for row in zip(q, k, v, strict=True)])


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """(S, heads, head dim), thrice → the same; keys and values may have fewer heads."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attended = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)
