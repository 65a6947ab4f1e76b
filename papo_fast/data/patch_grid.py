"""From the rows of `pixel_values`, which are patches, to whole pictures and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class PatchGrid:
    """How the Qwen-VL image processors cut a picture into rows.

    One patch per row in groups of merge × merge neighbours, the groups row by row; within a row
    channel by channel, frame by frame.
    """

    merge: int
    """Patches per side of a group, which make one token."""
    patch: int
    """Pixels per side of a patch."""
    frames: int
    """Frames per patch; those of a still picture are equal."""

    @classmethod
    def of(cls, processor: Any) -> PatchGrid:
        """That of an image processor of transformers, or of a `PromptEncoder`."""
        return cls(processor.merge_size, processor.patch_size, processor.temporal_patch_size)

    def pictures(self, pixel_values: Tensor, image_grid_thw: Tensor) -> list[Tensor]:
        """(P, C*T*p*p) rows → for each (t, h, w) of the grid a picture (t*T, C, h*p, w*p).

        Rows behind the last picture of `image_grid_thw` are left out.
        """
        m, p, frames = self.merge, self.patch, self.frames
        found, start = [], 0
        for t, h, w in image_grid_thw.tolist():
            rows = pixel_values[start : start + t * h * w]
            cut = rows.reshape(t, h // m, w // m, m, m, -1, frames, p, p)
            whole = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
            found.append(whole.reshape(t * frames, -1, h * p, w * p))
            start += t * h * w
        return found

    def rows(self, pictures: Sequence[Tensor]) -> Tensor:
        """What `pictures` returned, as rows again."""
        m, p, frames = self.merge, self.patch, self.frames
        found = []
        for picture in pictures:
            n, channels, height, width = picture.shape
            h, w = height // p, width // p
            whole = picture.reshape(n // frames, frames, channels, h // m, m, p, w // m, m, p)
            cut = whole.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            found.append(cut.reshape(n // frames * h * w, -1))
        return torch.cat(found)


def black_pixel(image_processor: Any) -> Tensor:
    """(C,) float32: the value of a black pixel after normalisation, (0 − mean) / std.

    It is read off a Qwen-VL image processor of transformers, so that its rescaling and its
    normalisation cannot be modelled wrongly.
    """
    side = image_processor.patch_size * image_processor.merge_size
    black = Image.fromarray(np.zeros((side, side, 3), np.uint8))
    pixels = image_processor(images=[black], return_tensors="pt")["pixel_values"]
    return pixels[0].reshape(3, -1)[:, 0].clone()
