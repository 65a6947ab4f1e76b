"""The model that the comparisons with other trainers run: a random, tiny Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 16_384
"""Words: enough that most of a tiny model's work is the vocabulary's."""


def write_model(folder: Path, **text_settings: Any) -> None:
    """A checkpoint with its processor, the same weights each time.

    Args:
        text_settings: of the language model's configuration, over those of a tiny one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from support.family_checkpoints import spread, write_processor_files

    write_processor_files(folder, "qwen2_5_vl", head_dim=32)
    config = AutoConfig.from_pretrained(folder)
    text = config.text_config
    text.vocab_size = VOCABULARY
    for name, value in text_settings.items():
        setattr(text, name, value)
    if getattr(text, "rope_scaling", None) is None:  # the name before transformers 5
        text.rope_theta = text.rope_parameters["rope_theta"]
        section = text.rope_parameters["mrope_section"]
        text.rope_scaling = {"type": "default", "rope_type": "default", "mrope_section": section}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    spread(model)
    model.save_pretrained(folder)
