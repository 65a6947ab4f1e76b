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

    A picture that several sequences share is held once: `pixel_values` and `image_grid_thw` are of
    the distinct pictures, and `image_index` says which of them stands where, in the order of the
    image tokens of the whole batch.

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
    image_index: Tensor | None

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

    def text_inputs(self) -> dict[str, Tensor]:
        """What the model takes besides pictures."""
        return {
            "input_ids": self.input_ids_BS,
            "attention_mask": self.attention_mask_BS,
            "mm_token_type_ids": self.mm_token_type_ids_BS,
        }

    def image_inputs(self) -> dict[str, Tensor]:
        """The distinct pictures as the vision tower takes them; empty without pictures."""
        if self.pixel_values is None:
            return {}
        return {"pixel_values": self.pixel_values, "image_grid_thw": self.image_grid_thw}


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
    if pixel_values is None:
        pixel_values = [p.pixel_values for p in prompts]
    pixels, grids, image_index = _distinct(pixel_values, [p.image_grid_thw for p in prompts])
    return SequenceBatch(
        input_ids_BS=input_ids,
        attention_mask_BS=attention_mask,
        mm_token_type_ids_BS=token_types,
        rows_N=torch.cat(rows),
        targets_N=torch.cat(targets),
        sequence_ids_N=torch.cat(owners),
        pixel_values=pixels,
        image_grid_thw=grids,
        image_index=image_index,
    )


def _distinct(
    pixel_values: Sequence[Tensor | None], grids: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The pictures that differ, and which of them each sequence shows.

    Sequences of one prompt hold the very same tensor; that is what makes pictures equal here.
    """
    first_image: dict[int, int] = {}
    distinct, distinct_grids, index = [], [], []
    n = 0
    for pixels, grid in zip(pixel_values, grids, strict=True):
        if pixels is None:
            continue
        if id(pixels) not in first_image:
            first_image[id(pixels)] = n
            n += len(grid)
            distinct.append(pixels)
            distinct_grids.append(grid)
        start = first_image[id(pixels)]
        index.append(torch.arange(start, start + len(grid)))
    if not distinct:
        return None, None, None
    return torch.cat(distinct), torch.cat(distinct_grids), torch.cat(index)
