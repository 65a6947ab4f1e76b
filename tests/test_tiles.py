"""Corruption of pictures that are tiles: what turns black, and what is padding."""

import io

import pytest
import torch
from PIL import Image

from papo_fast.config import CorruptionConfig, DataConfig, ModelConfig
from papo_fast.data.corruption import PromptCorruption, TileCorruption
from papo_fast.data.prompts import Prompt
from papo_fast.data.tiles import Tiles, block_of
from papo_fast.errors import InputError
from papo_fast.model.choice import load_encoder
from support.plain_checkpoints import write_plain_checkpoint
from support.small_runs import png

BLACK = torch.tensor([-1.0, -2.0, -3.0])


def test_the_share_of_each_tiles_blocks_turns_black_and_padding_stays():
    pixels = torch.rand(2, 3, 3, 56, 30) + 1
    pixels[1, 2] = 0  # a tile that only pads
    pixels[0, 0, :, 28:] = 0  # a picture that fills the upper half of its tile
    corrupted = TileCorruption(0.5, Tiles(14, BLACK))(pixels, None, 3)
    for tile, was in zip(corrupted.flatten(0, 1), pixels.flatten(0, 1), strict=True):
        blocks = total = 0
        for top in range(0, 56, 14):
            for left in range(0, 30, 14):  # the last column of blocks is 2 pixels wide
                at = (slice(None), slice(top, top + 14), slice(left, left + 14))
                if not was[at].any():
                    assert torch.equal(tile[at], was[at])
                    continue
                total += 1
                if torch.equal(tile[at], was[at]):
                    continue
                assert torch.equal(tile[at], BLACK[:, None, None].expand_as(tile[at]))
                blocks += 1
        assert blocks == round(0.5 * total) and total in (0, 6, 12)


def test_a_seed_means_the_same_blocks_and_another_others():
    pixels = torch.rand(4, 3, 56, 56) + 1
    corrupt = TileCorruption(0.6, Tiles(14, BLACK))
    assert torch.equal(corrupt(pixels, None, 1), corrupt(pixels, None, 1))
    assert not torch.equal(corrupt(pixels, None, 1), corrupt(pixels, None, 2))


def test_the_block_is_the_models_patch():
    class Config:
        vision_config = type("Vision", (), {"patch_size": [16, 16]})

    assert block_of(Config) == 16
    Config.vision_config.patch_size = 12
    assert block_of(Config) == 12
    assert block_of(object()) == 14


@pytest.mark.parametrize(
    "shape", [(40, 1176), (1, 256, 588), (1, 4, 56, 56), (1024, 3, 14, 14)], ids=str
)
def test_an_unknown_layout_is_refused(shape):
    with pytest.raises(InputError, match="lays a picture out as"):
        Tiles.of(torch.zeros(shape), 14)


def test_tiles_of_other_channels_are_refused():
    with pytest.raises(InputError, match="expected"):
        Tiles(14, BLACK).blacken(torch.ones(1, 1, 28, 28), torch.ones(1, 2, 2, dtype=torch.bool))


@pytest.fixture(scope="module")
def idefics(tmp_path_factory):
    path = write_plain_checkpoint(tmp_path_factory.mktemp("tiles") / "idefics3", "idefics3")
    encoder = load_encoder(ModelConfig(path=str(path)), DataConfig())
    return encoder, prompt_of(encoder)


def prompt_of(encoder):
    """Two pictures, which make several tiles each."""
    images = [Image.open(io.BytesIO(png(i, s))) for i, s in enumerate([(64, 64), (120, 30)])]
    return Prompt(0, "", "", "", images, encoder.encode("<image> or <image>?", images))


@pytest.mark.parametrize("kind", ["patch", "official", "gaussian", "diffusion", "blur"])
def test_every_kind_changes_every_tile(kind, idefics):
    encoder, prompt = idefics
    pixels = prompt.encoded.pixel_values
    corrupt = PromptCorruption(CorruptionConfig(kind=kind), encoder)
    corrupted = corrupt(prompt, 5)
    assert corrupted.shape == pixels.shape and torch.isfinite(corrupted).all()
    assert (corrupted != pixels).flatten(2).any(2).all()
    picture = corrupt.picture(prompt, 5)
    assert picture.size == tuple(pixels.shape[-2:])


@pytest.mark.parametrize("kind", ["attention", "evidence", "control"])
def test_kinds_that_tiles_do_not_have_are_refused(kind, idefics):
    with pytest.raises(InputError, match=f"corruption.kind is {kind}, which the plain path"):
        PromptCorruption(CorruptionConfig(kind=kind), idefics[0])


def test_a_corruption_of_ones_own_gets_tiles_and_keeps_padding(idefics):
    encoder, prompt = idefics
    seen = []

    def noise(pixel_values, image_grid_thw, seed):
        seen.append((tuple(pixel_values.shape), image_grid_thw))
        return pixel_values + 10

    corrupted = PromptCorruption(CorruptionConfig(), encoder, pixels=noise)(prompt, 5)
    pixels = prompt.encoded.pixel_values
    assert seen == [(tuple(pixels.shape), None)]
    assert torch.equal(corrupted == 0, pixels == 0)


def test_black_is_what_the_processor_makes_of_black(idefics):
    encoder, _ = idefics
    black = encoder.encode("?", [Image.new("RGB", (112, 112))]).pixel_values
    assert torch.equal(black, encoder.tiles.black[:, None, None].expand_as(black))
