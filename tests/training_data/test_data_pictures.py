"""Pictures of any mode, depth and turn become eight-bit RGB; what is no picture is refused."""

import io
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from papo_fast.data.rows import BadSample, open_image


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels_of(value, folder):
    return np.asarray(open_image(value, 0, folder))


def ramp(dtype, top):
    """Grey from black to white, 16 x 16, in values from 0 to `top`."""
    return (np.arange(256).reshape(16, 16) / 255 * top).astype(dtype)


GREY = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, kind) for mode in ("RGBA", "LA") for kind in ("PNG", "WEBP", "TIFF")),
        *((mode, "PNG") for mode in ("P", "RGB", "L")),
    ],
)
def test_a_transparent_picture_equals_its_composite_on_white(folder, mode, kind):
    rng = np.random.default_rng(1)
    if mode in ("RGBA", "LA"):
        shape = (8, 9, len(mode))
        image, options = Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode), {}
        image.putpixel((0, 0), (10, 20, 30, 0)[-len(mode) :])
    else:  # one colour or palette entry is transparent
        image = Image.fromarray(rng.integers(0, 3, (8, 9), np.uint8)).convert(mode)
        if mode == "P":
            image.putpalette([0, 0, 0, 200, 0, 0, 0, 0, 200])
        options = {"transparency": (1, 1, 1) if mode == "RGB" else 1}
    if kind == "WEBP":
        options["lossless"] = options["exact"] = True
    data = encoded(image, kind, **options)
    rgba = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(int)
    alpha = rgba[..., 3:]
    expected = (rgba[..., :3] * alpha + 255 * (255 - alpha)) / 255
    assert (alpha == 0).any()
    got = pixels_of(data, folder)
    assert np.abs(got - expected).max() <= 1
    assert (got[alpha[..., 0] == 0] == 255).all()


def test_a_wholly_transparent_picture_is_white_and_not_black(folder):
    data = encoded(Image.new("RGBA", (5, 5), (0, 0, 0, 0)))
    assert (pixels_of(data, folder) == 255).all()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says(folder, turn, kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # white in the upper left quarter
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(Image.fromarray(stored), kind, exif=exif)
    got = pixels_of(data, folder)
    assert got.shape == upright.shape and np.abs(got.astype(int) - upright).max() < 30


def test_exif_that_cannot_be_read_turns_nothing(folder):
    image = Image.new("RGB", (6, 4), "red")
    data = encoded(image, "PNG", exif=b"Exif\0\0garbage that is no TIFF")
    assert (pixels_of(data, folder) == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("dtype", "top", "kind"),
    [
        (np.uint16, 65535, "PNG"),
        (np.uint16, 65535, "TIFF"),
        (np.uint16, 65535, "PPM"),
        (np.uint16, 65535, "JPEG2000"),
        (np.int32, 255, "TIFF"),
        (np.int32, 65535, "TIFF"),
        (np.int32, 2_000_000_000, "TIFF"),
        (np.float32, 1, "TIFF"),
        (np.float32, 255, "TIFF"),
        (np.float32, 65535, "TIFF"),
        (np.float32, 1e6, "TIFF"),
        (np.float32, 1, "PPM"),
    ],
)
def test_deep_and_float_pictures_are_scaled_by_their_range(folder, dtype, top, kind):
    data = encoded(Image.fromarray(ramp(dtype, top)), kind)
    assert np.abs(pixels_of(data, folder).astype(int) - GREY).max() <= 1


def test_a_dark_picture_of_sixteen_bits_stays_dark(folder):
    data = encoded(Image.fromarray(np.full((4, 4), 514, np.uint16)))
    assert (pixels_of(data, folder) == 2).all()


def test_the_transparent_value_of_sixteen_bits_is_white(folder):
    values = np.array([[1000, 40000]], np.uint16)
    data = encoded(Image.fromarray(values), transparency=1000)
    assert pixels_of(data, folder)[0, :, 0].tolist() == [255, 156]


@pytest.mark.parametrize(
    ("values", "message"),
    [([[0, np.nan]], "not finite"), ([[np.inf, 1]], "not finite"), ([[-5, -5]], "all its values")],
)
def test_float_pictures_without_a_range_are_refused(folder, values, message):
    data = encoded(Image.fromarray(np.array(values, np.float32)), "TIFF")
    with pytest.raises(BadSample, match=message):
        open_image(data, 0, folder)


@pytest.mark.parametrize("kind", ["EPS", "DDS", "ICO", "PCX", "TGA"])
def test_formats_outside_of_the_list_are_refused_unopened(folder, kind, monkeypatch):
    data = encoded(Image.new("RGB", (16, 16)), kind)
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    with pytest.raises(BadSample, match="cannot identify") as caught:
        open_image(data, 0, folder)
    assert caught.value.cause == "image"


@pytest.mark.parametrize("side", [9_500, 13_000, 14_000])
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(folder, side):
    data = encoded(Image.new("1", (side, side)))
    tracemalloc.start()
    with pytest.raises(BadSample, match=r"pixels|decompression bomb"):
        open_image(data, 0, folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_whatever_a_decoder_raises_is_a_bad_sample(folder, kind):
    rng = np.random.default_rng(3)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)), kind)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        with suppress(BadSample):
            cut = bytes(data[: rng.integers(1, len(data) + 1)])
            assert open_image(cut, 0, folder).mode == "RGB"
