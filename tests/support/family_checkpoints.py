"""Checkpoint directories of the three model families, small enough to build in a test.

The processor files are laid out as the families' published checkpoints lay them out, which differs:
pixel limits as `min_pixels`/`max_pixels` or as `size`, the chat template in the tokenizer or in a
file of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def byte_tokenizer(
    special: tuple[str, ...] = SPECIAL,
    template: str = CHAT_TEMPLATE,
    named: dict[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """One token per byte, plus a family's special tokens and the thinking tags.

    Args:
        named: attributes of the tokenizer that hold some of the special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special])
    # Special in some checkpoints; decoding must keep them all the same.
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        extra_special_tokens=named or {},
    )


def image_processor_dict(family: str) -> dict[str, Any]:
    shared = {"temporal_patch_size": 2, "merge_size": 2}
    if family == "qwen3_vl":
        return shared | {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216},
            "patch_size": 16,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
    return shared | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12_845_056,
        "patch_size": 14,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }


def family_config(family: str, tokenizer: PreTrainedTokenizerFast, head_dim: int = 16) -> Any:
    """The family's configuration with two layers, two vision blocks, two heads of `head_dim`."""
    width = 2 * head_dim
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "mrope_section": [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16],
        },
    }
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": width, "hidden_size": width, "mlp_ratio": 2, "patch_size": 14}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    vision |= {"hidden_size": width, "intermediate_size": 64, "out_hidden_size": width}
    if family == "qwen2_5_vl":
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    vision |= {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text["head_dim"] = head_dim
    text["rope_parameters"]["mrope_interleaved"] = True  # vLLM goes by it
    return Qwen3VLConfig(text_config=text, vision_config=vision, **ids)


def write_processor_files(path: Path, family: str, head_dim: int = 16) -> Path:
    """config.json, tokenizer, chat template, image processor and generation config; no weights."""
    tokenizer = byte_tokenizer()
    path.mkdir(parents=True, exist_ok=True)
    family_config(family, tokenizer, head_dim).save_pretrained(path)
    tokenizer.save_pretrained(path)
    if family == "qwen2_vl":  # before transformers 5 the template had a JSON file of its own
        (path / "chat_template.jinja").unlink()
        (path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (path / "preprocessor_config.json").write_text(json.dumps(image_processor_dict(family)))
    eos = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return path


def spread(model: torch.nn.Module) -> None:
    """Random weights far from those of uniform answers, so that pictures and positions matter."""
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)


def write_checkpoint(
    path: Path, family: str, generation: dict[str, Any] | None = None, head_dim: int = 16
) -> Path:
    """`write_processor_files` plus random weights, the same each time, and sampling options."""
    write_processor_files(path, family, head_dim)
    options = json.loads((path / "generation_config.json").read_text()) | (generation or {})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
        spread(model)
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps(options))
    return path
