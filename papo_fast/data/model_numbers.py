"""The sizes in a model's config.json, between bounds within which a model can be built.

They are checked as the file has them, before any library reads it: transformers makes a list as
long as `num_hidden_layers`, and fills in the sizes of some other model for what is missing.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from papo_fast.errors import InputError

_WIDTH, _COUNT, _LAYERS = (1, 1 << 20), (1, 1 << 14), (1, 1000)
TEXT = {
    "hidden_size": _WIDTH,
    "intermediate_size": (1, 1 << 24),
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _COUNT,
    "head_dim": _COUNT,
    "vocab_size": (1, 1 << 26),
}
"""Key → least and greatest value. Today's largest models stay below a tenth of these."""
VISION = {
    "depth": _LAYERS,
    "hidden_size": _WIDTH,
    "embed_dim": _WIDTH,
    "out_hidden_size": _WIDTH,
    "intermediate_size": (1, 1 << 24),
    "num_heads": _COUNT,
    "patch_size": (1, 1024),
    "temporal_patch_size": (1, 64),
    "spatial_merge_size": (1, 64),
    "in_channels": (1, 64),
    "in_chans": (1, 64),
    "window_size": (1, 1 << 20),
}
TOKENS = tuple(
    f"{name}_token_id"
    for name in (
        *("image", "video", "vision_start", "vision_end"),  # Qwen's names
        *("image_start", "image_end", "video_start", "video_end"),  # GLM's
    )
)
_BLOCKS = ("fullatt_block_indexes", "deepstack_visual_indexes")
_MAY_BE_NULL = ("head_dim", "embed_dim", "num_key_value_heads")


def check_sizes(file: Path, settings: dict[str, Any]) -> None:
    """Raise `InputError`, which names file and key, for a size that is no size.

    Args:
        file: the config.json of a Qwen-VL model, for the message.
        settings: what it holds. Keys that it lacks are left to transformers.
    """
    vision = _section(file, settings, "vision_config")
    # published checkpoints keep the language model's sizes at the top
    nested = settings.get("text_config") is not None
    text = _section(file, settings, "text_config") if nested else settings
    prefix = "text_config." if nested else ""
    for key, bounds in TEXT.items():
        _check(file, prefix, text, key, *bounds)
    for key, bounds in VISION.items():
        _check(file, "vision_config.", vision, key, *bounds)
    for key in TOKENS:
        _check(file, "", settings, key, 0, 1 << 26)
    for key in _BLOCKS:
        _check_blocks(file, vision, key)
    family = settings.get("model_type")
    heads = text.get("num_attention_heads")
    if text.get("head_dim") is None and family != "qwen3_vl":
        _divides(file, prefix, "num_attention_heads", heads, "hidden_size", text)
    keys = text.get("num_key_value_heads")
    _divides(file, prefix, "num_key_value_heads", keys, "num_attention_heads", text)
    width = "embed_dim" if vision.get("embed_dim") is not None else "hidden_size"
    _divides(file, "vision_config.", "num_heads", vision.get("num_heads"), width, vision)
    out = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
    if None not in (a := vision.get(out), b := text.get("hidden_size")) and a != b:
        raise InputError(
            f"{file}: vision_config.{out} is {a}, and {prefix}hidden_size is {b}; pictures' tokens "
            "are as wide as words': copy config.json of the original checkpoint"
        )
    _check_rotation(file, prefix, text)


def _check_rotation(file: Path, prefix: str, text: dict[str, Any]) -> None:
    """The norm's epsilon, and what turns queries and keys by their positions."""
    _check_number(file, prefix, text, "rms_norm_eps", 0, 1)
    _check_number(file, prefix, text, "rope_theta", 1e-3, 1e15)
    for name in ("rope_parameters", "rope_scaling"):
        if text.get(name) is None:
            continue
        rope, within = _section(file, text, name), f"{prefix}{name}."
        _check_number(file, within, rope, "rope_theta", 1e-3, 1e15)
        parts = rope.get("mrope_section")
        if parts is None:
            continue
        fits = isinstance(parts, list) and len(parts) == 3
        if not fits or not all(_is_integer(n, 0, 1 << 14) for n in parts):
            raise InputError(
                f"{file}: {within}mrope_section is {reprlib.repr(parts)}; expected three integers"
            )
        size, heads = text.get("head_dim"), text.get("num_attention_heads")
        if size is None and heads is not None and text.get("hidden_size") is not None:
            size = text["hidden_size"] // heads
        turned = "partial_rotary_factor"  # GLM turns a part of each head
        _check_number(file, within, rope, turned, 0, 1)
        if size is not None:
            size = int(size * rope.get(turned, 1))
        if size is not None and 2 * sum(parts) != size:
            raise InputError(
                f"{file}: {within}mrope_section is {parts}, whose sum is {sum(parts)}; expected "
                f"half of a head's {size}: copy config.json of the original checkpoint"
            )


def _section(file: Path, settings: dict[str, Any], name: str) -> dict[str, Any]:
    section = settings.get(name)
    if isinstance(section, dict):
        return section
    if section is None:
        raise InputError(
            f"{file} has no {name}: copy config.json of the original checkpoint, which describes "
            "its vision tower"
        )
    raise InputError(f"{file}: {name} is {reprlib.repr(section)}; expected a JSON object")


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check(file: Path, prefix: str, section: dict[str, Any], key: str, low: int, high: int) -> None:
    value = section.get(key)
    if key not in section or (value is None and key in _MAY_BE_NULL):
        return
    if not _is_integer(value, low, high):
        raise InputError(
            f"{file}: {prefix}{key} is {reprlib.repr(value)}; expected an integer from {low} to "
            f"{high}: copy config.json of the original checkpoint"
        )


def _check_number(
    file: Path, prefix: str, section: dict[str, Any], key: str, low: float, high: float
) -> None:
    value = section.get(key)
    if key not in section:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(
            f"{file}: {prefix}{key} is {reprlib.repr(value)}; expected a number from {low:g} to "
            f"{high:g}: copy config.json of the original checkpoint"
        )


def _check_blocks(file: Path, vision: dict[str, Any], key: str) -> None:
    """A list of the tower's blocks, by their numbers."""
    value, depth = vision.get(key), vision.get("depth", _LAYERS[1])
    if value is None:
        return
    if not isinstance(value, list) or not all(_is_integer(n, 0, depth - 1) for n in value):
        raise InputError(
            f"{file}: vision_config.{key} is {reprlib.repr(value)}; expected a list of integers "
            f"from 0 to {depth - 1}: copy config.json of the original checkpoint"
        )


def _divides(
    file: Path, prefix: str, key: str, value: int | None, of: str, section: dict[str, Any]
) -> None:
    total = section.get(of)
    if value is not None and total is not None and total % value:
        raise InputError(
            f"{file}: {prefix}{key} is {value}, which does not divide {prefix}{of} = {total}: copy "
            "config.json of the original checkpoint"
        )
