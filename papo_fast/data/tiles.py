"""Pictures as tiles: (…, C, H, W) pixels, as every processor but Qwen's and its kin lays them out.

A picture may be one tile, or be cut into several and stand before or behind them as a whole
(InternVL, Gemma's pan-and-scan, Idefics3, LLaVA-OneVision). Tiles that only pad a batch, and what
a picture does not fill of its tile, are exactly 0. They stay 0: models tell padding by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from papo_fast.errors import InputError

DEFAULT_BLOCK = 14
"""Side of a block in pixels where the model's patch size cannot be known."""


@dataclass(frozen=True)
class Tiles:
    """What corruption has to know of tiles; it has the methods of `PatchGrid` that they share."""

    block: int
    """Pixels per side of a block: the model's patch size."""
    black: Tensor
    """(C,) the value of a black pixel after normalisation."""

    @classmethod
    def of(cls, black_picture: Tensor, block: int) -> Tiles:
        """Read off a black picture of at least 64x64 pixels as its processor writes it.

        Raises `InputError` where that is no tiles of three channels, each larger than a block.
        """
        shape = tuple(black_picture.shape)
        if len(shape) < 4 or shape[-3] != 3 or min(shape[-2:]) <= block:
            raise InputError(
                f"the processor lays a picture out as {shape}, which no corruption knows: expected "
                "rows of patches with image_grid_thw, or tiles (…, 3, H, W) larger than a patch"
            )
        height, width = shape[-2:]
        return cls(block, _flat(black_picture)[0, :, height // 2, width // 2].clone())

    def pictures(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> list[Tensor]:
        """(…, C, H, W) → each tile as a picture (1, C, H, W); there is no grid."""
        return list(_flat(pixel_values).split(1))

    def rows(self, pictures: Sequence[Tensor]) -> Tensor:
        """What `pictures` returned, as (tiles, C, H, W)."""
        return torch.cat(list(pictures))

    def real_blocks(self, pixel_values: Tensor) -> Tensor:
        """(tiles, rows, columns) bool, False at blocks that are padding."""
        there = (_flat(pixel_values) != 0).any(1, keepdim=True).float()
        return F.max_pool2d(there, self.block, ceil_mode=True)[:, 0] > 0

    def keep_padding(self, pixel_values: Tensor, corrupted: Tensor) -> Tensor:
        """`corrupted` in the shape of `pixel_values`, the blocks of padding as they were."""
        real = self._per_pixel(self.real_blocks(pixel_values), pixel_values)
        flat = _flat(pixel_values)
        return torch.where(real, corrupted.view_as(flat), flat).view_as(pixel_values)

    def blacken(self, pixel_values: Tensor, chosen: Tensor) -> Tensor:
        """A copy of `pixel_values`, black at the blocks where `chosen` (tiles, rows, columns) is.

        Raises `InputError` where the shapes do not fit each other.
        """
        flat = _flat(pixel_values)
        if flat.shape[1] != self.black.numel():
            raise InputError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: expected (…, "
                f"{self.black.numel()}, H, W)"
            )
        at = self._per_pixel(chosen, pixel_values)
        black = self.black.to(flat)[:, None, None]
        return torch.where(at, black, flat).view_as(pixel_values)

    def _per_pixel(self, blocks: Tensor, pixel_values: Tensor) -> Tensor:
        height, width = pixel_values.shape[-2:]
        of_pixels = blocks.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)
        return of_pixels[:, None, :height, :width]


def block_of(config: Any) -> int:
    """Pixels per side of a patch of a model's vision tower, from its configuration.

    `DEFAULT_BLOCK` where it does not say.
    """
    vision = getattr(config, "vision_config", None)
    size = getattr(vision, "patch_size", DEFAULT_BLOCK)
    size = size[0] if isinstance(size, list | tuple) else size
    return size if isinstance(size, int) and size > 0 else DEFAULT_BLOCK


def _flat(pixel_values: Tensor) -> Tensor:
    if pixel_values.ndim < 3:
        raise InputError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: expected tiles (…, C, H, W)"
        )
    return pixel_values.reshape(-1, *pixel_values.shape[-3:])
