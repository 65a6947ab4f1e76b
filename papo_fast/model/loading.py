"""A HuggingFace checkpoint as a model on the CPU, or as an empty shell of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from papo_fast.config import ModelConfig
from papo_fast.consoles import logged_from
from papo_fast.data.model_folder import first_line, read_object
from papo_fast.errors import InputError
from papo_fast.model.attention import NAME as TREE_ATTENTION
from papo_fast.model.linear_attention import branch_linear_attention
from papo_fast.model.picture_attention import attend_inside_pictures

TRANSFORMERS = SpecifierSet(">=5.19,<5.20")
"""What pyproject.toml asks for under `train`."""


def load_model(config: ModelConfig, *, empty: bool = False, plain: bool = False) -> nn.Module:
    """The model of `config.path` in `config.weights_dtype` (see `ModelConfig.dtype`).

    Args:
        empty: without memory or values, on the meta device, for a process that is sent its shard.
        plain: with the attention that transformers chooses, which packs nothing.

    Raises:
        InputError: the model uses what packed groups do not support, or its weights are missing,
            cut or of other shapes than config.json says.
    """
    check_transformers(transformers.__version__)
    if not empty:
        check_weight_files(config.path)
    options = {
        "trust_remote_code": config.trust_remote_code,
        "dtype": getattr(torch, config.weights_dtype),
    }
    if not plain:
        options["attn_implementation"] = {"": "sdpa", "text_config": TREE_ATTENTION}
    try:
        model = _empty(config, options) if empty else _loaded(config, options)
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise InputError(
            f"model.path = {config.path!r}: the model cannot be built from config.json and its "
            f"weights: {first_line(error)}"
        ) from error
    text = model.config.get_text_config()
    if plain:
        if getattr(text, "attention_dropout", 0):
            raise InputError(
                f"model.path = {config.path!r} uses attention dropout, with which no two passes "
                "agree: set attention_dropout to 0 in its config.json"
            )
        return model
    attend_inside_pictures(model)
    branch_linear_attention(model)
    sliding = "sliding_attention" in (getattr(text, "layer_types", None) or ())
    if sliding or text.attention_dropout:
        raise InputError(
            f"model.path = {config.path!r} uses sliding-window attention or attention dropout, "
            "which packed groups do not support: set use_sliding_window to false and "
            "attention_dropout to 0 in its config.json"
        )
    return model


def check_transformers(version: str) -> None:
    """Raise `InputError` for a version of transformers that the trainer does not run on."""
    if not TRANSFORMERS.contains(version, prereleases=True):
        raise InputError(
            f"transformers {version} is installed, and training needs {TRANSFORMERS}: pip install "
            "-c constraints/cpu.txt -e '.[train]'. Kernels and hooks run on older ones too"
        )


def _empty(config: ModelConfig, options: dict[str, Any]) -> nn.Module:
    settings = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(settings, **options)


def _loaded(config: ModelConfig, options: dict[str, Any]) -> nn.Module:
    # without transformers' table of missing weights, which our one line replaces
    with logged_from(transformers_logging.ERROR, transformers_logging):
        model, report = AutoModelForImageTextToText.from_pretrained(
            config.path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    # transformers draws both kinds at random and goes on
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model.path = {config.path!r}: its weights lack {missing[0]}{_others(missing)}; copy "
            "the safetensors files of the original checkpoint"
        )
    if other := sorted(report["mismatched_keys"]):
        name, theirs, ours = other[0]
        raise InputError(
            f"model.path = {config.path!r}: {name} has the shape {tuple(theirs)} in the weights, "
            f"but config.json says {tuple(ours)}{_others(other)}; copy both of one checkpoint"
        )
    if report["error_msgs"]:
        raise InputError(f"model.path = {config.path!r}: {report['error_msgs'][0]}")
    return model


def _others(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def check_weight_files(path: str) -> None:
    """Raise for a local checkpoint whose weights are missing or cut, from their headers alone."""
    folder = Path(path)
    if not folder.is_dir():  # a hub name
        return
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        _header(single)
    elif index.exists():
        content = read_object(index)
        where = content.get("weight_map")
        if not isinstance(content.get("metadata"), dict):  # transformers asks for it
            raise InputError(f"{index} has no metadata: copy it from the original checkpoint")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise InputError(f"{index} has no weight_map from names to files")
        headers = {file: _header(folder / file) for file in sorted(set(where.values()))}
        for name, file in where.items():
            if name not in headers[file]:
                raise InputError(f"{folder / file} has no {name}, which {index.name} says it holds")
    elif not any(folder.glob("pytorch_model*.bin*")):
        raise InputError(
            f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json"
        )


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file, whose length must be what the header says."""
    try:
        size = os.path.getsize(file)
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"its {size} bytes end within its header")
            header = json.loads(opened.read(length))
        ends = [0, *(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")]
        if 8 + length + max(ends) != size:
            raise ValueError(f"it has {size} bytes, but by its header {8 + length + max(ends)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(
            f"{file} cannot be read as safetensors: {first_line(error)}; copy it anew"
        ) from error
    return header
