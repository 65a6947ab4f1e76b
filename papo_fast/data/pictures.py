"""Pictures of any kind as the eight-bit RGB that a model sees: opened within limits, converted."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

# No others are tried: Pillow would start Ghostscript for EPS, and its rarer decoders are fragile.
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
)
MAX_PIXELS = 89_478_485
"""Pillow's own bound, above which it warns of a decompression bomb; a quarter of a GiB in RGB."""


def read_picture(file: Path | BinaryIO) -> Image.Image:
    """RGB image of the file: turned as its EXIF says, on white, with eight bits per channel.

    Raises `ValueError` for a picture of no or of too many pixels, before it is decoded, and for
    one that has no meaning in RGB; else whatever the decoder raises.
    """
    with warnings.catch_warnings():
        # the bound below is an error, and a damaged picture's warnings tell nobody which it is
        warnings.simplefilter("ignore")
        Image.init()  # knows its formats only then; an old or lean Pillow lacks AVIF
        formats = [name for name in FORMATS if name in Image.OPEN]
        with Image.open(file, formats=formats) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise ValueError(
                    f"it has {width}x{height} pixels, more than the {MAX_PIXELS} that are decoded"
                )
            if width * height == 0:
                raise ValueError(f"it is {width}x{height} pixels")
            deep = any(";16" in str(tile[3]) for tile in opened.tile)
            if deep and opened.mode in ("RGB", "L") and "transparency" in opened.info:
                # Pillow keeps eight bits of a sample and sixteen of the transparent colour
                raise ValueError(
                    "it has 16 bits per channel and one transparent colour, which cannot be told "
                    "apart after decoding: save it with an alpha channel"
                )
            return to_rgb(opened)


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy in RGB: turned as its EXIF says, transparency composited on white, depths scaled.

    Sixteen bits are scaled by 65535. 32-bit and float values have no one range: the first of
    [0, 1] (float alone), [0, 255] and [0, 65535] that holds them all goes to black and white, or
    else the range from the least value to the greatest.

    Raises:
        ValueError: the values are not finite, are all one value outside of these ranges, or
            the image's mode has no conversion.
    """
    image.load()
    # Pillow gives the sixteen bits of a PGM as its 32-bit mode
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    # EXIF that cannot be read turns nothing
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image, sixteen)
    if not image.has_transparency_data:
        return image.convert("RGB")
    # La has no way to RGBA of its own
    layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white.convert("RGB")


def _scaled(image: Image.Image, sixteen: bool) -> Image.Image:
    values = np.asarray(image)
    low, high = (0.0, 65535.0) if sixteen else _range_of(values)
    grey = (values.astype(np.float64) - low) * (255 / (high - low))
    grey = np.rint(grey).astype(np.uint8)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey[values == hidden] = 255
    return Image.fromarray(grey).convert("RGB")


def _range_of(values: np.ndarray) -> tuple[float, float]:
    """The values that are black and white."""
    if values.size == 0:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it has values that are not finite")
    whites = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    for white in whites:
        if low >= 0 and high <= white:
            return 0.0, white
    if low == high:
        raise ValueError(f"all its values are {low}, which is neither black nor white")
    return low, high
