import json
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from papo_fast.config import DataConfig, ModelConfig
from papo_fast.data.encoder import PromptEncoder, PromptTooLong
from papo_fast.data.patch_grid import black_pixel
from papo_fast.digits.model import PAD, VISION, build_checkpoint
from papo_fast.errors import InputError
from papo_fast.model.loading import load_model
from papo_fast.model.policy import BANNED_LOGIT, Policy
from papo_fast.rollout.vllm_requests import RequestFormat
from papo_fast.setting_bounds import BOUNDS
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


def test_a_hub_name_is_taken_wherever_a_folder_is(qwen25, tmp_path, monkeypatch, capsys):
    from transformers.utils import hub

    from papo_fast.cli import main

    cached = tmp_path / "models--Me--Tiny-VL"
    shutil.copytree(qwen25, cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    encoder, local = (PromptEncoder(path, SMALL) for path in ("Me/Tiny-VL", qwen25))
    found, expected = (x.encode("What?", []).input_ids for x in (encoder, local))
    assert found.tolist() == expected.tolist()
    assert main(["plan", "--model.path", "Me/Tiny-VL"]) == 0
    assert main(["plan", "--model.path", "Me/Other-VL"]) == 2
    assert "Me/Other-VL; expected a local checkpoint" in " ".join(capsys.readouterr().err.split())
    for no_name in ("a/b/c", "./a", "Me/Tiny VL", "Me//Tiny"):
        with pytest.raises(InputError, match="no such directory; expected one, or the hub name"):
            PromptEncoder(no_name, SMALL)


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


# --- damaged folders, and ids without text --------------------------------------------------------


def change_json(file, **changes):
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def one_line(path):
    with pytest.raises(InputError) as caught:
        PromptEncoder(path, SMALL)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_json_file_is_named(qwen25, name, content):
    (qwen25 / name).write_bytes(content)
    assert str(qwen25 / name) in one_line(qwen25)


@pytest.mark.parametrize("content", [{}, {"model": {"type": "BPE"}}, {"version": "1.0"}])
def test_a_tokenizer_that_cannot_be_built_is_named(qwen25, content):
    (qwen25 / "tokenizer.json").write_text(json.dumps(content))
    assert "tokenizer.json" in one_line(qwen25)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in %}", "fails"),
        ("{{ raise_exception('no') }}", "fails"),
        ("{{ messages.nothing.at_all }}", "fails"),
        ("{{ messages[0].role }}", "wrote 0 image tokens"),
        ("<|image_pad|><|image_pad|>", "wrote 2 image tokens"),
    ],
)
def test_a_chat_template_that_fails_is_named(qwen25, template, message):
    (qwen25 / "chat_template.jinja").write_text(template)
    said = one_line(qwen25)
    assert "chat_template.jinja" in said and message in said


def test_an_old_chat_template_without_a_template_is_named(tmp_path):
    path = write_processor_files(tmp_path, "qwen2_vl")
    (path / "chat_template.json").write_text("{}")
    assert "chat_template.json holds no text" in one_line(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_without_vision_config_is_named(tmp_path, family):
    path = write_processor_files(tmp_path, family)
    change_json(path / "config.json", vision_config=None)
    assert "config.json has no vision_config" in one_line(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": "14"},
        {"patch_size": 0},
        {"merge_size": None, "patch_size": -1},
        {"image_mean": [0.5]},
        {"image_std": [0, 0, 0]},
        {"image_std": "none"},
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_an_image_processor_that_does_not_work_is_named(qwen25, changes):
    change_json(qwen25 / "preprocessor_config.json", **changes)
    assert "preprocessor_config.json" in one_line(qwen25)


def padded(path, by):
    """The checkpoint with so many ids more in the model than in the tokenizer."""
    config = json.loads((path / "config.json").read_text())
    size = config["text_config"]["vocab_size"]
    config["text_config"]["vocab_size"] = size + by
    (path / "config.json").write_text(json.dumps(config))
    return size


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


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(qwen25):
    padded(qwen25, -5)
    assert "vocab_size in config.json is" in one_line(qwen25)


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


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path, checkpoints):
    """A copy of a checkpoint, and its tensors by name."""
    path = tmp_path / "checkpoint"
    shutil.copytree(checkpoints["qwen2_5_vl"], path)
    return path, load_file(path / "model.safetensors")


def load_error(path):
    with pytest.raises(InputError) as caught:
        load_model(ModelConfig(str(path)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def shards(path, tensors):
    """The weights in two files with an index; returns the index's content."""
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == part}, path / part, FORMAT)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    return where


FORMAT = {"format": "pt"}


def test_whole_weights_are_loaded_from_one_file_and_from_shards_alike(weights):
    path, tensors = weights
    one = load_model(ModelConfig(str(path))).state_dict()
    shards(path, tensors)
    two = load_model(ModelConfig(str(path))).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_folder_without_weights_is_named(weights):
    path, _ = weights
    (path / "model.safetensors").unlink()
    assert f"{path} has no weights" in load_error(path)


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_cut_weights_are_named(weights, left):
    path, _ = weights
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    assert str(file) in load_error(path)


def test_weights_that_are_no_safetensors_are_named(weights):
    path, _ = weights
    for content in (b"<html>" * 100, (3).to_bytes(8, "little") + b"[1]", b"\xff" * 64):
        (path / "model.safetensors").write_bytes(content)
        assert str(path / "model.safetensors") in load_error(path)


@pytest.mark.parametrize("part", ["q_proj.weight", "visual.merger", "lm_head"])
def test_missing_weights_are_refused_and_not_drawn_at_random(weights, part):
    path, tensors = weights
    gone = next(name for name in tensors if part in name)
    save_file({n: t for n, t in tensors.items() if n != gone}, path / "model.safetensors", FORMAT)
    assert gone.split(".", 2)[-1] in load_error(path) and "lack" in load_error(path)


def test_weights_of_another_shape_are_refused(weights):
    path, tensors = weights
    name = next(name for name in tensors if "q_proj.weight" in name)
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, path / "model.safetensors", FORMAT)
    message = load_error(path)
    assert "q_proj.weight has the shape (3, 32)" in message and "(32, 32)" in message


def test_shards_that_are_missing_or_lack_a_weight_are_named(weights):
    path, tensors = weights
    where = shards(path, tensors)
    name, part = next(iter(where.items()))
    save_file({n: tensors[n] for n, p in where.items() if p == part and n != name}, path / part)
    assert f"{path / part} has no {name}" in load_error(path)
    (path / part).unlink()
    assert str(path / part) in load_error(path)
    (path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": [1]}')
    assert "index.json has no weight_map" in load_error(path)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": -3}]
)
def test_sizes_that_no_model_can_have_are_one_line(weights, change):
    path, _ = weights
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    assert "config.json" in load_error(path)
