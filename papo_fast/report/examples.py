"""The strip of examples: picture, corrupted picture, question, response, reward."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from PIL import Image, UnidentifiedImageError

from papo_fast.report.naming import GREEN, RED
from papo_fast.report.wording import GREY, INK, fit
from papo_fast.rewards.reading import reading
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

    A right answer whose reading is wrong was luck and is left out. Preferred in this order: not the
    same question about the same picture again, questions that training put right, vision-dependent
    ones, questions worded differently, and the order of the file. Two places are kept for wrong
    answers.
    """
    when = "after" if any(row.get("when") == "after" for row in examples) else "before"
    rows = [row for row in examples if row.get("when") == when and not is_lucky(row)]
    earlier = before_training(examples)
    right = [row for row in rows if is_right(row)]
    wrong = [row for row in rows if not is_right(row)]
    places = max(min(len(wrong), WRONG), COUNT - len(right))
    chosen: list[Row] = []
    seen: Counter[str] = Counter()
    for left, count in ((right, COUNT - min(places, len(wrong))), (wrong, places)):
        left = list(left)
        for _ in range(min(count, len(left))):
            ranks = [_rank(row, earlier.get(id(row)), seen) for row in left]
            row = left.pop(ranks.index(min(ranks)))
            seen.update({_question(row), _sample(row)})
            chosen.append(row)
    return chosen


def how_chosen(examples: Sequence[Row], chosen: Sequence[Row]) -> list[str]:
    """What a reader has to know of the choice, in short sentences."""
    notes = []
    earlier = before_training(examples)
    if any(_put_right(row, earlier.get(id(row))) for row in chosen):
        notes.append("questions that training put right come first among the examples")
    when = chosen[0].get("when") if chosen else None
    lucky = sum(row.get("when") == when and is_lucky(row) for row in examples)
    if lucky:
        are = "answer with a wrong reading is" if lucky == 1 else "answers with a wrong reading are"
        notes.append(f"{lucky} right {are} left out")
    return notes


def _put_right(row: Row, earlier: Row | None) -> bool:
    return is_right(row) and earlier is not None and not is_right(earlier)


def _rank(row: Row, earlier: Row | None, seen: Counter[str]) -> tuple[bool, bool, bool, int]:
    other = row.get("kind") != "vision_dependent"
    return seen[_sample(row)] > 0, not _put_right(row, earlier), other, seen[_question(row)]


def _question(row: Row) -> str:
    return str(row.get("problem"))


def _sample(row: Row) -> str:
    return f"{_question(row)}\n{row.get('reading')}\n{row.get('image')}"


def before_training(examples: Sequence[Row]) -> dict[int, Row]:
    """By the `id` of an example from after training, the one of its question from before."""
    waiting: dict[str, list[Row]] = defaultdict(list)
    for row in examples:
        if row.get("when") == "before":
            waiting[_same(row)].append(row)
    pairs = {}
    for row in examples:
        if row.get("when") == "after" and waiting[_same(row)]:
            pairs[id(row)] = waiting[_same(row)].pop(0)
    return pairs


def _same(row: Row) -> str:
    return json.dumps([row.get(key) for key in ("problem", "kind", "answer", "reading")])


def is_lucky(row: Row) -> bool:
    """Whether the answer is right although the picture was read wrong."""
    truth = row.get("reading")
    if truth is None or not is_right(row):
        return False
    # runs of earlier versions do not say how their prompts ended
    return reading(str(row.get("response")), str(row.get("prompt_end") or "")) != truth


def is_right(row: Row) -> bool:
    return (row.get("accuracy") or 0.0) >= 0.5


@dataclass(frozen=True)
class Card:
    """One example, its text cut to fit the column."""

    row: Row
    question: list[str]
    response: list[str]
    verdict: list[str]
    earlier: list[str]
    """The answer to the same question before training, or nothing."""
    pictures: list[Image.Image | str]
    """Picture and corrupted picture, or why there is none; a run without the aug stream has one."""


class Strip:
    """The chosen examples side by side. Laid out when made, so that its height is known.

    `width` and the heights are in inches; `run_dir` is where the pictures' paths start; `earlier`
    holds the answers from before training, as `before_training` gives them.
    """

    def __init__(
        self,
        run_dir: Path,
        rows: Sequence[Row],
        width: float,
        earlier: dict[int, Row] | None = None,
    ):
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
                _earlier((earlier or {}).get(id(row)), inner),
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
        self._earlier_height = self._height("earlier", RESPONSE_FONT)
        self._earlier_height += 0.06 if self._earlier_height else 0.0
        self.height = (
            0.1
            + len(keys) * (self.picture_height + 0.07)
            + 0.03
            + self._question_height
            + 0.06
            + self._response_height
            + 0.06
            + self._height("verdict", SMALL_FONT)
            + self._earlier_height
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
            _lines(figure, card.earlier, x, y, RESPONSE_FONT, GREY)
            y -= self._earlier_height
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


def _earlier(row: Row | None, width: float) -> list[str]:
    if row is None:
        return []
    lines = fit(_said(row, "response"), RESPONSE_FONT, width, RESPONSE_LINES - 2, tail=2)
    return [f"before: {'✓ right' if is_right(row) else '✗ wrong'}", *lines]


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
