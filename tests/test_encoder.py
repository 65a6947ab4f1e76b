import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from papo_fast.config import DataConfig
from papo_fast.data.encoder import PromptEncoder, PromptTooLong, black_pixel
from papo_fast.errors import InputError
from support.family_checkpoints import (
    FAMILIES,
    family_config,
    image_processor_dict,
    write_processor_files,
)

SMALL = DataConfig(min_pixels=28 * 28, max_pixels=64 * 28 * 28)


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return write_processor_files(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return PromptEncoder(checkpoint, SMALL)


@pytest.fixture
def qwen25(tmp_path):
    return write_processor_files(tmp_path, "qwen2_5_vl")


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


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["preprocessor_config.json"], "copy preprocessor_config.json .* next to config.json"),
        (["tokenizer.json"], "no tokenizer.json or vocab.json: copy tokenizer.json"),
        (["config.json"], "no config.json: copy config.json"),
        (["chat_template.jinja"], "no chat template: copy chat_template.jinja"),
    ],
)
def test_a_missing_file_is_named_with_what_to_do(qwen25, missing, message):
    for name in missing:
        (qwen25 / name).unlink()
    with pytest.raises(InputError, match=message):
        PromptEncoder(qwen25, SMALL)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        PromptEncoder(tmp_path / "nothing", SMALL)
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(InputError, match="is a file; expected the directory"):
        PromptEncoder(tmp_path / "weights.bin", SMALL)


def test_an_unknown_hub_name_is_an_input_error():
    with pytest.raises(InputError, match="'nobody/no-model': the config cannot be loaded"):
        PromptEncoder("nobody/no-model", SMALL)


def test_another_family_is_refused(qwen25):
    (qwen25 / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="'llama' model; supported are qwen2_vl"):
        PromptEncoder(qwen25, SMALL)


def test_an_image_processor_of_another_model_is_refused(qwen25):
    foreign = json.dumps(image_processor_dict("qwen3_vl"))
    (qwen25 / "preprocessor_config.json").write_text(foreign)
    with pytest.raises(InputError, match="patch_size is 16 but the model's is 14"):
        PromptEncoder(qwen25, SMALL)


def test_pixel_limits_in_the_wrong_order_are_refused(qwen25):
    with pytest.raises(InputError, match=r"min_pixels = 9, data.max_pixels = 4"):
        PromptEncoder(qwen25, DataConfig(min_pixels=9, max_pixels=4))
