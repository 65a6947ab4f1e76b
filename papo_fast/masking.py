"""Corrupted images: black out a share of an image's patches (PAPO, arXiv 2507.06448, section 3).

`patch` blackens rows of the processed pixels, so a corrupted patch is exactly one input of the
vision tower and no other patch changes. `official` is the authors' way: squares of the raw image,
blackened before the processor resizes it, so its squares and the patches do not line up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from papo_fast.errors import InputError


class Corruption(Protocol):
    """What turns a prompt's processed images into corrupted ones; `PatchCorruption` is one.

    Any callable of this shape will do: noise, blur, another image's patches.
    """

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor, seed: int) -> Tensor:
        """(P, C*T*p*p) rows of all images and (I, 3) int64 grids → corrupted (P, C*T*p*p)."""
        ...


class ImageCorruption(Protocol):
    """What corrupts a prompt's raw images before the processor; `OfficialCorruption` is one."""

    def __call__(self, images: Sequence[Image.Image], seed: int) -> list[Image.Image]: ...


def prompt_seed(seed: int, step_or_epoch: int, prompt_index: int) -> int:
    """The mask's seed, in [0, 2⁶³): one per prompt and step, so its G responses share the mask.

    A hash that is the same on every machine and Python, and far apart for neighbouring prompts.
    """
    text = f"{seed},{step_or_epoch},{prompt_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def patch_mask(
    n_patches: int, ratio: float, seed: int, device: torch.device | str | None = None
) -> Tensor:
    """(P,) bool on `device` with exactly round(ratio × P) True, uniformly placed.

    Drawn on the CPU, so that a seed means the same mask on every device.
    """
    return patch_masks([n_patches], ratio, seed, device)


def patch_masks(
    n_patches: Sequence[int],
    ratio: float,
    seed: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """(ΣP,) bool for several images of one prompt, each with its own round(ratio × P) True.

    In the order of `n_patches`, which is that of the rows of `pixel_values`. One seed draws all;
    the first image's mask does not depend on how many follow.
    """
    _check_ratio(ratio)
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for n in n_patches:
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.randperm(n, generator=generator)[: round(ratio * n)]] = True
        masks.append(mask)
    return torch.cat(masks).to(device) if masks else torch.zeros(0, dtype=torch.bool, device=device)


def mask_patches(
    pixel_values: Tensor, mask: Tensor, black: Tensor, temporal_patch_size: int, patch_size: int
) -> Tensor:
    """A copy of `pixel_values` in which the rows where `mask` is True are black.

    Args:
        pixel_values: (P, C*T*p*p) float, patches of one or more images as the Qwen-VL image
            processors write them: one patch per row in groups of merge × merge neighbours, and
            within a row channel by channel.
        mask: (P,) bool.
        black: (C,) the value of a black pixel after normalisation, (0 − mean) / std.
        temporal_patch_size: T, frames per patch.
        patch_size: p, pixels per side of a patch.

    Raises:
        InputError: the shapes do not fit each other.
    """
    n, width = pixel_values.shape
    per_channel = temporal_patch_size * patch_size**2
    if mask.shape != (n,) or mask.dtype != torch.bool:
        raise InputError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: expected ({n},) bool, one "
            "per row of pixel_values"
        )
    if width != black.numel() * per_channel:
        raise InputError(
            f"pixel_values has rows of {width} numbers: expected {black.numel()} channels × "
            f"{temporal_patch_size} frames × {patch_size}² pixels = {black.numel() * per_channel}"
        )
    row = black.to(pixel_values).repeat_interleave(per_channel)
    return torch.where(mask.to(pixel_values.device)[:, None], row, pixel_values)


@dataclass(frozen=True)
class PatchCorruption:
    """The `patch` mask as a `Corruption`: whole patches of the processor's own grid turn black."""

    ratio: float
    """Share of each image's patches, in [0, 1]."""
    black: Tensor
    """(C,) the value of a black pixel after normalisation."""
    temporal_patch_size: int
    patch_size: int

    @classmethod
    def of(cls, image_processor: Any, ratio: float) -> PatchCorruption:
        """For the pixels of a Qwen-VL image processor of transformers."""
        _check_ratio(ratio)
        # Black is read off the processor, so that rescaling and normalisation cannot be modelled
        # wrongly.
        side = image_processor.patch_size * image_processor.merge_size
        black = Image.fromarray(np.zeros((side, side, 3), np.uint8))
        pixels = image_processor(images=[black], return_tensors="pt")["pixel_values"]
        return cls(
            ratio,
            pixels[0].reshape(3, -1)[:, 0].clone(),
            image_processor.temporal_patch_size,
            image_processor.patch_size,
        )

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor, seed: int) -> Tensor:
        counts = image_grid_thw.prod(-1).tolist()
        mask = patch_masks(counts, self.ratio, seed, pixel_values.device)
        return mask_patches(
            pixel_values, mask, self.black, self.temporal_patch_size, self.patch_size
        )


@dataclass(frozen=True)
class OfficialCorruption:
    """The `official` mask as an `ImageCorruption`: squares of each raw image turn black."""

    ratio: float
    """Probability with which a square turns black, in [0, 1]."""
    square: int = 14
    """Side of a square in pixels of the raw image."""

    def __call__(self, images: Sequence[Image.Image], seed: int) -> list[Image.Image]:
        generator = np.random.Generator(np.random.PCG64(seed))
        return [_blacken_squares(image, self.ratio, generator, self.square) for image in images]


def official_mask(image: Image.Image, ratio: float, seed: int, square: int = 14) -> Image.Image:
    """An RGB copy of `image` in which each `square`-pixel square is black with probability `ratio`.

    Squares start at the top left corner; those at the right and bottom may be smaller. As in the
    authors' code the share varies from image to image, unlike `patch_mask`.
    """
    return OfficialCorruption(ratio, square)([image], seed)[0]


def _blacken_squares(
    image: Image.Image, ratio: float, generator: np.random.Generator, square: int
) -> Image.Image:
    _check_ratio(ratio)
    # A copy, and in RGB: zero is not black in a palette, and is transparent with an alpha channel.
    pixels = np.array(image.convert("RGB"))
    height, width = pixels.shape[:2]
    grid = (math.ceil(height / square), math.ceil(width / square))
    black = generator.random(grid) < ratio
    pixels[black.repeat(square, 0)[:height].repeat(square, 1)[:, :width]] = 0
    return Image.fromarray(pixels)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise InputError(f"mask.ratio is {ratio}: it must be between 0 and 1")
