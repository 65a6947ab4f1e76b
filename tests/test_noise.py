"""Noise and blur against their moments and definitions, and pictures cut into patches and back."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from papo_fast.data.noise import (
    BlurCorruption,
    DiffusionCorruption,
    GaussianCorruption,
    diffusion_step,
)
from papo_fast.data.patch_grid import PatchGrid
from papo_fast.errors import InputError


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def processed(images, patch_size=14):
    processor = Qwen2VLImageProcessorPil(patch_size=patch_size, do_resize=False)
    out = processor(images, return_tensors="pt")
    return processor, out["pixel_values"], out["image_grid_thw"]


@pytest.mark.parametrize("patch_size", [14, 16])
def test_rows_become_the_pictures_they_were_cut_from_and_back(patch_size):
    side = 2 * patch_size
    images = [picture(3 * side, 5 * side, 1), picture(side, side, 2), picture(7 * side, side, 3)]
    processor, rows, grid = processed(images, patch_size)
    cut = PatchGrid.of(processor)
    mean, std = (np.array(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    pictures = cut.pictures(rows, grid)
    for image, found in zip(images, pictures, strict=True):
        want = (np.asarray(image).transpose(2, 0, 1) / 255 - mean) / std
        assert found.shape == (2, 3, image.height, image.width)
        np.testing.assert_allclose(found, np.stack([want] * 2), atol=1e-5)
    assert torch.equal(cut.rows(pictures), rows)
    assert len(cut.pictures(rows, grid[:1])) == 1


# --- Gaussian noise -------------------------------------------------------------------------------


def test_gaussian_noise_has_the_moments_of_its_strength():
    clean = torch.linspace(-1.8, 2.2, 400 * 1176).view(400, 1176)
    before = clean.clone()
    noised = GaussianCorruption(2.0)(clean, torch.tensor([[1, 20, 20]]), seed=3)
    noise = (noised - clean).double()
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 * 2 / math.sqrt(n)
    assert noise.std().item() == pytest.approx(2, rel=5 / math.sqrt(2 * n))
    assert (noise**4).mean().item() / 16 == pytest.approx(3, rel=0.02)  # not cut off
    # independent of the picture, and of its neighbour
    assert abs((noise * clean.double()).mean().item()) < 0.02
    assert abs((noise[:, 1:] * noise[:, :-1]).mean().item()) < 0.03
    assert torch.equal(clean, before)


def test_gaussian_noise_is_that_of_its_seed():
    clean, grid = torch.zeros(6, 1176), torch.tensor([[1, 2, 3]])
    noise = GaussianCorruption(1.0)
    assert torch.equal(noise(clean, grid, 5), noise(clean, grid, 5))
    assert not torch.equal(noise(clean, grid, 5), noise(clean, grid, 6))
    assert torch.equal(3 * noise(clean, grid, 5), GaussianCorruption(3.0)(clean, grid, 5))
    assert torch.equal(GaussianCorruption(0.0)(clean + 1, grid, 5), clean + 1)
    assert noise(clean.double(), grid, 5).dtype == torch.float64


# --- diffusion noise ------------------------------------------------------------------------------


def signal_share(step):
    """ᾱ by the recursion of the paper, in Python's floats."""
    share = 1.0
    for i in range(step + 1):
        x = -6 + 12 * i / 999
        share *= 1 - (5e-3 - 1e-5) / (1 + math.exp(-x)) - 1e-5
    return share


def grey(width, height, value=128):
    return Image.fromarray(np.full((height, width, 3), value, np.uint8))


@pytest.mark.parametrize("step", [0, 100, 200, 250])
def test_diffusion_noise_has_the_moments_of_its_step(step):
    """Up to step 250, whose noise of .15 never leaves [0, 1] from a medium grey."""
    noised = np.asarray(DiffusionCorruption(step)([grey(401, 299)], 7)[0]).astype(float) / 255
    share, n = signal_share(step), noised.size
    std = math.sqrt(1 - share + 1 / 12 / 255**2)  # and that of rounding
    assert noised.mean() == pytest.approx(math.sqrt(share) * 128 / 255, abs=5 * std / math.sqrt(n))
    assert noised.std() == pytest.approx(std, rel=5 / math.sqrt(2 * n))
    # colours are noised apart
    assert abs(np.corrcoef(noised[..., 0].ravel(), noised[..., 1].ravel())[0, 1]) < 0.02


def test_the_noise_of_step_250_is_the_one_that_is_published():
    assert math.sqrt(1 - signal_share(250)) == pytest.approx(0.15, abs=0.005)
    found = np.asarray(DiffusionCorruption(250)([grey(300, 300)], 1)[0]) / 255
    assert found.std() == pytest.approx(0.15, abs=0.005)


def test_diffusion_noise_is_cut_off_at_black_and_white():
    share = signal_share(900)
    found = np.asarray(DiffusionCorruption(900)([grey(300, 300, 0)], 1)[0])
    assert (found == 0).mean() == pytest.approx(0.5, abs=0.01)  # all that fell below black
    white = 0.5 * math.erfc((254.5 / 255) / math.sqrt(1 - share) / math.sqrt(2))
    assert (found == 255).mean() == pytest.approx(white, abs=0.01)


def test_diffusion_noise_is_that_of_its_seed_for_pictures_of_any_size_and_mode():
    images = [picture(1, 1), picture(37, 53), picture(53, 37).convert("L"), picture(30, 31)]
    sizes = [image.size for image in images]
    first, again = (DiffusionCorruption(300)(images, 4) for _ in range(2))
    other = DiffusionCorruption(300)(images, 5)
    assert [x.size for x in first] == sizes and {x.mode for x in first} == {"RGB"}
    assert [x.tobytes() for x in first] == [x.tobytes() for x in again]
    assert all(a.tobytes() != b.tobytes() for a, b in zip(first, other, strict=True))
    two = DiffusionCorruption(300)([grey(9, 9), grey(9, 9)], 4)
    assert two[0].tobytes() != two[1].tobytes()


def test_the_step_falls_over_the_run_as_dvrp_says():
    """T_init · sigmoid(γ (½ − t)) with T_init 500 and γ 10."""
    assert [diffusion_step(500, 10, t) for t in (0, 0.5, 1)] == [496, 250, 3]
    assert [diffusion_step(500, 0, t) for t in (0, 0.5, 1)] == [500] * 3
    with pytest.raises(InputError, match=r"corruption\.noise_step is 1000"):
        diffusion_step(1000, 0, 0)


# --- blur -----------------------------------------------------------------------------------------


def blurred(image, sigma):
    processor, rows, grid = processed([image])
    cut, rows = PatchGrid.of(processor), rows.double()
    out = BlurCorruption(sigma, cut)(rows, grid, seed=1)
    return cut.pictures(rows, grid)[0], cut.pictures(out, grid)[0]


def test_the_blur_of_a_point_is_a_gaussian_of_its_sigma():
    pixels = np.zeros((112, 140, 3), np.uint8)
    pixels[56, 70] = 255
    clean, found = blurred(Image.fromarray(pixels), 3.0)
    point = found - clean[..., :1, :1]  # above black
    point = point[0, 0] / point[0, 0].sum()
    y, x = torch.arange(112.0), torch.arange(140.0)
    for at, shares, centre in ((y, point.sum(1), 56), (x, point.sum(0), 70)):
        mean = (at * shares).sum()
        variance = ((at - mean) ** 2 * shares).sum()
        assert mean.item() == pytest.approx(centre, abs=1e-3)
        # a Gaussian that ends at 3 σ has .973 of its variance
        assert variance.item() == pytest.approx(9, rel=0.04)
    assert torch.allclose(point[56, 70 + 6] / point[56, 70], torch.tensor(math.exp(-2)).double(),
                          rtol=1e-3)  # fmt: skip


def test_blur_is_the_convolution_with_the_border_continued():
    """Pixel by pixel in float64, on a picture that is smaller than the Gaussian."""
    clean, found = blurred(picture(28, 84), 4.0)
    at = np.arange(-12, 13)
    weights = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / 32)
    weights /= weights.sum()
    padded = np.pad(clean[1, 2].numpy(), 12, "edge")
    for y, x in ((0, 0), (83, 27), (40, 3), (5, 14)):
        want = (padded[y : y + 25, x : x + 25] * weights).sum()
        assert found[1, 2, y, x].item() == pytest.approx(want, abs=1e-5)


def test_blur_keeps_one_colour_and_knows_no_other_picture():
    _, found = blurred(grey(84, 56, 77), 8.0)
    assert found.std((2, 3)).max() < 1e-5
    processor, rows, grid = processed([grey(56, 56, 0), grey(28, 84, 255)])
    cut = PatchGrid.of(processor)
    assert torch.allclose(BlurCorruption(8.0, cut)(rows, grid, 0), rows, atol=1e-5)
