"""Corrupted images against what the image processor makes of images blackened by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from papo_fast.data.corruption import (
    OfficialCorruption,
    PatchCorruption,
    blacken_patches,
    choose_patches,
    prompt_seed,
)
from papo_fast.errors import InputError


def picture(width, height, seed=0):
    """Noise without any black pixel."""
    noise = np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def process(images, patch_size):
    processor = Qwen2VLImageProcessorPil(patch_size=patch_size, do_resize=False)
    out = processor(images, return_tensors="pt")
    mean, std = (torch.tensor(v) for v in (processor.image_mean, processor.image_std))
    return out["pixel_values"], out["image_grid_thw"], -mean / std


def blackened(image, mask, patch_size, merge=2):
    """`image` with the squares black whose rows `mask` names, rows counted in merge groups."""
    pixels = np.array(image)
    row = 0
    for top in range(0, image.height, merge * patch_size):
        for left in range(0, image.width, merge * patch_size):
            for dy in range(merge):
                for dx in range(merge):
                    y, x = top + dy * patch_size, left + dx * patch_size
                    if mask[row]:
                        pixels[y : y + patch_size, x : x + patch_size] = 0
                    row += 1
    assert row == len(mask)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("patch_size", [14, 16], ids=["qwen2-vl", "qwen3-vl"])
@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_patch_corruption_blackens_exactly_the_processors_patches(patch_size, ratio):
    image = picture(6 * patch_size, 4 * patch_size)
    clean, grid, black = process([image], patch_size)
    corrupted = PatchCorruption(ratio, black, 2, patch_size)(clean, grid, seed=5)
    mask = choose_patches([24], ratio, seed=5)
    expected, _, _ = process([blackened(image, mask, patch_size)], patch_size)
    torch.testing.assert_close(corrupted, expected, rtol=0, atol=1e-6)


def test_images_of_one_prompt_get_masks_of_their_own():
    images = [picture(56, 28, seed=1), picture(56, 28, seed=2), picture(28, 84, seed=3)]
    clean, grid, black = process(images, 14)
    corrupted = PatchCorruption(0.5, black, 2, 14)(clean, grid, seed=5)
    masks = choose_patches([8, 8, 12], 0.5, seed=5).split([8, 8, 12])
    assert [int(m.sum()) for m in masks] == [4, 4, 6]
    assert not torch.equal(masks[0], masks[1])
    expected, _, _ = process([blackened(i, m, 14) for i, m in zip(images, masks, strict=True)], 14)
    torch.testing.assert_close(corrupted, expected, rtol=0, atol=1e-6)


def test_the_input_is_left_alone():
    clean, _, black = process([picture(56, 56)], 14)
    before = clean.clone()
    corrupted = blacken_patches(clean, torch.ones(16, dtype=torch.bool), black, 2, 14)
    assert torch.equal(clean, before)
    assert not torch.equal(corrupted, before)
    untouched = blacken_patches(clean, torch.zeros(16, dtype=torch.bool), black, 2, 14)
    untouched += 1
    assert torch.equal(clean, before)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("n", [1, 7, 24, 1000])
def test_fraction_is_exact(n, ratio):
    assert int(choose_patches([n], ratio, seed=3).sum()) == round(ratio * n)


def test_every_patch_is_hit_equally_often():
    hits = sum(choose_patches([20], 0.6, seed).double() for seed in range(2000)) / 2000
    assert (hits - 0.6).abs().max() < 0.05  # 4.5 standard deviations


def test_one_mask_per_prompt_shared_by_its_group():
    def mask(step, prompt):
        return choose_patches([100], 0.6, prompt_seed(0, step, prompt))

    for _response in range(4):
        assert torch.equal(mask(3, 8), mask(3, 8))
    others = [mask(3, 9), mask(4, 8), mask(3, 7), mask(8, 3)]
    assert all(not torch.equal(mask(3, 8), other) for other in others)


def test_prompt_seeds_do_not_collide_and_are_stable():
    seeds = {prompt_seed(s, t, p) for s in range(3) for t in range(-3, 30) for p in range(-5, 60)}
    assert len(seeds) == 3 * 33 * 65
    assert min(seeds) >= 0 and max(seeds) < 2**63
    assert prompt_seed(0, 1, 2) == 4_727_102_316_523_150_270  # old runs can be repeated


def test_the_first_images_mask_does_not_depend_on_the_others():
    assert torch.equal(choose_patches([30, 40], 0.5, 1)[:30], choose_patches([30], 0.5, 1))


def test_official_mask_blackens_whole_squares_of_the_raw_image():
    image = picture(14 * 10 + 5, 14 * 7 + 3)
    clean, corrupted = np.array(image), np.array(OfficialCorruption(0.6)([image], 4)[0])
    assert corrupted.shape == clean.shape
    states = set()
    for y in range(0, clean.shape[0], 14):
        for x in range(0, clean.shape[1], 14):
            new, old = corrupted[y : y + 14, x : x + 14], clean[y : y + 14, x : x + 14]
            black, kept = (new == 0).all(), (new == old).all()
            assert black != kept
            states.add(bool(black))
    assert states == {True, False}


def test_official_share_varies_around_the_ratio():
    shares = [
        float((np.array(OfficialCorruption(0.6)([picture(280, 280)], seed)[0]) == 0).mean())
        for seed in range(40)
    ]
    assert np.mean(shares) == pytest.approx(0.6, abs=0.02)
    assert len(set(shares)) > 5  # a coin per square, not a fixed number of squares


def test_official_mask_at_ratio_zero_and_one():
    image = picture(50, 40)
    assert np.array_equal(np.array(OfficialCorruption(0.0)([image], 1)[0]), np.array(image))
    assert not np.array(OfficialCorruption(1.0)([image], 1)[0]).any()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_official_mask_is_black_in_every_image_mode(mode):
    image = picture(28, 28).convert(mode)
    before = image.tobytes()
    assert not np.array(OfficialCorruption(1.0)([image], 0)[0]).any()
    assert OfficialCorruption(1.0)([image], 0)[0].mode == "RGB"
    assert image.tobytes() == before


def test_official_images_of_one_prompt_get_masks_of_their_own():
    image = picture(140, 140)
    first, second = OfficialCorruption(0.5)([image, image], seed=1)
    assert first.tobytes() != second.tobytes()
    assert first.tobytes() == OfficialCorruption(0.5)([image], 1)[0].tobytes()


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match=r"corruption\.ratio is 1\.5"):
        choose_patches([10], 1.5, 0)
    with pytest.raises(InputError, match=r"corruption\.ratio is -0\.1"):
        OfficialCorruption(-0.1)([picture(28, 28)], 0)[0]
    pixels = torch.zeros(4, 3 * 2 * 14 * 14)
    with pytest.raises(InputError, match=r"chosen has shape \(5,\)"):
        blacken_patches(pixels, torch.zeros(5, dtype=torch.bool), torch.zeros(3), 2, 14)
    with pytest.raises(InputError, match="rows of 1176 numbers"):
        blacken_patches(pixels, torch.zeros(4, dtype=torch.bool), torch.zeros(3), 2, 16)
