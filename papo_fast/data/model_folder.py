"""The small files of a model's folder: there and readable, or one line that names the file."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from papo_fast.data.model_numbers import check_sizes
from papo_fast.errors import InputError

_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
HUB_NAME = "the hub name of a model that is cached or can be downloaded"
_READ_BY = {
    "AutoConfig": ("config", "config.json"),
    "AutoTokenizer": ("tokenizer", "tokenizer.json, tokenizer_config.json"),
    "AutoImageProcessor": ("image processor", "preprocessor_config.json"),
    "GenerationConfig": ("generation config", "generation_config.json"),
}

_PROCESSOR = ("processor", "processor_config.json, preprocessor_config.json")


def may_be_hub_name(path: str) -> bool:
    """Whether a path that does not exist here is of the form of a hub name, `OWNER/NAME`."""
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", path, re.ASCII) is not None


def check_files(path: str) -> None:
    """Raise for a local directory that lacks a file or has one that is no JSON object.

    A hub name is left to transformers.
    """
    folder = Path(path)
    if not folder.exists():
        if not may_be_hub_name(path):
            raise InputError(
                f"model.path = {path!r}: there is no such directory; expected one, or {HUB_NAME}"
            )
        return
    if not folder.is_dir():
        raise InputError(
            f"model.path = {path!r} is a file; expected the directory of a checkpoint, with "
            "config.json, the weights, the tokenizer and preprocessor_config.json"
        )
    if (folder / "shards").is_dir():
        raise InputError(
            f"model.path = {path!r} is a checkpoint that --resume goes on from; expected a model, "
            "such as a run leaves in its folder `model` when it is finished"
        )
    needed = {
        "config.json": ("config.json",),
        "tokenizer.json": ("tokenizer.json", "vocab.json"),
        "preprocessor_config.json": ("preprocessor_config.json", "processor_config.json"),
    }
    for name, any_of in needed.items():
        if not any((folder / file).is_file() for file in any_of):
            where = "into it" if name == "config.json" else "next to config.json"
            raise InputError(
                f"model.path = {path!r} has no {' or '.join(any_of)}: copy {name} of the original "
                f"checkpoint {where}"
            )
    for name in _JSON_FILES:
        if (folder / name).exists():
            read_object(folder / name)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; raises `InputError` that names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}; expected a JSON object")
    return value


def load(auto_class: Any, path: str, **kwargs: Any) -> Any:
    """`from_pretrained` of a transformers class; whatever it raises becomes an `InputError`."""
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except Exception as error:  # KeyError, TypeError, Rust's own: any file may be wrong in any way
        what, files = _READ_BY.get(auto_class.__name__, _PROCESSOR)
        other = "" if Path(path).exists() else f" Expected a local folder, or {HUB_NAME}"
        raise InputError(
            f"model.path = {path!r}: the {what} cannot be loaded ({files}): {first_line(error)}"
            f"{other}"
        ) from error


def chat_template(path: str, tokenizer: Any) -> tuple[str, str]:
    """The template of a checkpoint and the name of its file."""
    # chat_template.json is where processors kept it before transformers 5; AutoProcessor
    # prefers it to the tokenizer's, which in some checkpoints knows no images.
    old = optional_file(path, "chat_template.json")
    new = optional_file(path, "chat_template.jinja")
    if old is not None and new is None:
        template = read_object(Path(old)).get("chat_template")
        if not isinstance(template, str):
            raise InputError(f"{old} holds no text under chat_template")
        return template, "chat_template.json"
    if not tokenizer.chat_template:
        raise InputError(
            f"{path} has no chat template: copy chat_template.jinja (or chat_template.json) of "
            "the original checkpoint next to config.json"
        )
    return tokenizer.chat_template, "tokenizer_config.json" if new is None else Path(new).name


def check_config(file: Path, known: Sequence[str]) -> None:
    """Raise `InputError`, which names file and key, for a config.json of no model that is known.

    Args:
        known: the values of `model_type` that are taken.
    """
    settings = read_object(file)
    family = settings.get("model_type")
    if not isinstance(family, str):
        raise InputError(
            f"{file}: model_type is {reprlib.repr(family)}; expected one of {', '.join(known)}"
        )
    if family not in known:
        raise InputError(f"{file} is a {family!r} model; supported are {', '.join(known)}")
    check_sizes(file, settings)


def end_ids(path: str, listed: Any) -> list[int | None]:
    """`eos_token_id` of generation_config.json, one id or a list of them, as a list."""
    ids = listed if isinstance(listed, list) else [listed]
    if any(isinstance(i, bool) or not isinstance(i, int | None) for i in ids):
        raise InputError(
            f"{path}: generation_config.json says eos_token_id = {reprlib.repr(listed)}; expected "
            "an integer or a list of them"
        )
    return ids


def optional_file(path: str, name: str) -> str | None:
    return cached_file(
        path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def first_line(error: BaseException) -> str:
    """What an error says, in one line that is not too long; its type where it says little."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError | AttributeError | TypeError) or not text:
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 400 else text[:400] + "…"
