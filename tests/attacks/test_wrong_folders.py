"""Damaged folders of runs and of models: each is one line that names the file and the key."""

from __future__ import annotations

import json
import shutil

import pytest

from support.attacks import assert_no_run, jsonl, refused, train_on

# --- folders of runs ------------------------------------------------------------------------------


STEP = {"step": 1, "seconds": 3.0, "reward": 0.5, "accuracy": 0.5}
EXAMPLE = {"when": "after", "problem": "What?", "answer": "1", "response": "1", "accuracy": 1.0}
# name → (file, its content, what the line names besides the file)
RUNS = {
    "step-list": ("metrics.jsonl", jsonl([1], [2]), "line 1"),
    "step-noise": ("metrics.jsonl", b"\0\1\n", "line 1"),
    "step-text": ("metrics.jsonl", jsonl(STEP | {"step": "one"}), "step"),
    "reward-text": ("metrics.jsonl", jsonl(STEP, STEP | {"reward": "much"}), "row 2: reward"),
    "alarms-number": ("metrics.jsonl", jsonl(STEP | {"alarms": 3}), "alarms"),
    "settings-list": ("config.json", b"[]", "list"),
    "summary-text": ("summary.json", b'"done"', "str"),
    "accuracy-number": ("summary.json", b'{"accuracy_after": 3}', "accuracy_after"),
    "accuracy-text": ("summary.json", b'{"accuracy_after": {"a": "b"}}', "accuracy_after"),
    "steps-text": ("summary.json", b'{"steps": "many"}', "steps"),
    "right-text": ("examples.jsonl", jsonl(EXAMPLE | {"accuracy": "yes"}), "accuracy"),
    "earned-text": ("examples.jsonl", jsonl(EXAMPLE | {"reward": "much"}), "reward"),
    "image-number": ("examples.jsonl", jsonl(EXAMPLE | {"image": 7}), "image"),
    "picture-folder": ("report.png", None, "cannot be written"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_damaged_run_is_one_line_that_names_file_and_key(tmp_path, capfd, name):
    file, content, what = RUNS[name]
    (tmp_path / "metrics.jsonl").write_bytes(jsonl(STEP))
    if content is None:
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).write_bytes(content)
    refused(capfd, ["report", tmp_path], file, what)


# --- model folders --------------------------------------------------------------------------------


def config_with(**changes):
    """Change keys of config.json; `section__key` stands for a key within a section."""

    def change(folder):
        file = folder / "config.json"
        settings = json.loads(file.read_text())
        for name, value in changes.items():
            section, _, key = name.rpartition("__")
            part = settings[section] if section else settings
            if value is ...:
                del part[key]
            else:
                part[key] = value
        file.write_text(json.dumps(settings))

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


# name → (change, what the line names besides the folder, whether `plan` reads that file)
MODELS = {
    "nothing": (lambda folder: shutil.rmtree(folder), "model", True),
    "config-missing": (without("config.json"), "config.json", True),
    "config-empty": (written("config.json", b""), "config.json", True),
    "config-list": (written("config.json", b"[1, 2]"), "config.json", True),
    "config-binary": (written("config.json", bytes(range(256))), "config.json", True),
    "config-deep": (written("config.json", b"[" * 100_000), "config.json", True),
    "family-missing": (config_with(model_type=...), "model_type", True),
    "family-other": (config_with(model_type="llama"), "llama", True),
    "family-number": (config_with(model_type=7), "model_type", True),
    "vision-missing": (config_with(vision_config=...), "vision_config", True),
    "vision-list": (config_with(vision_config=[1]), "vision_config", True),
    "vision-none": (config_with(vision_config=None), "vision_config", True),
    "text-list": (config_with(text_config=[1]), "text_config", True),
    "depth-text": (config_with(vision_config__depth="two"), "depth", True),
    "depth-zero": (config_with(vision_config__depth=0), "depth", True),
    "depth-absurd": (config_with(vision_config__depth=10**9), "depth", True),
    "patch-zero": (config_with(vision_config__patch_size=0), "patch_size", True),
    "hidden-text": (config_with(text_config__hidden_size="wide"), "hidden_size", True),
    "hidden-none": (config_with(text_config__hidden_size=None), "hidden_size", True),
    "hidden-absurd": (config_with(text_config__hidden_size=10**15), "hidden_size", True),
    "hidden-negative": (config_with(text_config__hidden_size=-32), "hidden_size", True),
    "layers-absurd": (config_with(text_config__num_hidden_layers=10**9), "num_hidden_layers", True),
    "layers-list": (config_with(text_config__num_hidden_layers=[2]), "num_hidden_layers", True),
    "heads-zero": (config_with(text_config__num_attention_heads=0), "num_attention_heads", True),
    "heads-odd": (config_with(text_config__num_attention_heads=3), "num_attention_heads", True),
    "vocab-nan": (config_with(text_config__vocab_size=float("nan")), "vocab_size", True),
    "vocab-small": (config_with(text_config__vocab_size=9), "vocab_size", False),
    "dropout": (config_with(text_config__attention_dropout=0.5), "attention_dropout", True),
    "image-token": (config_with(image_token_id=10**6), "image_token_id", False),
    "activation": (config_with(text_config__hidden_act="wave"), "wave", True),
    "rope-list": (config_with(text_config__rope_parameters=[1]), "rope_parameters", True),
    "sections-text": (
        config_with(text_config__rope_parameters={"rope_theta": 1e4, "mrope_section": "abc"}),
        "mrope_section", True,
    ),
    "sections-few": (
        config_with(text_config__rope_parameters={"rope_theta": 1e4, "mrope_section": [1, 1, 1]}),
        "mrope_section", True,
    ),
    "theta-nan": (
        config_with(text_config__rope_parameters={"rope_theta": "nan", "rope_type": "default"}),
        "rope_theta", True,
    ),
    "window-zero": (config_with(vision_config__window_size=0), "window_size", True),
    "blocks-text": (config_with(vision_config__fullatt_block_indexes="all"), "fullatt", True),
    "epsilon-nan": (config_with(text_config__rms_norm_eps=float("nan")), "rms_norm_eps", True),
    "epsilon-text": (config_with(text_config__rms_norm_eps="small"), "rms_norm_eps", True),
    "out-other": (config_with(vision_config__out_hidden_size=48), "out_hidden_size", True),
    "image-id-text": (config_with(image_token_id="<image>"), "image_token_id", True),
    "eos-text": (written("generation_config.json", b'{"eos_token_id": "x"}'), "eos", False),
    "eos-list": (written("generation_config.json", b"[]"), "generation_config.json", False),
    "processor-absurd": (
        written("preprocessor_config.json", b'{"patch_size": 1000000000}'), "patch_size", False,
    ),
    "tokenizer-missing": (without("tokenizer.json"), "tokenizer.json", False),
    "tokenizer-list": (written("tokenizer.json", b"[]"), "tokenizer.json", False),
    "template-broken": (written("chat_template.jinja", b"{% for %}"), "chat_template.jinja", False),
    "processor-missing": (without("preprocessor_config.json"), "preprocessor_config.json", False),
    "processor-std": (
        written("preprocessor_config.json", b'{"image_std": 0}'), "preprocessor_config.json", False,
    ),
    "weights-missing": (without("model.safetensors"), "model.safetensors", False),
    "weights-cut": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-100]
        ), "model.safetensors", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_model_folder_is_one_line_that_names_file_and_key(place, tmp_path, capfd, name):
    change, what, _ = MODELS[name]
    folder = shutil.copytree(place / "model", tmp_path / "model")
    change(folder)
    argv = train_on(place, tmp_path, place / "good.parquet")
    argv[argv.index("--model.path") + 1] = folder
    line = refused(capfd, argv, str(folder), what)
    assert len(line) < 1000, line
    assert_no_run(tmp_path)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][2]])
def test_a_wrong_model_folder_cannot_be_planned_with(place, tmp_path, capfd, name):
    change, what, _ = MODELS[name]
    folder = shutil.copytree(place / "model", tmp_path / "model")
    change(folder)
    line = refused(capfd, ["plan", "--model.path", folder], str(folder), what)
    assert len(line) < 1000, line
