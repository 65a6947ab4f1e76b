"""Weights in a model folder: one file or shards, and what is said of damaged or missing ones."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from papo_fast.config import ModelConfig
from papo_fast.errors import InputError
from papo_fast.model.loading import load_model


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
