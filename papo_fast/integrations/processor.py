"""A checkpoint's processor for trainers that ask for one, without its video part.

`AutoProcessor` of the Qwen-VL families needs torchvision for videos. Pictures do not.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from papo_fast.config import DataConfig, ModelConfig
from papo_fast.data.plain_encoder import PlainEncoder, pictures_only
from papo_fast.model.choice import load_encoder
from papo_fast.rewards.reading import end_of_prompt


def load_processor(
    path: str | Path,
    *,
    min_pixels: int = DataConfig.min_pixels,
    max_pixels: int = DataConfig.max_pixels,
) -> ProcessorMixin:
    """Tokenizer, chat template and image processor of any checkpoint that can be trained.

    Smaller pictures are enlarged to `min_pixels`, larger ones shrunk to `max_pixels`; the defaults
    are PAPO's. Processors that make tiles have sizes of their own. Padding is on the left, as
    generation needs it. Raises `InputError` as `PromptEncoder` does.
    """
    limits = DataConfig(min_pixels=min_pixels, max_pixels=max_pixels)
    encoder = load_encoder(ModelConfig(path=str(path)), limits)
    tokenizer = encoder.tokenizer
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    if isinstance(encoder, PlainEncoder):
        return encoder.processor
    made = pictures_only(PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(path))])
    return made(
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
