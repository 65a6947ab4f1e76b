"""A HuggingFace checkpoint as a model on the CPU, in float32, or as an empty shell of it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from papo_fast.config import ModelConfig
from papo_fast.errors import InputError
from papo_fast.model.attention import NAME as TREE_ATTENTION


def load_model(config: ModelConfig, *, empty: bool = False) -> nn.Module:
    """The model of `config.path` in float32 (master weights, see `ModelConfig.dtype`).

    Args:
        empty: without memory or values, on the meta device, for a process that is sent its shard.

    Raises:
        InputError: the model uses what packed groups do not support.
    """
    options = {
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": {"": "sdpa", "text_config": TREE_ATTENTION},
        "dtype": torch.float32,
    }
    if empty:
        settings = AutoConfig.from_pretrained(
            config.path, trust_remote_code=config.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(settings, **options)
    else:
        model = AutoModelForImageTextToText.from_pretrained(config.path, **options)
    text = model.config.text_config
    sliding = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if sliding or text.attention_dropout:
        raise InputError(
            f"model.path = {config.path!r} uses sliding-window attention or attention dropout, "
            "which packed groups do not support: set use_sliding_window to false and "
            "attention_dropout to 0 in its config.json"
        )
    return model
