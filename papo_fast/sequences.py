"""What the sampler takes and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from papo_fast.processing import EncodedPrompt


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    `token_ids` ends with the end-of-sequence id unless the length limit cut it (`finished` False);
    `logprobs` are the sampler's own, one per token, in nats, at the sampling temperature.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


def pad_left(
    prompts: Sequence[EncodedPrompt], pad_token_id: int, device: torch.device
) -> dict[str, Tensor]:
    """Inputs of `generate`: B prompts padded on the left to one length, and their pictures."""
    width = max(len(p) for p in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    # Qwen2.5-VL computes wrong positions, silently, where this is missing
    token_types = torch.zeros_like(input_ids)
    for i, p in enumerate(prompts):
        start = width - len(p)
        input_ids[i, start:] = p.input_ids
        attention_mask[i, start:] = 1
        token_types[i, start:] = p.mm_token_type_ids
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": token_types,
    }
    pictures = [p for p in prompts if p.pixel_values is not None]
    if pictures:
        inputs["pixel_values"] = torch.cat([p.pixel_values for p in pictures])
        inputs["image_grid_thw"] = torch.cat([p.image_grid_thw for p in pictures])
    return {name: value.to(device) for name, value in inputs.items()}
