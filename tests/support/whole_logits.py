"""A model's own log-probs of one sequence at a time, to compare packed passes with."""

from __future__ import annotations

import torch
from PIL import Image


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def plain_logits(policy, prompt, response, pixel_values):
    """Float64 log-softmax of one unpadded sequence through the model's own forward."""
    ids = torch.cat([prompt.input_ids, torch.tensor(response)])[None]
    types = torch.cat([prompt.mm_token_type_ids, torch.zeros(len(response), dtype=torch.int64)])
    inputs = {"input_ids": ids, "mm_token_type_ids": types[None]}
    if pixel_values is not None:
        inputs |= {"pixel_values": pixel_values, "image_grid_thw": prompt.image_grid_thw}
    policy.model.model.rope_deltas = None
    with torch.no_grad():
        logits = policy.model(**inputs).logits[0].double() + policy.banned_V.double()
    start = len(prompt)
    return logits[start - 1 : start - 1 + len(response)].log_softmax(-1)
