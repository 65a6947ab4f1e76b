"""Attention inside pictures: many short sequences, each of which attends to itself alone.

The vision towers of the Qwen families lay all pictures of a batch end to end (Qwen2.5-VL: all
windows of all pictures) and call SDPA once for each of them, some hundreds of times a block.
Under a registered name in which "flash" stands, they hand all to one call instead, with the places
where a picture begins. On a GPU that is one call of a variable-length kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from papo_fast.model.attention import variable_length

# transformers looks for "flash" in the name.
NAME = "papo_flash_pictures"


def picture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """An attention function of transformers' `AttentionInterface`.

    Args:
        query, key, value: (1, H, T, D), the T patches of all pictures or windows end to end.
        attention_mask: None.
        cu_seq_lens_q: (P + 1,) int32, where each of the P begins, and T.
        max_length_q: the most patches of one of them.

    Returns:
        (1, T, H, D), and None for the attention weights.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    kernel = None if dropout else variable_length(query.device.type, query.dtype)
    if kernel is not None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        starts, most = cu_seq_lens_q.to(torch.int32), max_length_q
        found = kernel(q, k, v, starts, starts, most, most, scaling, False)
        return found[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    found = [
        sdpa_attention_forward(
            module, *part, attention_mask, scaling=scaling, dropout=dropout, is_causal=False
        )[0]
        for part in parts
    ]
    return torch.cat(found, dim=1), None


def attend_inside_pictures(model: nn.Module) -> None:
    """Lets the vision tower of a model of transformers attend by `picture_attention`.

    It is set behind loading, where transformers would look for a package of that name.
    """
    model.config.vision_config._attn_implementation = NAME


AttentionInterface.register(NAME, picture_attention)
