"""The strip of examples: picture, corrupted picture, question, response, reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from PIL import Image, UnidentifiedImageError

from papo_fast.report.curves import GREEN, GREY, INK, RED
from papo_fast.report.wording import fit
from papo_fast.run.metrics import Row

COUNT = 6
WRONG = 2  # at least so many wrong ones, if there are any
GAP = 0.14  # inches between two columns
TALLEST = 0.9  # inches a picture may be high
QUESTION_LINES, RESPONSE_LINES = 6, 7
QUESTION_FONT = FontProperties(family="DejaVu Sans", size=8, weight="bold")
RESPONSE_FONT = FontProperties(family="DejaVu Sans Mono", size=7.5)
SMALL_FONT = FontProperties(family="DejaVu Sans", size=7.5)
LINE = 1.28  # of the font size


def choose(examples: Sequence[Row]) -> list[Row]:
    """Up to six examples, right ones first; those from after training if there are any.

    Preferred in this order: not the same question about the same picture again, vision-dependent
    questions, questions worded differently. Two places are kept for wrong answers.
    """
    when = "after" if any(row.get("when") == "after" for row in examples) else "before"
    rows = [row for row in examples if row.get("when") == when]
    seen: Counter[str] = Counter()
    ranked = []
    for row in rows:
        question = str(row.get("problem"))
        sample = f"{question}\n{row.get('reading')}\n{row.get('image')}"
        other = row.get("kind") != "vision_dependent"
        ranked.append(((seen[sample] > 0, other, seen[question]), row))
        seen.update({question, sample})
    ranked.sort(key=lambda pair: pair[0])  # stable: the order of the file decides among equals
    right = [row for _, row in ranked if is_right(row)]
    wrong = [row for _, row in ranked if not is_right(row)]
    places = max(min(len(wrong), WRONG), COUNT - len(right))
    return right[: COUNT - min(places, len(wrong))] + wrong[:places]


def is_right(row: Row) -> bool:
    return (row.get("accuracy") or 0.0) >= 0.5


@dataclass(frozen=True)
class Card:
    """One example, its text cut to fit the column."""

    row: Row
    question: list[str]
    response: list[str]
    verdict: list[str]
    pictures: list[Image.Image | str]
    """Picture and corrupted picture, or why there is none; a run without the aug stream has one."""


class Strip:
    """The chosen examples side by side. Laid out when made, so that its height is known.

    `width` and the heights are in inches; `run_dir` is where the pictures' paths start.
    """

    def __init__(self, run_dir: Path, rows: Sequence[Row], width: float):
        self.width = width
        self.column = (width - GAP * (COUNT - 1)) / COUNT
        inner = self.column * 72 - 1
        keys = ["image"] + ["corrupted"] * any(row.get("corrupted") for row in rows)
        self.with_aug = len(keys) == 2
        self.cards = [
            Card(
                row,
                fit(_said(row, "problem"), QUESTION_FONT, inner, QUESTION_LINES, tail=1),
                fit(_said(row, "response"), RESPONSE_FONT, inner, RESPONSE_LINES, tail=2),
                [line for said in _verdict(row) for line in fit(said, SMALL_FONT, inner, 2, 0)],
                [_picture(run_dir, row.get(key), key) for key in keys],
            )
            for row in rows
        ]
        images = [p for card in self.cards for p in card.pictures if isinstance(p, Image.Image)]
        widest = max((image.width for image in images), default=1)
        # One scale for all, so that patches are of one size across the strip; pictures of very
        # different sizes are fitted one by one.
        self._one_scale = widest <= 3 * min((image.width for image in images), default=1)
        self._widest = widest
        self.picture_height = max((self._size(p)[1] for p in images), default=0.2)
        self._question_height = self._height("question", QUESTION_FONT)
        self._response_height = self._height("response", RESPONSE_FONT)
        self.height = (
            0.1
            + len(keys) * (self.picture_height + 0.07)
            + 0.03
            + self._question_height
            + 0.06
            + self._response_height
            + 0.06
            + self._height("verdict", SMALL_FONT)
        )

    def _height(self, part: str, font: FontProperties) -> float:
        lines = max((len(getattr(card, part)) for card in self.cards), default=0)
        return lines * font.get_size_in_points() * LINE / 72

    def _size(self, image: Image.Image) -> tuple[float, float]:
        scale = self.column / (self._widest if self._one_scale else image.width)
        scale = min(scale, TALLEST / image.height)
        return image.width * scale, image.height * scale

    def draw(self, figure: Figure, left: float, top: float) -> None:
        """Draw with the upper left corner at (`left`, `top`), in inches from the lower left."""
        for index, card in enumerate(self.cards):
            x = left + index * (self.column + GAP)
            colour = GREEN if is_right(card.row) else RED
            wide, high = figure.get_size_inches()
            figure.add_artist(
                Rectangle((x / wide, (top - 0.03) / high), self.column / wide, 0.03 / high,
                          facecolor=colour, edgecolor="none")
            )  # fmt: skip
            y = top - 0.1
            for picture in card.pictures:
                self._draw_picture(figure, picture, x, y)
                y -= self.picture_height + 0.07
            y -= 0.03
            _lines(figure, card.question, x, y, QUESTION_FONT, INK)
            y -= self._question_height + 0.06
            _lines(figure, card.response, x, y, RESPONSE_FONT, INK)
            y -= self._response_height + 0.06
            _lines(figure, card.verdict, x, y, SMALL_FONT, colour)

    def _draw_picture(
        self, figure: Figure, picture: Image.Image | str, left: float, top: float
    ) -> None:
        wide, high = figure.get_size_inches()
        if isinstance(picture, str):
            lines = fit(picture, SMALL_FONT, self.column * 72 - 1, 2, tail=0)
            _lines(figure, lines, left, top, SMALL_FONT, GREY)
            return
        w, h = self._size(picture)
        axes = figure.add_axes((left / wide, (top - h) / high, w / wide, h / high))
        enlarged = w * figure.dpi >= picture.width
        axes.imshow(picture, interpolation="nearest" if enlarged else "antialiased", aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color="#c8c8c8", linewidth=0.6)


def _said(row: Row, key: str) -> str:
    return str(row.get(key) or "").strip() or "(empty)"


def _verdict(row: Row) -> list[str]:
    reward = row.get("reward")
    earned = "" if reward is None else f", reward {reward:.2f}"
    if is_right(row):
        return [f"✓ right{earned}"]
    return [f"✗ wrong{earned}", f"expected {row.get('answer', '?')}"]


def _picture(run_dir: Path, name: str | None, key: str) -> Image.Image | str:
    if name is None:
        return "no image" if key == "image" else "no corrupted image"
    try:
        with Image.open(run_dir / name) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        return f"{name} is missing"
    except (UnidentifiedImageError, OSError) as error:
        return f"{name}: {error}"


def _lines(
    figure: Figure, lines: Sequence[str], left: float, top: float, font: FontProperties, colour: str
) -> None:
    wide, high = figure.get_size_inches()
    step = font.get_size_in_points() * LINE / 72
    for number, line in enumerate(lines):
        figure.text(
            left / wide,
            (top - (number + 0.8) * step) / high,
            line,
            fontproperties=font,
            color=colour,
            ha="left",
            va="baseline",
            parse_math=False,
        )
