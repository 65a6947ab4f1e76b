"""Settings of the corruption: one that comes with the package, or a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from papo_fast.errors import InputError
from papo_fast.user_function import FORM, load_function

CORRUPTIONS = ("patch", "official")


@dataclass(frozen=True)
class CorruptionConfig:
    kind: str = "patch"
    """`patch`: the processor's own patch grid. `official`: 14-pixel squares of the raw image.
    FILE.py:name: a function of your own, of (pixel_values, image_grid_thw, seed) or of (images,
    seed)."""
    ratio: float = 0.6
    """Share of the patches that `patch` and `official` black out, in [0, 1]."""


def load_corruption(kind: str) -> tuple[Callable[..., Any], Literal["pixels", "images"]]:
    """The user's corruption, and whether it takes processed patches or raw pictures.

    Raises `InputError` where it cannot be loaded or takes neither three nor two arguments.
    """
    if ":" not in kind:
        raise InputError(
            f"corruption.kind is {kind!r}: expected one of {', '.join(CORRUPTIONS)}, or {FORM}"
        )
    function = load_function(kind, "corruption.kind")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"corruption.kind: {kind} does not say which arguments it takes"
        ) from error
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    must = [p for p in parameters if p.kind in by_place and p.default is p.empty]
    if len(must) not in (2, 3):
        raise InputError(
            f"corruption.kind: {kind} takes {len(must)} arguments: expected (pixel_values, "
            "image_grid_thw, seed) for processed patches, or (images, seed) for raw pictures"
        )
    return function, "pixels" if len(must) == 3 else "images"


def check_corruption(config: CorruptionConfig) -> None:
    """Raise `InputError` where `config.kind` is no corruption."""
    if config.kind not in CORRUPTIONS:
        load_corruption(config.kind)
