"""Qwen3.5 in float64: transformers' own source, in which it computes in float32 whatever comes in.

With rounding out of the way, two ways to compute the same must agree to ten digits.
"""

from __future__ import annotations

import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.qwen3_5 import modeling_qwen3_5 as original

from papo_fast.model.attention import NAME
from papo_fast.model.linear_attention import branch_linear_attention
from papo_fast.model.picture_attention import attend_inside_pictures
from support.family_checkpoints import spread


@cache
def library() -> Any:
    """`modeling_qwen3_5` with every float32 in it made float64."""
    source = Path(original.__file__).read_text(encoding="utf-8")
    for single, double in (
        ("torch.float32", "torch.float64"),
        (".float()", ".double()"),
        ("dtype=torch.float)", "dtype=torch.float64)"),
    ):
        assert single in source
        source = source.replace(single, double)
    made = types.ModuleType(f"{original.__name__}_float64")
    made.__package__, made.__file__ = original.__package__, original.__file__
    sys.modules[made.__name__] = made  # where dataclasses look for it
    exec(compile(source, made.__name__, "exec"), vars(made))
    parts = {"qwen3_5_text": made.Qwen3_5TextModel}

    class Local:
        @staticmethod
        def from_config(config: Any) -> Any:
            return parts.get(config.model_type, made.Qwen3_5VisionModel)._from_config(config)

    made.AutoModel = Local
    return made


def hybrid_in_float64(path: Path) -> Any:
    """The model of a checkpoint's config.json with random weights, for packed trees."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(path)
    config.text_config._attn_implementation = NAME
    model = library().Qwen3_5ForConditionalGeneration._from_config(config)
    spread(model)
    attend_inside_pictures(model)
    branch_linear_attention(model)
    return model.double().eval()
