"""Attention of one token of each sequence: what sampling asks for, over and over."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor


def is_grouped_token(
    query: Tensor, key: Tensor, mask: Tensor | None, others: Mapping[str, object]
) -> bool:
    """Whether each sequence asks with one token, and several of its heads ask the same keys."""
    of_all_heads = mask is None or mask.shape[1] == 1
    plain = others.get("position_bias") is None and others.get("cache") is None
    return query.shape[2] == 1 and query.shape[1] > key.shape[1] and of_all_heads and plain


def one_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """(B, 1, H, D): heads of a group are as many queries of one head, and no key is copied.

    `sdpa_attention_forward` repeats keys and values for every head where there is a mask, which is
    a third of the time that sampling takes on a CPU.
    """
    grouped = query.view(len(query), key.shape[1], -1, query.shape[3])
    out = F.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(len(query), 1, query.shape[1], query.shape[3])
