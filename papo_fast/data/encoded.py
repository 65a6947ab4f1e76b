"""One prompt as a model takes it, with pictures that are processed where they are first used."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from papo_fast.data.model_folder import first_line
from papo_fast.errors import InputError


class Later:
    """Pixels that are made when they are asked for.

    A picture of a million pixels is 20 MiB of patches and takes 70 ms to make. Of several processes
    each makes those of its own share, and none holds those of others.

    Args:
        make: returns the pixels, or None.
        keep: hold them from then on. Else they are made once for all who hold them at a time.
    """

    def __init__(self, make: Callable[[], Tensor | None], *, keep: bool = False):
        self._make, self._keep = make, keep
        self._made: Callable[[], Tensor | None] = _nothing

    def __call__(self) -> Tensor | None:
        pixels = self._made()
        if pixels is None and (pixels := self._make()) is not None:
            self._made = partial(_same, pixels) if self._keep else weakref.ref(pixels)
            if self._keep:
                self._make = self._made  # lets go of the pictures
        return pixels

    def __reduce__(self) -> tuple[Any, ...]:
        return _at_once, (self(),)  # another process gets the pixels


def _at_once(pixels: Tensor | None) -> Later:
    return Later(partial(_same, pixels), keep=True)


def _same(pixels: Tensor | None) -> Tensor | None:
    return pixels


def _nothing() -> None:
    return None


class _Pixels:
    """The field `pixel_values`: what is made later is made by reading it."""

    def __get__(self, prompt: EncodedPrompt | None, owner: type) -> Tensor | None:
        if prompt is None:
            raise AttributeError("pixel_values has no default")
        held = vars(prompt)["pixel_values"]
        return held() if isinstance(held, Later) else held

    def __set__(self, prompt: EncodedPrompt, held: Tensor | Later | None) -> None:
        vars(prompt)["pixel_values"] = held


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as the model takes it, unpadded, on the CPU."""

    input_ids: Tensor
    """(L,) int64, every image already expanded to one image-pad id per merged patch."""
    mm_token_type_ids: Tensor
    """(L,) int64, 1 at image tokens, 0 elsewhere. Qwen2.5-VL is silently wrong without it."""
    pixel_values: Tensor | None = _Pixels()  # type: ignore[assignment]
    """(P, C*T*p*p) float32, the normalised patches of all images; None without images. A `Later`
    in its place is asked when the field is read."""
    image_grid_thw: Tensor | None
    """(n, 3) int64, patches per image in time, height and width; None without images."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def has_pictures(self) -> bool:
        """Whether `pixel_values` are some, without making them."""
        return vars(self)["pixel_values"] is not None


def accepted(number: int, image: Image.Image, make: Callable[[Image.Image], Any]) -> Any:
    """What `make` returns for a prompt's image; `InputError` where it refuses it."""
    width, height = image.size
    if width == 0 or height == 0:
        raise InputError(f"image {number} is {width}x{height} pixels; expected at least 1x1")
    try:
        return make(image)
    except Exception as error:
        raise InputError(
            f"image {number} of {width}x{height} pixels is refused by the image processor: "
            f"{first_line(error)}"
        ) from error


def grid_rule(image_processor: Any) -> Callable[[Image.Image], list[int]] | None:
    """What grid (time, height, width) a picture will be cut into, known from its size alone.

    The rule is the `smart_resize` beside the processor's class, which raises `ValueError` for an
    aspect ratio that it refuses. None where there is none, or one with arguments not known here.
    """
    resize = getattr(sys.modules[type(image_processor).__module__], "smart_resize", None)
    if resize is None or not getattr(image_processor, "do_resize", True):
        return None
    patch, frames = image_processor.patch_size, image_processor.temporal_patch_size
    size = image_processor.size
    known = {
        "factor": patch * image_processor.merge_size,
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "num_frames": frames,
        "temporal_factor": frames,
    }
    names = [n for n in inspect.signature(resize).parameters if n not in ("height", "width")]
    if not set(names) <= set(known):
        return None
    options = {name: known[name] for name in names}

    def grid(image: Image.Image) -> list[int]:
        height, width = resize(height=image.height, width=image.width, **options)
        return [1, height // patch, width // patch]

    return grid
