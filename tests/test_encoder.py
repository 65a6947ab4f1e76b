"""Prompts and pictures as the model gets them, and the ids that are never sampled."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from papo_fast.config import DataConfig
from papo_fast.data.encoder import PromptEncoder, PromptTooLong
from papo_fast.data.patch_grid import black_pixel
from papo_fast.digits.model import PAD, VISION, build_checkpoint
from papo_fast.errors import InputError
from papo_fast.model.policy import BANNED_LOGIT, Policy
from papo_fast.rollout.vllm_requests import RequestFormat
from papo_fast.setting_bounds import BOUNDS
from support.encoding import SMALL, padded
from support.family_checkpoints import (
    FAMILIES,
    family_config,
    image_processor_dict,
    write_processor_files,
)


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return write_processor_files(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return PromptEncoder(checkpoint, SMALL)


def text_of(encoder, encoded):
    return encoder.tokenizer.decode(encoded.input_ids, skip_special_tokens=False)


def image_text(n):
    return "<|vision_start|>" + "<|image_pad|>" * n + "<|vision_end|>"


def test_images_stand_in_front_of_a_question_without_placeholders(encoder):
    cell = encoder.patch_size * 2
    encoded = encoder.encode("How many?", [picture(3 * cell, 2 * cell), picture(cell, cell)])
    assert text_of(encoder, encoded) == (
        f"<|im_start|>user\n{image_text(6)}{image_text(1)}How many?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert encoded.image_grid_thw.tolist() == [[1, 4, 6], [1, 2, 2]]


def test_images_go_where_the_placeholders_are(encoder):
    cell = encoder.patch_size * 2
    images = [picture(2 * cell, cell), picture(cell, cell)]
    encoded = encoder.encode("Is <image> more than <image>?", images)
    assert f"user\nIs {image_text(2)} more than {image_text(1)}?<|im_end|>" in text_of(
        encoder, encoded
    )


def test_mm_token_types_mark_exactly_the_image_tokens(encoder):
    encoded = encoder.encode("a <image> b", [picture(84, 56)])
    is_pad = encoded.input_ids == encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert is_pad.any() and not is_pad.all()
    assert torch.equal(encoded.mm_token_type_ids, is_pad.long())


def test_text_only_prompts_carry_no_pixels(encoder):
    encoded = encoder.encode("1 + 1?", [])
    assert encoded.pixel_values is None and encoded.image_grid_thw is None
    assert encoded.mm_token_type_ids.sum() == 0


def test_patches_hold_the_picture_that_went_in(encoder):
    side = encoder.patch_size
    image = picture(3 * 2 * side, 2 * 2 * side)
    pixels, grid = encoder.process_images([image])
    _, rows, columns = grid[0].tolist()
    # (rows/2, columns/2, 2, 2) patches of (C, T, p, p), back to an image
    patches = pixels.reshape(rows // 2, columns // 2, 2, 2, 3, 2, side, side)
    assert torch.equal(patches[..., 0, :, :], patches[..., 1, :, :])
    restored = patches[..., 0, :, :].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * side, -1)
    processor = encoder.image_processor
    std, mean = (
        torch.tensor(v)[:, None, None] for v in (processor.image_std, processor.image_mean)
    )
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal((255 * (restored * std + mean)).round().to(torch.uint8), expected)


def test_black_is_what_a_black_picture_becomes(encoder):
    pixels, _ = encoder.process_images([Image.new("RGB", (140, 96))])
    per_channel = pixels.reshape(len(pixels), 3, -1)
    assert torch.equal(
        per_channel, black_pixel(encoder.image_processor)[None, :, None].expand_as(per_channel)
    )


def test_pixel_limits_of_the_run_replace_the_checkpoints(checkpoint):
    cell = PromptEncoder(checkpoint, SMALL).patch_size * 2
    config = DataConfig(min_pixels=25 * cell**2, max_pixels=36 * cell**2)
    encoder = PromptEncoder(checkpoint, config)
    _, enlarged = encoder.process_images([picture(cell, cell)])
    _, shrunk = encoder.process_images([picture(20 * cell, 20 * cell)])
    assert enlarged.tolist() == [[1, 10, 10]]
    assert shrunk.tolist() == [[1, 12, 12]]


def test_the_model_takes_the_prompt_and_sees_the_picture(checkpoint, encoder):
    torch.manual_seed(0)
    config = family_config(checkpoint_family(checkpoint), encoder.tokenizer)
    model = AutoModelForImageTextToText.from_config(config).eval()

    def last_logits(image):
        encoded = encoder.encode("What is <image>?", [image])
        with torch.no_grad():
            return model(
                input_ids=encoded.input_ids[None],
                mm_token_type_ids=encoded.mm_token_type_ids[None],
                pixel_values=encoded.pixel_values,
                image_grid_thw=encoded.image_grid_thw,
            ).logits[0, -1]

    first, again, other = (last_logits(picture(128, 64, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-4)


def checkpoint_family(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())["model_type"]


def test_an_image_processor_inside_processor_config_is_found(checkpoint, tmp_path):
    family = checkpoint_family(checkpoint)
    path = write_processor_files(tmp_path, family)
    inner = (path / "preprocessor_config.json").read_text()
    (path / "preprocessor_config.json").unlink()
    (path / "processor_config.json").write_text(
        json.dumps({"processor_class": "Processor", "image_processor": json.loads(inner)})
    )
    image = picture(200, 100)
    ours = PromptEncoder(path, SMALL).process_images([image])
    theirs = PromptEncoder(checkpoint, SMALL).process_images([image])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_vision_ids_are_banned_and_ids_that_end_a_response_are_not(encoder):
    ids = encoder.tokenizer.convert_tokens_to_ids
    vision = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"]
    assert set(encoder.banned_token_ids) == {ids(t) for t in [*vision, "<|video_pad|>"]}
    assert set(encoder.eos_token_ids) == {ids("<|im_end|>"), ids("<|endoftext|>")}


def test_a_pad_id_that_ends_nothing_is_banned(qwen25):
    (qwen25 / "generation_config.json").unlink()
    encoder = PromptEncoder(qwen25, SMALL)
    assert encoder.eos_token_ids == [encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert encoder.pad_token_id in encoder.banned_token_ids


def test_decode_keeps_the_tags_and_drops_control_tokens(encoder):
    text = "<think>3+4 < 8</think> \\boxed{7}"
    ids = encoder.tokenizer(text + "<|im_end|><|endoftext|><|image_pad|>")["input_ids"]
    assert encoder.decode(ids) == text
    assert encoder.decode(torch.tensor(ids)) == text


def test_a_saved_encoder_loads_with_the_checkpoints_own_limits(checkpoint, encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    original = image_processor_dict(checkpoint_family(checkpoint))
    size = original.get("size") or {
        "shortest_edge": original["min_pixels"],
        "longest_edge": original["max_pixels"],
    }
    assert saved["size"] == size
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    again = PromptEncoder(tmp_path, SMALL).encode("What is <image>?", [picture(90, 70)])
    before = encoder.encode("What is <image>?", [picture(90, 70)])
    assert torch.equal(again.input_ids, before.input_ids)
    assert torch.equal(again.pixel_values, before.pixel_values)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_pictures_of_any_mode_become_rgb(encoder, mode):
    image = picture(60, 60).convert(mode)
    pixels, _ = encoder.process_images([image])
    expected, _ = encoder.process_images([image.convert("RGB")])
    assert torch.equal(pixels, expected)


def test_a_picture_of_one_pixel_is_enlarged(encoder):
    pixels, grid = encoder.process_images([Image.new("RGB", (1, 1), "white")])
    assert grid[0].tolist()[1:] >= [2, 2] and torch.isfinite(pixels).all()


@pytest.mark.parametrize(
    ("problem", "n_images", "message"),
    [
        ("<image> and <image>", 1, r"2 <image> placeholders but the row has 1 images"),
        ("<image>", 0, r"1 <image> placeholders but the row has 0 images"),
        ("see <|image_pad|>", 1, r"contains <\|image_pad\|>, a control token.*<image>"),
    ],
)
def test_a_wrong_number_of_placeholders_is_named(encoder, problem, n_images, message):
    with pytest.raises(InputError, match=message):
        encoder.encode(problem, [picture(56, 56)] * n_images)


def test_a_too_long_prompt_names_length_limit_and_options(qwen25):
    config = DataConfig(min_pixels=784, max_pixels=784, max_prompt_length=40)
    with pytest.raises(PromptTooLong) as caught:
        PromptEncoder(qwen25, config).encode("x" * 50, [picture(28, 28)])
    # 50 bytes, 1 image pad; "user\n", "assistant\n", "\n" are 16; 3 + 2 marks
    for part in ("72 tokens", "1 of them image", "= 40", "--data.max-prompt-length"):
        assert part in str(caught.value)


def test_an_image_without_pixels_is_named(encoder):
    with pytest.raises(InputError, match="image 1 is 0x5 pixels"):
        encoder.encode("?", [picture(28, 28), Image.new("RGB", (0, 5))])


def test_an_extreme_aspect_ratio_is_named(encoder):
    with pytest.raises(InputError, match=r"image 0 of 3000x2 pixels is refused.*aspect ratio"):
        encoder.encode("?", [picture(3000, 2)])


def test_ids_beyond_the_tokenizer_are_banned(checkpoint, encoder, tmp_path):
    path = write_processor_files(tmp_path, checkpoint_family(checkpoint))
    size = padded(path, 100)
    ours = PromptEncoder(path, SMALL)
    assert ours.banned_token_ids == [*encoder.banned_token_ids, *range(size, size + 100)]
    assert len(ours.tokenizer) == size


def test_ids_beyond_the_tokenizer_are_never_sampled(qwen25):
    size = padded(qwen25, 100)
    ours = PromptEncoder(qwen25, SMALL)
    model = AutoModelForImageTextToText.from_config(
        family_config("qwen2_5_vl", ours.tokenizer), attn_implementation="sdpa"
    )
    model.resize_token_embeddings(size + 100)
    policy = Policy(model.eval(), ours.banned_token_ids)
    assert policy.banned_V.nonzero().flatten().tolist() == ours.banned_token_ids
    with torch.no_grad():
        logits = model.lm_head(torch.randn(50, model.lm_head.in_features)) + policy.banned_V
    for temperature in BOUNDS["rollout.temperature"]:
        assert (logits / temperature).softmax(-1)[:, ours.banned_token_ids].count_nonzero() == 0
    bias = RequestFormat(ours).sampling(2, 1.0, 5, 0)["logit_bias"]
    assert sorted(bias) == ours.banned_token_ids and set(bias.values()) == {BANNED_LOGIT}


def test_the_default_jobs_model_bans_what_it_always_did(tmp_path):
    build_checkpoint(tmp_path, seed=0)
    ours = PromptEncoder(tmp_path, SMALL)
    vocab = ours.tokenizer.get_vocab()
    names = {name for name, i in vocab.items() if i in ours.banned_token_ids}
    assert names == {PAD, *VISION}
    assert (
        len(vocab)
        == json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"]
    )


def test_half_an_emoji_and_fifty_megabytes_are_refused_at_once(encoder):
    with pytest.raises(InputError, match="cannot be tokenised"):
        encoder.encode("half \ud83d", [])
    started = time.perf_counter()
    with pytest.raises(PromptTooLong, match="50000000 characters"):
        encoder.encode("x" * 50_000_000, [])
    assert time.perf_counter() - started < 5


def test_a_transparent_picture_is_encoded_as_its_composite_on_white(encoder):
    clear = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    white = Image.new("RGB", (60, 60), "white")
    assert torch.equal(encoder.process_images([clear])[0], encoder.process_images([white])[0])
