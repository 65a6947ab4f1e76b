"""Corruptions that lose detail everywhere: Gaussian noise, diffusion noise, blur.

Strengths: Gaussian noise of standard deviation 2 on normalised pixels is what VEPO's code says
(arXiv 2606.03937; run, it adds it once for each of 12 responses, which makes 6.9). The schedule of
diffusion noise is that of NoisyRollout (arXiv 2504.13055), which DVRP takes over
(arXiv 2601.06801).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from papo_fast.data.patch_grid import PatchGrid
from papo_fast.data.pictures import to_rgb
from papo_fast.data.tiles import Tiles
from papo_fast.errors import InputError

DIFFUSION_STEPS = 1000


@dataclass(frozen=True)
class GaussianCorruption:
    """The kind `gaussian` as a `Corruption`: each number gets noise of its own, and none is cut
    off, as in VEPO's code."""

    std: float
    """Of the noise, in units of the normalised pixels."""

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor, seed: int) -> Tensor:
        # drawn on the CPU, so that a seed means the same noise on every device
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(pixel_values.shape, generator=generator)
        return pixel_values + self.std * noise.to(pixel_values)


@functools.cache
def _signal_shares() -> np.ndarray:
    """(1000,) ᾱ: the share of the variance that is still the picture's after each step."""
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, DIFFUSION_STEPS))) * (5e-3 - 1e-5) + 1e-5
    return np.cumprod(1 - betas)


def diffusion_step(step: float, anneal: float, progress: float) -> int:
    """The step of the schedule at a share `progress` of the run: DVRP's equation 6.

    ⌊step · sigmoid(anneal · (½ − progress))⌋, or ⌊step⌋ where `anneal` is 0.

    Raises `InputError` for a step outside [0, 999].
    """
    if not 0 <= step < DIFFUSION_STEPS:
        raise InputError(
            f"corruption.noise_step is {step}: it must be between 0 and {DIFFUSION_STEPS - 1}"
        )
    if not anneal:
        return int(step)
    return int(step / (1 + math.exp(-anneal * (0.5 - progress))))


@dataclass(frozen=True)
class DiffusionCorruption:
    """The kind `diffusion` as an `ImageCorruption`: √ᾱ x + √(1 − ᾱ) ε on the raw picture.

    x is the picture in [0, 1], ε standard normal, and the result is cut off at 0 and 1 and rounded
    to 8 bits. ᾱ is that of step 0, 1, … 999 of a schedule whose β go from 1e-5 to 5e-3 along a
    sigmoid.
    """

    step: int

    def __call__(self, images: Sequence[Image.Image], seed: int) -> list[Image.Image]:
        generator = np.random.Generator(np.random.PCG64(seed))
        signal = float(_signal_shares()[self.step])
        noised = []
        for image in images:
            x = np.asarray(to_rgb(image), dtype=np.float32) / 255
            noise = generator.standard_normal(x.shape, dtype=np.float32)
            x = math.sqrt(signal) * x + math.sqrt(1 - signal) * noise
            noised.append(Image.fromarray((x.clip(0, 1) * 255).round().astype(np.uint8)))
        return noised


@dataclass(frozen=True)
class BlurCorruption:
    """The kind `blur` as a `Corruption`: whole pictures as the model gets them, convolved with a
    Gaussian, which ends at three standard deviations; beyond its border a picture goes on with its
    outermost pixels. The seed changes nothing."""

    sigma: float
    """Standard deviation in pixels."""
    grid: PatchGrid | Tiles

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor, seed: int) -> Tensor:
        pictures = self.grid.pictures(pixel_values, image_grid_thw)
        return self.grid.rows([self._blurred(picture) for picture in pictures])

    def _blurred(self, picture: Tensor) -> Tensor:
        radius = math.ceil(3 * self.sigma)
        at = torch.arange(-radius, radius + 1, dtype=torch.float64)
        weights = torch.exp(-0.5 * (at / self.sigma) ** 2)
        weights = (weights / weights.sum()).to(picture)
        frames, channels, height, width = picture.shape
        x = picture.reshape(-1, 1, height, width)
        x = F.conv2d(F.pad(x, (radius, radius, 0, 0), "replicate"), weights.view(1, 1, 1, -1))
        x = F.conv2d(F.pad(x, (0, 0, radius, radius), "replicate"), weights.view(1, 1, -1, 1))
        return x.view(frames, channels, height, width)
