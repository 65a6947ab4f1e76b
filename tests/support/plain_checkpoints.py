"""Checkpoints of families beyond Qwen's three, small enough to build in a test.

Each has random weights, a tokenizer of bytes and the family's special tokens, and its own processor
without the part for videos.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, SiglipVisionModel

from support.family_checkpoints import CHAT_TEMPLATE, byte_tokenizer, spread

CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "attention_dropout": 0.0,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2,
           "norm_topk_prob": True}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 2}  # fmt: skip
TOWER = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48,
         "out_hidden_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
ROWS = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What its configuration, tokenizer and processor are made of; ids stand as tokens."""

    image: str
    """What the chat template writes for a picture."""
    special: tuple[str, ...]
    text: dict[str, Any]
    vision: dict[str, Any]
    ids: dict[str, str]
    """Keys of config.json whose values are ids of these tokens."""
    image_processor: dict[str, Any]
    processor: str
    top: dict[str, Any] = field(default_factory=dict)
    processor_settings: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    """Attributes of the tokenizer that the processor asks for."""


def glm(experts: dict[str, Any]) -> Family:
    sections = {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    return Family(
        image="<|begin_of_image|><|image|><|end_of_image|>",
        special=("<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|begin_of_video|>",
                 "<|video|>", "<|end_of_video|>"),
        text=TEXT | experts | {"rope_parameters": ROPE | sections},
        vision=TOWER | {"patch_size": 14, "image_size": 56},
        ids={"image_token_id": "<|image|>", "video_token_id": "<|video|>",
             "image_start_token_id": "<|begin_of_image|>",
             "image_end_token_id": "<|end_of_image|>",
             "video_start_token_id": "<|begin_of_video|>",
             "video_end_token_id": "<|end_of_video|>"},
        image_processor=ROWS | {"image_processor_type": "Glm4vImageProcessor"},
        processor="Glm4vProcessor",
    )  # fmt: skip


def qwen(text: dict[str, Any], vision: dict[str, Any]) -> Family:
    return Family(
        image="<|vision_start|><|image_pad|><|vision_end|>",
        special=QWEN,
        text=TEXT | text,
        vision=TOWER | {"patch_size": 16, "num_position_embeddings": 64} | vision,
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>",
             "vision_end_token_id": "<|vision_end|>"},
        image_processor=ROWS | HALF | {"image_processor_type": "Qwen2VLImageProcessor",
                                       "patch_size": 16},
        processor="Qwen3VLProcessor",
    )  # fmt: skip


def idefics(processor: str, size: int) -> Family:
    tiles = tuple(f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5))
    image_processor = {
        "image_processor_type": processor.replace("Processor", "ImageProcessor"),
        "size": {"longest_edge": size},
        "max_image_size": {"longest_edge": 56},
        **HALF,
    }
    return Family(
        image="<image>",
        special=("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>",
                 "<video>", *tiles),
        text=TEXT | {"model_type": "llama"},
        vision=VISION | {"image_size": 56, "patch_size": 14},
        ids={"image_token_id": "<image>", "pad_token_id": "<|endoftext|>"},
        image_processor=image_processor,
        processor=processor,
        top={"scale_factor": 2},
        processor_settings={"image_seq_len": 4},
    )  # fmt: skip


HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "rope_parameters": ROPE
    | {"mrope_section": [1, 1, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5},
}
PLAIN = {
    "gemma3": Family(
        image="<start_of_image>",
        # vLLM looks for the words of one to four line breaks, which Gemma's vocabulary has
        special=("<start_of_image>", "<image_soft_token>", "<end_of_image>",
                 *("\n" * n for n in range(1, 5))),
        text=TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 16,
                     "layer_types": ["sliding_attention", "full_attention"]},
        vision=VISION | {"image_size": 56, "patch_size": 14, "vision_use_head": False},
        ids={"image_token_id": "<image_soft_token>", "boi_token_index": "<start_of_image>",
             "eoi_token_index": "<end_of_image>"},
        image_processor=HALF | {"image_processor_type": "Gemma3ImageProcessor",
                                "size": {"height": 56, "width": 56}, "do_pan_and_scan": True,
                                "pan_and_scan_min_crop_size": 16,
                                "pan_and_scan_max_num_crops": 2,
                                "pan_and_scan_min_ratio_to_activate": 1.2},
        processor="Gemma3Processor",
        top={"mm_tokens_per_image": 4},
        processor_settings={"image_seq_length": 4},
        named={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
               "eoi_token": "<end_of_image>"},
    ),
    "internvl": Family(
        image="<IMG_CONTEXT>",
        special=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        text=TEXT | {"model_type": "qwen2"},
        vision=VISION | {"image_size": [56, 56], "patch_size": [14, 14]},
        ids={"image_token_id": "<IMG_CONTEXT>"},
        image_processor=HALF | {"image_processor_type": "GotOcr2ImageProcessor",
                                "size": {"height": 56, "width": 56}, "crop_to_patches": True,
                                "min_patches": 1, "max_patches": 4},
        processor="InternVLProcessor",
        top={"image_seq_length": 4, "downsample_ratio": 0.5},
        processor_settings={"image_seq_length": 4},
        named={"start_image_token": "<img>", "end_image_token": "</img>",
               "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
    ),
    "smolvlm": idefics("SmolVLMProcessor", 112),
    "idefics3": idefics("Idefics3Processor", 112),
    "llava_onevision": Family(
        image="<image>",
        special=("<image>", "<video>"),
        text=TEXT | {"model_type": "qwen2"},
        vision=VISION | {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14,
                         "vision_use_head": False},
        ids={"image_token_id": "<image>", "video_token_id": "<video>"},
        image_processor=HALF | {"image_processor_type": "LlavaOnevisionImageProcessor",
                                "size": {"height": 56, "width": 56},
                                "image_grid_pinpoints": [[56, 56], [56, 112], [112, 56],
                                                         [112, 112]]},
        processor="LlavaOnevisionProcessor",
        top={"image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112]],
             "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        processor_settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "qwen3_5": qwen(HYBRID, {}),
    "qwen3_5_moe": qwen(HYBRID | EXPERTS | {"shared_expert_intermediate_size": 16}, {}),
    "qwen3_vl_moe": qwen(
        EXPERTS | {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3],
                                              "mrope_interleaved": True}},
        {"deepstack_visual_indexes": [0]},
    ),
    "glm4v": glm({}),
    "glm4v_moe": glm({"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1,
                      "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1,
                      "topk_group": 1}),
}  # fmt: skip


def as_published(model: torch.nn.Module, file: Path) -> None:
    """Names and weights as published checkpoints have them: models made here are saved otherwise.

    Names of a SigLIP tower have a level more, and matrices of Qwen3-VL-MoE's experts are turned.
    """
    deeper = isinstance(getattr(model.model, "vision_tower", None), SiglipVisionModel)
    turned = model.config.model_type == "qwen3_vl_moe"
    if not deeper and not turned:
        return
    published = {}
    for name, weight in load_file(file).items():
        if deeper:
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        if turned and ".mlp.experts." in name:
            weight = weight.transpose(1, 2).contiguous()
        published[name] = weight
    save_file(published, file, metadata={"format": "pt"})


def for_vllm(family: Family) -> Family:
    """The family as vLLM's CPU build takes it.

    That has attention for heads of 32 and more, experts whose widths 32 divides, and new weights
    for a head alone that is not the embedding's weight too.
    """
    text = family.text | {"hidden_size": 64, "head_dim": 32}
    if "mrope_section" in (rope := text.get("rope_parameters", {})):
        sections = [2 * n for n in rope["mrope_section"]]
        text["rope_parameters"] = rope | {"mrope_section": sections}
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if name in text:
            text[name] = 96  # neither it nor its double is the hidden size
    out = {"out_hidden_size": 64} if "out_hidden_size" in family.vision else {}
    top = family.top | {"tie_word_embeddings": False}
    return replace(family, text=text, vision=family.vision | out, top=top)


def write_plain_checkpoint(path: Path, name: str, *, vllm: bool = False) -> Path:
    """A checkpoint of the family as its processor and its model read it.

    Args:
        vllm: of `for_vllm`.
    """
    family = for_vllm(PLAIN[name]) if vllm else PLAIN[name]
    template = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", family.image)
    tokenizer = byte_tokenizer((*CHAT, *family.special), template, family.named)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in family.ids.items()}
    text = family.text | {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(
        name, text_config=text, vision_config=family.vision, **ids, **family.top
    )
    path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        spread(model)
    model.save_pretrained(path)
    as_published(model, path / "model.safetensors")
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(family.image_processor))
    settings = {"processor_class": family.processor, **family.processor_settings}
    (path / "processor_config.json").write_text(json.dumps(settings))
    assert hasattr(transformers, family.processor)
    return path
