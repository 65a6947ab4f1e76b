"""A checkpoint's processor for trainers that ask for one, without its video part.

`AutoProcessor` of the Qwen-VL families needs torchvision for videos. Pictures do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import ProcessorMixin

from papo_fast.config import DataConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.rewards.reading import end_of_prompt

_CLASSES = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


def load_processor(
    path: str | Path,
    *,
    min_pixels: int = DataConfig.min_pixels,
    max_pixels: int = DataConfig.max_pixels,
) -> ProcessorMixin:
    """Tokenizer, chat template and image processor of a Qwen2-VL, 2.5-VL or 3-VL checkpoint.

    Smaller pictures are enlarged to `min_pixels`, larger ones shrunk to `max_pixels`; the defaults
    are PAPO's. Padding is on the left, as generation needs it. Raises `InputError` as
    `PromptEncoder` does.
    """
    encoder = PromptEncoder(path, DataConfig(min_pixels=min_pixels, max_pixels=max_pixels))
    tokenizer = encoder.tokenizer
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    family = transformers.AutoConfig.from_pretrained(path).model_type
    return _without_videos(getattr(transformers, _CLASSES[family]))(
        image_processor=encoder.image_processor,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def prompt_end(processor: ProcessorMixin) -> str:
    """How prompts end that `processor` renders, in text; for the `prompt_end` of a `Scorer`.

    Trainers give rewards the response alone, and a chat template may have opened <think> before it.
    """
    message = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    return end_of_prompt(
        processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    )


def _without_videos(family: type[ProcessorMixin]) -> type[ProcessorMixin]:
    def get_attributes(_cls: type) -> list[str]:
        return ["image_processor", "tokenizer"]

    members: dict[str, Any] = {"get_attributes": classmethod(get_attributes)}
    # the same name, which is what a saved processor says it is
    return type(family.__name__, (family,), members)
