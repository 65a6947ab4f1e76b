"""What an encoder is made of, a folder or a hub name, and the line that names what is bad in it."""

import json
import shutil

import pytest

from papo_fast.config import DataConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.errors import InputError
from support.encoding import SMALL, padded
from support.family_checkpoints import FAMILIES, image_processor_dict, write_processor_files


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


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(qwen25):
    padded(qwen25, -5)
    assert "vocab_size in config.json is" in one_line(qwen25)


def test_a_checkpoint_to_resume_from_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "shards").mkdir()
    with pytest.raises(InputError, match="--resume goes on from; expected a model"):
        PromptEncoder(tmp_path, SMALL)
