"""A Qwen2.5-VL of under a million parameters with its own tokenizer, saved as a checkpoint.

Nothing is downloaded: the tokenizer is trained on the task's questions, the image processor and
the model are transformers' own classes at a small size, and what is saved loads like any
HuggingFace checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from papo_fast.digits.task import CELL, KINDS, draw_question

PAD, END, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "\\boxed{")

# Qwen2.5-VL's own template spends eleven tokens on roles; at this size sequence length is what
# costs time, so the question stands bare between the start and end marks.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|im_start|>"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}"
    "{% endfor %}"
)


def build_tokenizer(problems: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the questions; digits stay single, the tags are one token each.

    Args:
        problems: texts to learn the words from; None: questions of the task `digits`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[^\d\s]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    if problems is None:
        problems = [draw_question(kind, rng).problem for kind in KINDS for _ in range(2000)]
    corpus = [problem.removesuffix("<image>") for problem in problems]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, START, END, *VISION],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(list(TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, *VISION],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL's architecture at hidden size 128, 3 layers, and a vision tower of 64 x 2."""
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.05,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": CELL // 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.05,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )


def build_checkpoint(path: Path, seed: int, problems: Iterable[str] | None = None) -> None:
    """Save an untrained model, tokenizer, image processor and generation config under `path`.

    Args:
        problems: what the tokenizer learns its words from (see `build_tokenizer`).
    """
    tokenizer = build_tokenizer(problems)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(tiny_config(tokenizer))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    Qwen2VLImageProcessorPil(min_pixels=CELL * CELL, max_pixels=CELL * CELL * 64).save_pretrained(
        path
    )
