"""Pictures are processed where they are used, and what is said of them before that is true."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import random
import re

import pytest
import torch
from PIL import Image

from papo_fast.config import DataConfig
from papo_fast.corruption_settings import CorruptionConfig
from papo_fast.data.corruption import PromptCorruption
from papo_fast.data.encoded import EncodedPrompt, Later
from papo_fast.data.encoder import PromptEncoder
from papo_fast.errors import InputError
from papo_fast.samples import Group
from support.family_checkpoints import write_processor_files
from support.groups import as_prompt
from support.plain_checkpoints import write_plain_checkpoint
from support.whole_logits import picture

DATA = DataConfig(
    prompt_suffix="", max_prompt_length=4096, min_pixels=28 * 28, max_pixels=28 * 28 * 64
)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def encoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write = write_plain_checkpoint if request.param == "glm4v" else write_processor_files
    return PromptEncoder(write(folder, request.param), DATA)


@pytest.fixture
def processed(encoder, monkeypatch):
    """Numbers of pictures in the calls of `process_images`."""
    calls, process = [], encoder.process_images

    def counted(images):
        calls.append(len(images))
        return process(images)

    monkeypatch.setattr(encoder, "process_images", counted)
    return calls


def test_a_picture_is_processed_when_it_is_first_used_and_then_kept(encoder, processed):
    images = [picture(90, 70, 1), picture(64, 120, 2)]
    prompt = encoder.encode("<image> or <image>?", images)
    assert len(prompt) and prompt.has_pictures and not processed
    pixels = prompt.pixel_values
    assert processed == [2] and prompt.pixel_values is pixels
    assert dataclasses.replace(prompt).pixel_values is pixels
    text = encoder.encode("no picture", [])
    assert not text.has_pictures and text.pixel_values is None and text.image_grid_thw is None


def test_the_grid_of_any_size_is_what_the_processor_cuts(encoder):
    random.seed(0)
    sizes = [(random.randint(1, 900), random.randint(1, 900)) for _ in range(40)]
    sizes = [(w, h) for w, h in sizes if max(w, h) < 190 * min(w, h)]
    assert len(sizes) > 30
    for width, height in [*sizes, (28, 28), (1, 1), (27, 29), (1500, 9)]:
        image = Image.new("RGB", (width, height))
        prompt = encoder.encode("?", [image])
        pixels, grid = encoder.process_images([image])
        assert torch.equal(prompt.image_grid_thw, grid), (width, height)
        assert torch.equal(prompt.pixel_values, pixels)


def test_a_shape_that_the_processor_refuses_is_refused_at_once(encoder, processed):
    refused = r"image 1 of 900x2 pixels is refused by the image processor: .*aspect ratio"
    with pytest.raises(InputError, match=refused):
        encoder.encode("?", [picture(64, 64, 0), picture(900, 2, 1)])
    with pytest.raises(InputError, match="image 0 is 0x5 pixels"):
        encoder.encode("?", [Image.new("RGB", (0, 5))])
    assert not processed


def test_another_process_gets_the_pixels(encoder, processed):
    prompt = encoder.encode("?", [picture(90, 70, 1)])
    other = pickle.loads(pickle.dumps(prompt))
    assert processed == [1]
    assert torch.equal(other.pixel_values, prompt.pixel_values) and processed == [1]
    group = Group(as_prompt(other), [], Later(functools.partial(torch.ones, 2)))
    assert torch.equal(pickle.loads(pickle.dumps(group)).pixels("aug"), torch.ones(2))


def test_a_processor_that_does_something_else_is_an_error_and_not_a_wrong_model(
    encoder, monkeypatch
):
    prompt = encoder.encode("?", [picture(90, 70, 1)])
    process = encoder.process_images
    monkeypatch.setattr(encoder, "process_images", lambda x: (process(x)[0], process(x)[1] + 1))
    with pytest.raises(InputError, match=re.escape("where its smart_resize says [[1, ")):
        _ = prompt.pixel_values


def test_corrupted_prompts_of_an_evaluation_are_not_held_all_at_once(encoder, processed):
    corrupt = PromptCorruption(CorruptionConfig(), encoder)
    prompt = as_prompt(encoder.encode("?", [picture(90, 70, 1)]))
    corrupted = corrupt.prompt(prompt, 3)
    assert not processed and corrupted.encoded.has_pictures
    assert torch.equal(corrupted.encoded.pixel_values, corrupt(prompt, 3))
    assert not torch.equal(corrupted.encoded.pixel_values, prompt.encoded.pixel_values)
    first = corrupted.encoded.pixel_values
    assert corrupted.encoded.pixel_values is first  # for as long as somebody holds them
    del first
    assert vars(corrupted.encoded)["pixel_values"]._made() is None


def test_what_is_made_later_is_made_once_while_it_is_held():
    made = []

    def make():
        made.append(torch.zeros(2))
        return made.pop()

    kept, passing = Later(make, keep=True), Later(make)
    assert kept() is kept()
    held = passing()
    assert passing() is held
    prompt = EncodedPrompt(torch.zeros(1), torch.zeros(1), kept, None)
    assert prompt.pixel_values is kept() and prompt.has_pictures
    with pytest.raises(TypeError, match="pixel_values"):
        EncodedPrompt(torch.zeros(1), torch.zeros(1))
