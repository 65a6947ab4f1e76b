"""Boxes of evidence out of a column of the data, filled; and boxes of the same sizes elsewhere.

CGPO (doi 10.1145/3767308.3835969) removes the evidence, each box filled with its mean colour. A
matched control removes as much of the picture where no evidence is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from papo_fast.data.patch_grid import PatchGrid
from papo_fast.data.prompts import Prompt
from papo_fast.errors import InputError

_FAR = 1e9
"""Pixels; a box farther away is a mistake."""


class Rect(NamedTuple):
    """Pixels [top, bottom) × [left, right) of a picture as the model gets it."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def meets(self, other: Rect) -> bool:
        return (
            self.top < other.bottom
            and other.top < self.bottom
            and self.left < other.right
            and other.left < self.right
        )

    def moved(self, down: int, right: int) -> Rect:
        return Rect(self.top + down, self.left + right, self.bottom + down, self.right + right)


@dataclass(frozen=True)
class BoxCorruption:
    """The kinds `evidence` and `control`: (rows, grid, boxes, seed) → rows with filled boxes."""

    place: Literal["evidence", "control"]
    fill: Literal["black", "mean"]
    black: Tensor
    """(C,) the value of a black pixel after normalisation."""
    grid: PatchGrid

    def __call__(
        self,
        pixel_values: Tensor,
        image_grid_thw: Tensor,
        boxes: Sequence[Sequence[Rect]],
        seed: int,
    ) -> Tensor:
        """A copy of (P, C*T*p*p) `pixel_values`, the boxes of each picture filled.

        Each control box is where no evidence is, if there is such a place (`control_boxes`).
        """
        generator = np.random.Generator(np.random.PCG64(seed))
        filled = []
        pictures = self.grid.pictures(pixel_values, image_grid_thw)
        for picture, rects in zip(pictures, boxes, strict=True):
            if self.place == "control":
                rects = control_boxes(rects, *picture.shape[-2:], generator)
            filled.append(self._filled(picture, rects))
        return self.grid.rows(filled)

    def _filled(self, picture: Tensor, rects: Sequence[Rect]) -> Tensor:
        new = picture.clone()
        for top, left, bottom, right in rects:
            colour = self.black.to(picture)
            if self.fill == "mean":
                colour = picture[..., top:bottom, left:right].mean((0, 2, 3))
            new[..., top:bottom, left:right] = colour[:, None, None]
        return new


def boxes_of(prompt: Prompt, key: str, grid: PatchGrid) -> list[list[Rect]]:
    """Of each of the prompt's pictures the boxes, as pixels of the picture that the model gets.

    The column `key` holds [left, top, right, bottom] in pixels of the raw picture. A pixel that a
    box touches belongs to it, and what is beyond the border is cut off. None is no box at all.

    Raises `InputError`, naming the column, where there is no such column, or where it holds
    something else.
    """
    check_column(prompt.columns, key)
    where = f"column {key!r}"
    value, n = prompt.columns[key], len(prompt.images)
    if value is None:
        return [[] for _ in range(n)]
    if not isinstance(value, list):
        raise InputError(f"{where} holds {value!r:.100}: expected a list of boxes")
    if _is_box(value):
        raise InputError(f"{where} holds one box, {value!r:.100}: expected a list of boxes")
    flat = all(_is_box(x) for x in value)
    if flat and n != 1 and value:
        raise InputError(
            f"{where} holds boxes, but the row has {n} pictures: expected a list of boxes for each"
        )
    of_pictures = [value] if flat and n == 1 else value or [[] for _ in range(n)]
    if len(of_pictures) != n:
        raise InputError(f"{where} holds {len(of_pictures)} lists of boxes for {n} pictures")
    sizes = prompt.encoded.image_grid_thw
    grids = [] if sizes is None else sizes.tolist()  # a row without pictures has none
    found = []
    for i, (boxes, (_, h, w)) in enumerate(zip(of_pictures, grids, strict=True)):
        if boxes is None:
            boxes = []
        if not isinstance(boxes, list) or not all(_is_box(x) for x in boxes):
            raise InputError(
                f"{where} holds {boxes!r:.100} for picture {i}: expected boxes "
                "[left, top, right, bottom]"
            )
        to = (h * grid.patch, w * grid.patch)
        found.append([_rect(box, prompt.images[i].size, to, where) for box in boxes])
    return found


def check_column(columns: Collection[str], key: str) -> None:
    """Raise `InputError` where the data has no column of boxes."""
    if key not in columns:
        raise InputError(
            f"the data has no column {key!r} with boxes of evidence; it has "
            f"{', '.join(sorted(columns)) or 'no other columns'}: name it with "
            "--corruption.boxes-key"
        )


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 4
        and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
        and all(abs(x) < _FAR for x in value)  # NaN is not, either
    )


def _rect(box: Sequence[float], size: tuple[int, int], to: tuple[int, int], where: str) -> Rect:
    (width, height), (new_height, new_width) = size, to
    if all(0 <= x <= 1 for x in box) and any(0 < x < 1 for x in box) and max(size) > 1:
        raise InputError(
            f"{where} holds the box {list(box)}, which seems to be in shares of the picture of "
            f"{width}x{height} pixels: expected [left, top, right, bottom] in pixels"
        )
    left, right = (min(max(x, 0.0), width) for x in (box[0], box[2]))
    top, bottom = (min(max(y, 0.0), height) for y in (box[1], box[3]))
    if not (left < right and top < bottom):
        raise InputError(
            f"{where} holds the box {list(box)}, of which nothing is in the picture of "
            f"{width}x{height} pixels: expected [left, top, right, bottom]"
        )
    return Rect(
        math.floor(top * new_height / height),
        math.floor(left * new_width / width),
        math.ceil(bottom * new_height / height),
        math.ceil(right * new_width / width),
    )


def control_boxes(
    rects: Sequence[Rect], height: int, width: int, generator: np.random.Generator
) -> list[Rect]:
    """Boxes of the same sizes at other places of a picture, drawn evenly from those that are free.

    Boxes that meet one another move as one, so that they cover the same number of pixels; of
    several such heaps the largest moves first. A place is free where the heap meets no evidence and
    no control that has been placed. Where none is, it is drawn from those where it meets least.
    """
    occupied = np.zeros((height, width), np.int64)
    for r in rects:
        occupied[r.top : r.bottom, r.left : r.right] = 1
    placed = []
    for heap in sorted(_heaps(rects), key=lambda heap: -sum(r.area for r in heap)):
        top, left = min(r.top for r in heap), min(r.left for r in heap)
        rows = height - max(r.bottom for r in heap) + top + 1
        columns = width - max(r.right for r in heap) + left + 1
        # sums over all windows of one size by a table of sums from the top left corner
        table = np.pad(occupied.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        met = np.zeros((rows, columns), np.int64)
        for r in heap:
            a, b = r.top - top, r.left - left
            c, d = r.bottom - top, r.right - left
            met += (
                table[c : c + rows, d : d + columns]
                - table[a : a + rows, d : d + columns]
                - table[c : c + rows, b : b + columns]
                + table[a : a + rows, b : b + columns]
            )
        places = np.flatnonzero(met == met.min())
        down, right = divmod(int(places[generator.integers(len(places))]), columns)
        for r in heap:
            new = r.moved(down - top, right - left)
            occupied[new.top : new.bottom, new.left : new.right] = 1
            placed.append(new)
    return placed


def _heaps(rects: Sequence[Rect]) -> list[list[Rect]]:
    """The boxes in lists, such that boxes of two lists never meet."""
    heaps: list[list[Rect]] = []
    for rect in rects:
        touched = [heap for heap in heaps if any(rect.meets(other) for other in heap)]
        heaps = [heap for heap in heaps if heap not in touched]
        heaps.append([*(r for heap in touched for r in heap), rect])
    return heaps
