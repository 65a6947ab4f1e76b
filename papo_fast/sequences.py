"""Prompts and responses as padded batches of token sequences, ready for one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class SequenceBatch:
    """B sequences of at most S tokens, padded, with N response tokens among them.

    `rows_N` holds positions in the flattened (B*S,) hidden states: the position *before* each
    response token, whose logits predict it. `targets_N` are those tokens and `sequence_ids_N` says
    which of the B sequences a token belongs to, in order.
    """

    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    mm_token_type_ids_BS: Tensor
    rows_N: Tensor
    targets_N: Tensor
    sequence_ids_N: Tensor
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None

    @property
    def n_tokens(self) -> int:
        return self.targets_N.numel()

    def to(self, device: torch.device) -> SequenceBatch:
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the HuggingFace model's forward pass."""
        inputs = {
            "input_ids": self.input_ids_BS,
            "attention_mask": self.attention_mask_BS,
            "mm_token_type_ids": self.mm_token_type_ids_BS,
        }
        if self.pixel_values is not None:
            inputs |= {"pixel_values": self.pixel_values, "image_grid_thw": self.image_grid_thw}
        return inputs

    def with_pixels(self, pixel_values: Tensor | None) -> SequenceBatch:
        """The same text and responses over other pictures of the same sizes: the aug stream."""
        return replace(self, pixel_values=pixel_values)


def stack_streams(full: SequenceBatch, aug: SequenceBatch) -> dict[str, Tensor]:
    """Model inputs of both streams as one batch of 2B sequences, `full` first."""
    first, second = full.model_inputs(), aug.model_inputs()
    return {name: torch.cat([value, second[name]]) for name, value in first.items()}


def collate(
    prompts: Sequence[EncodedPrompt],
    responses: Sequence[Sequence[int]],
    pad_token_id: int,
    pixel_values: Sequence[Tensor | None] | None = None,
    *,
    left: bool = False,
) -> SequenceBatch:
    """Pad `prompts[i] + responses[i]` to one length.

    Args:
        pixel_values: one per sequence, in place of the prompts' own (the corrupted pictures).
        left: pad on the left, as generation needs it.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    width = max(lengths)
    shape = (len(lengths), width)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    # zeros for the response: Qwen2.5-VL computes wrong positions, silently, where this is missing
    token_types = torch.zeros(shape, dtype=torch.int64)
    rows, targets, owners = [], [], []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens = torch.as_tensor(response, dtype=torch.int64)
        first = width - lengths[i] if left else 0
        start, end = first + len(prompt), first + lengths[i]
        input_ids[i, first:start] = prompt.input_ids
        input_ids[i, start:end] = tokens
        attention_mask[i, first:end] = 1
        token_types[i, first:start] = prompt.mm_token_type_ids
        rows.append(torch.arange(start - 1, end - 1) + i * width)
        targets.append(tokens)
        owners.append(torch.full((len(response),), i, dtype=torch.int64))
    pixels = [p.pixel_values for p in prompts] if pixel_values is None else list(pixel_values)
    pixels = [p for p in pixels if p is not None]
    grids = [p.image_grid_thw for p in prompts if p.image_grid_thw is not None]
    return SequenceBatch(
        input_ids_BS=input_ids,
        attention_mask_BS=attention_mask,
        mm_token_type_ids_BS=token_types,
        rows_N=torch.cat(rows),
        targets_N=torch.cat(targets),
        sequence_ids_N=torch.cat(owners),
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat(grids) if grids else None,
    )
