"""Settings of the corruption: those that come with the package, or a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from papo_fast.errors import InputError
from papo_fast.user_function import FORM, load_function

CORRUPTIONS = (
    "patch",
    "official",
    "gaussian",
    "diffusion",
    "blur",
    "evidence",
    "control",
    "attention",
)
OF_BOXES = ("evidence", "control")
"""Corruptions that take boxes from a column of the data."""


@dataclass(frozen=True)
class CorruptionConfig:
    kind: str = "patch"
    """`patch`: black patches of the processor's own grid. `official`: black 14-pixel squares of the
    raw image. `gaussian`, `diffusion`: noise. `blur`. `evidence`: the row's boxes are filled.
    `control`: boxes of the same sizes elsewhere. `attention`: text sees no picture. FILE.py:name: a
    function of your own, of (pixel_values, image_grid_thw, seed) or of (images, seed)."""
    second: str = ""
    """Corruption of a second view, for the terms of objective.dvrp_* and objective.margin_coef;
    same choices as kind, with the numbers below. Empty: none."""
    ratio: float = 0.6
    """Share of the patches that `patch` and `official` black out, in [0, 1]."""
    noise_std: float = 2.0
    """`gaussian`: standard deviation, in units of the normalised pixels that the model gets."""
    noise_step: float = 500.0
    """`diffusion`: step of the noise schedule, of 1000 steps."""
    noise_anneal: float = 0.0
    """`diffusion`: the step falls over the run as sigmoid(this * (1/2 - share of the run that is
    done)); 0: it stays."""
    blur_sigma: float = 8.0
    """`blur`: standard deviation of the Gaussian, in pixels of the picture that the model gets."""
    boxes_key: str = "boxes"
    """`evidence`, `control`: column with the boxes [left, top, right, bottom] in pixels of the
    picture: a list of boxes, or with several pictures a list of such lists."""
    box_fill: Literal["black", "mean"] = "black"
    """`evidence`, `control`: what boxes are filled with; mean: each box with its own mean
    colour."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """`kind`, and `second` where there is one."""
        return (self.kind, self.second) if self.second else (self.kind,)


def load_corruption(
    kind: str, setting: str = "corruption.kind"
) -> tuple[Callable[..., Any], Literal["pixels", "images"]]:
    """The user's corruption, and whether it takes processed patches or raw pictures.

    Raises `InputError` where it cannot be loaded or takes neither three nor two arguments.
    """
    if ":" not in kind:
        raise InputError(
            f"{setting} is {kind!r}: expected one of {', '.join(CORRUPTIONS)}, or {FORM}"
        )
    function = load_function(kind, setting)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise InputError(f"{setting}: {kind} does not say which arguments it takes") from error
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    must = [p for p in parameters if p.kind in by_place and p.default is p.empty]
    if len(must) not in (2, 3):
        raise InputError(
            f"{setting}: {kind} takes {len(must)} arguments: expected (pixel_values, "
            "image_grid_thw, seed) for processed patches, or (images, seed) for raw pictures"
        )
    return function, "pixels" if len(must) == 3 else "images"


def check_corruption(config: CorruptionConfig) -> None:
    """Raise `InputError` where `config.kind` or `config.second` is no corruption."""
    if config.second == config.kind:
        raise InputError(
            f"corruption.second is {config.second!r}, as corruption.kind is: the second view must "
            "be another one"
        )
    for kind, setting in zip(config.kinds, ("corruption.kind", "corruption.second"), strict=False):
        if kind not in CORRUPTIONS:
            load_corruption(kind, setting)
