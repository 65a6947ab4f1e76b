"""Corrupted pictures: black out a share of a picture's patches (PAPO, arXiv 2507.06448, section 3).

`patch` blackens rows of the processed pixels, so a corrupted patch is exactly one input of the
vision tower and no other patch changes. `official` is the authors' way: squares of the raw image,
blackened before the processor resizes it, so its squares and the patches do not line up. Noise and
blur are in `papo_fast.data.noise`, boxes of evidence in `papo_fast.data.boxes`. The kind
`attention` changes no picture: text does not see it (PGPO, arXiv 2604.01840).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from papo_fast.corruption_settings import (
    CORRUPTIONS,
    OF_BOXES,
    CorruptionConfig,
    load_corruption,
)
from papo_fast.data.boxes import BoxCorruption, boxes_of, check_column
from papo_fast.data.encoded import EncodedPrompt, Later
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.noise import (
    BlurCorruption,
    DiffusionCorruption,
    GaussianCorruption,
    diffusion_step,
)
from papo_fast.data.patch_grid import PatchGrid, black_pixel
from papo_fast.data.pictures import to_rgb
from papo_fast.data.plain_encoder import PlainPrompt
from papo_fast.data.prompts import Prompt
from papo_fast.data.tiles import Tiles, block_of
from papo_fast.errors import InputError


class Corruption(Protocol):
    """What turns a prompt's processed images into corrupted ones; `PatchCorruption` is one.

    Any callable of this shape will do: noise, blur, another image's patches.
    """

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor, seed: int) -> Tensor:
        """(P, C*T*p*p) rows of all images and (I, 3) int64 grids → corrupted (P, C*T*p*p).

        On the plain path the pixels may be tiles (…, C, H, W), and there is then no grid (None).
        """
        ...


class ImageCorruption(Protocol):
    """What corrupts a prompt's raw images before the processor; `OfficialCorruption` is one."""

    def __call__(self, images: Sequence[Image.Image], seed: int) -> list[Image.Image]: ...


def prompt_seed(seed: int, step_or_epoch: int, prompt_index: int) -> int:
    """The corruption's seed, in [0, 2⁶³): one per prompt and step, so that G responses share it.

    A hash that is the same on every machine and Python, and far apart for neighbouring prompts.
    """
    text = f"{seed},{step_or_epoch},{prompt_index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def choose_patches(
    n_patches: Sequence[int],
    ratio: float,
    seed: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which patches of a prompt's images to corrupt: (ΣP,) bool, True at round(ratio × P) of each.

    The order is that of `n_patches` and of the rows of `pixel_values`. One seed draws for all
    images, and what it draws for the first does not depend on how many follow. It is drawn on the
    CPU, so that a seed means the same patches on every device.
    """
    _check_ratio(ratio)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for n in n_patches:
        of_image = torch.zeros(n, dtype=torch.bool)
        of_image[torch.randperm(n, generator=generator)[: round(ratio * n)]] = True
        chosen.append(of_image)
    if not chosen:
        return torch.zeros(0, dtype=torch.bool, device=device)
    return torch.cat(chosen).to(device)


def blacken_patches(
    pixel_values: Tensor, chosen: Tensor, black: Tensor, temporal_patch_size: int, patch_size: int
) -> Tensor:
    """A copy of `pixel_values` in which the rows where `chosen` is True are black.

    Args:
        pixel_values: (P, C*T*p*p) float, patches of one or more images as the Qwen-VL image
            processors write them: one patch per row in groups of merge × merge neighbours, and
            within a row channel by channel.
        chosen: (P,) bool.
        black: (C,) the value of a black pixel after normalisation, (0 − mean) / std.
        temporal_patch_size: T, frames per patch.
        patch_size: p, pixels per side of a patch.

    Raises:
        InputError: the shapes do not fit each other.
    """
    n, width = pixel_values.shape
    per_channel = temporal_patch_size * patch_size**2
    if chosen.shape != (n,) or chosen.dtype != torch.bool:
        raise InputError(
            f"chosen has shape {tuple(chosen.shape)} and dtype {chosen.dtype}: expected ({n},) "
            "bool, one per row of pixel_values"
        )
    if width != black.numel() * per_channel:
        raise InputError(
            f"pixel_values has rows of {width} numbers: expected {black.numel()} channels × "
            f"{temporal_patch_size} frames × {patch_size}² pixels = {black.numel() * per_channel}"
        )
    row = black.to(pixel_values).repeat_interleave(per_channel)
    return torch.where(chosen.to(pixel_values.device)[:, None], row, pixel_values)


@dataclass(frozen=True)
class PatchCorruption:
    """The kind `patch` as a `Corruption`: whole patches of the processor's own grid turn black."""

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
        return cls(
            ratio,
            black_pixel(image_processor),
            image_processor.temporal_patch_size,
            image_processor.patch_size,
        )

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor, seed: int) -> Tensor:
        counts = image_grid_thw.prod(-1).tolist()
        chosen = choose_patches(counts, self.ratio, seed, pixel_values.device)
        return blacken_patches(
            pixel_values, chosen, self.black, self.temporal_patch_size, self.patch_size
        )


@dataclass(frozen=True)
class TileCorruption:
    """The kind `patch` for pictures that are tiles: blocks of the model's patch size turn black."""

    ratio: float
    """Share of each tile's blocks that are no padding, in [0, 1]."""
    tiles: Tiles

    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor | None, seed: int) -> Tensor:
        """(…, C, H, W) pixels → the same with black blocks; there is no grid."""
        real = self.tiles.real_blocks(pixel_values)
        counts = real.sum((1, 2)).tolist()
        chosen = torch.zeros_like(real)
        chosen[real] = choose_patches(counts, self.ratio, seed, pixel_values.device)
        return self.tiles.blacken(pixel_values, chosen)


def corruption_of(
    image_processor: Any, model_config: Any, ratio: float
) -> PatchCorruption | TileCorruption:
    """The kind `patch` for the pixels that an image processor of transformers writes.

    Raises `InputError` where it lays pictures out in a way that no corruption knows.
    """
    if hasattr(image_processor, "merge_size"):
        return PatchCorruption.of(image_processor, ratio)
    _check_ratio(ratio)
    black = image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    return TileCorruption(ratio, Tiles.of(black["pixel_values"], block_of(model_config)))


@dataclass(frozen=True)
class OfficialCorruption:
    """The kind `official` as an `ImageCorruption`: squares of each raw image turn black."""

    ratio: float
    """Probability with which a square turns black, in [0, 1]."""
    square: int = 14
    """Side of a square in pixels of the raw image."""

    def __call__(self, images: Sequence[Image.Image], seed: int) -> list[Image.Image]:
        generator = np.random.Generator(np.random.PCG64(seed))
        return [_blacken_squares(image, self.ratio, generator, self.square) for image in images]


def _blacken_squares(
    image: Image.Image, ratio: float, generator: np.random.Generator, square: int
) -> Image.Image:
    _check_ratio(ratio)
    # A copy, and in RGB: zero is not black in a palette, and is transparent with an alpha channel.
    pixels = np.array(to_rgb(image))
    height, width = pixels.shape[:2]
    grid = (math.ceil(height / square), math.ceil(width / square))
    black = generator.random(grid) < ratio
    pixels[black.repeat(square, 0)[:height].repeat(square, 1)[:, :width]] = 0
    return Image.fromarray(pixels)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise InputError(f"corruption.ratio is {ratio}: it must be between 0 and 1")


@dataclass(frozen=True)
class _Own:
    """A corruption of the user's, which gets copies, and whose result is looked at."""

    name: str
    """With its setting, for messages."""
    function: Callable[..., Any]

    def of_pixels(self, pixel_values: Tensor, image_grid_thw: Tensor | None, seed: int) -> Tensor:
        grid = None if image_grid_thw is None else image_grid_thw.clone()
        found = self.function(pixel_values.clone(), grid, seed)
        shape = tuple(pixel_values.shape)
        if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
            got = (
                f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else repr(found)
            )
            raise InputError(
                f"{self.name} returned {got:.200}, expected a tensor {shape} of "
                "floating-point numbers, as pixel_values is"
            )
        return found.detach().to(pixel_values)

    def of_images(self, images: Sequence[Image.Image], seed: int) -> list[Image.Image]:
        found = self.function([image.copy() for image in images], seed)
        sizes = [image.size for image in images]
        if not isinstance(found, Sequence) or [getattr(x, "size", None) for x in found] != sizes:
            raise InputError(
                f"{self.name} returned {found!r:.200}, expected a list of "
                f"{len(sizes)} pictures of the sizes {sizes}"
            )
        return [to_rgb(image) for image in found]


class PromptCorruption:
    """(prompt, seed) → pixels of the `aug` stream, of the same shape as the prompt's own.

    Args:
        config: which corruption, and its numbers.
        encoder: the model's image processor.
        pixels, images: a corruption of one's own, of processed patches or of raw images, in place
            of the one `config` names.
        setting: whose value its kind is, for messages.
    """

    def __init__(
        self,
        config: CorruptionConfig,
        encoder: PromptEncoder,
        *,
        pixels: Corruption | None = None,
        images: ImageCorruption | None = None,
        setting: str = "corruption.kind",
    ):
        self.config = config
        self.encoder = encoder
        self.kind = "own" if pixels or images else config.kind
        self.on_images = images
        self.on_pixels = pixels
        self.on_boxes: BoxCorruption | None = None
        if self.kind in CORRUPTIONS:
            self._built_in()
        elif self.kind != "own":
            function, on = load_corruption(config.kind, setting)
            own = _Own(f"{setting}: {config.kind}", function)
            self.on_pixels = own.of_pixels if on == "pixels" else None
            self.on_images = own.of_images if on == "images" else None

    def _built_in(self) -> None:
        config, processor, tiles = self.config, self.encoder.image_processor, self.encoder.tiles
        if self.kind in self.encoder.not_corrupted_by:
            raise InputError(
                f"corruption.kind is {self.kind}, which the plain path does not have for the "
                f"pictures of {self.encoder.model_path}: use patch, official, gaussian, diffusion "
                "or blur"
            )
        if self.kind == "official":
            self.on_images = OfficialCorruption(config.ratio)
        elif self.kind == "patch":
            if tiles is None:
                self.on_pixels = PatchCorruption.of(processor, config.ratio)
            else:
                self.on_pixels = TileCorruption(config.ratio, tiles)
        elif self.kind == "gaussian":
            self.on_pixels = GaussianCorruption(config.noise_std)
        elif self.kind == "blur":
            self.on_pixels = BlurCorruption(config.blur_sigma, tiles or PatchGrid.of(processor))
        elif self.kind in OF_BOXES:
            black, grid = black_pixel(processor), PatchGrid.of(processor)
            place: Literal["evidence", "control"]
            place = "evidence" if self.kind == "evidence" else "control"
            self.on_boxes = BoxCorruption(place, config.box_fill, black, grid)

    def _diffusion(self, progress: float) -> ImageCorruption:
        config = self.config
        return DiffusionCorruption(diffusion_step(config.noise_step, config.noise_anneal, progress))

    def check(self, columns: Collection[str]) -> None:
        """Raise `InputError` where it needs a column that the data does not have."""
        if self.on_boxes is not None:
            check_column(columns, self.config.boxes_key)

    def check_row(self, prompt: Prompt) -> None:
        """Raise `InputError` where the prompt's row does not hold what it needs."""
        if self.on_boxes is not None:
            boxes_of(prompt, self.config.boxes_key, self.on_boxes.grid)

    def __call__(self, prompt: Prompt, seed: int, progress: float = 0.0) -> Tensor | None:
        """(P, C*T*p*p) float32; None for a prompt without pictures, or whose text sees none.

        Args:
            progress: share of the run that is done, for noise that falls over it.
        """
        encoded = prompt.encoded
        if not encoded.has_pictures or self.kind == "attention":
            return None
        if self.takes_pictures:
            corrupted, _ = self.encoder.process_images(self.pictures(prompt, seed, progress))
            return corrupted
        pixels: Any = encoded.pixel_values
        grid: Any = encoded.image_grid_thw  # None where pictures are tiles
        if self.on_boxes is not None:
            boxes = boxes_of(prompt, self.config.boxes_key, self.on_boxes.grid)
            return self.on_boxes(pixels, grid, boxes, seed)
        assert self.on_pixels is not None
        corrupted = self.on_pixels(pixels, grid, seed)
        tiles = self.encoder.tiles
        return corrupted if tiles is None else tiles.keep_padding(pixels, corrupted)

    @property
    def takes_pictures(self) -> bool:
        """Whether it changes raw pictures, and not what a processor has made of them."""
        return self.kind == "diffusion" or self.on_images is not None

    def pictures(self, prompt: Prompt, seed: int, progress: float = 0.0) -> list[Image.Image]:
        """The prompt's corrupted pictures as they are before the processor.

        Raises `InputError` where it changes what the processor has made of them.
        """
        if not self.takes_pictures:
            raise InputError(
                f"corruption.kind is {self.kind}, which changes what the image processor of "
                f"{self.encoder.model_path} has made of a picture, so that vLLM cannot be given "
                "the corrupted picture: use official or diffusion"
            )
        on_images = self._diffusion(progress) if self.kind == "diffusion" else self.on_images
        assert on_images is not None
        return on_images(prompt.images, seed)

    def prompt(self, prompt: Prompt, seed: int) -> Prompt:
        """The prompt with corrupted pictures, to sample from; without any for `attention`."""
        encoded = prompt.encoded
        if not encoded.has_pictures:
            return prompt
        if self.kind == "attention":
            return replace(prompt, encoded=without_pictures(encoded))
        changed: dict[str, Any] = {"pixel_values": Later(partial(self, prompt, seed))}
        if isinstance(encoded, PlainPrompt):
            changed["images"] = partial(self.pictures, prompt, seed)
        return replace(prompt, encoded=replace(encoded, **changed))

    def picture(self, prompt: Prompt, seed: int) -> Image.Image | None:
        """The first corrupted picture as the model gets it, for people to look at."""
        pixels, grid = self(prompt, seed), prompt.encoded.image_grid_thw
        if pixels is None:
            return None
        first: Any = None if grid is None else grid[:1]
        return self.encoder.to_images(pixels, first)[0]


def without_pictures(encoded: EncodedPrompt) -> EncodedPrompt:
    """The prompt's text alone; the tokens in front of and behind a picture stay."""
    text = encoded.mm_token_type_ids == 0
    return EncodedPrompt(encoded.input_ids[text], encoded.mm_token_type_ids[text], None, None)
