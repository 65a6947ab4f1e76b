"""Questions about pictures of handwritten digits, written once in the schema of real data.

The handwriting is the UCI digits set that scikit-learn ships (1797 images of 8x8, 16 grey levels).
Test questions are drawn from images of digits that no training question uses. A picture is a row of
28x28 cells, which is one vision token each in Qwen2.5-VL's layout (14-pixel patches merged 2x2).

Kinds of question, as in the paper:

- `vision_dependent`: the numbers are only in the picture;
- `text_leaning`: the text gives the numbers, one of them, or two answers to choose from, so that a
  policy that does not look can guess.

A row of the parquet file has `problem`, `answer`, `images` (PNG bytes), `kind`, and `reading`: what
a model that sees the picture right writes between <think> and </think>.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from papo_fast.whole_files import written_whole

CELL = 28
MARGIN = 2
# Every picture has this many cells, and the question stands in front of it: what is read at one
# place of the response then always stands equally far behind it, which a small model learns first.
WIDTH = 5
KINDS = ("vision_dependent", "text_leaning")
# Which of the 1797 handwritten digits a split may use, of a fixed shuffle: the set is ordered by
# writer, roughly, and a test of other writers would measure the shift between them.
SPLITS = {"train": slice(0, 1097), "dev": slice(1097, 1297), "test": slice(1297, None)}
# Arithmetic comes twice as often as comparing and counting.
OPERATIONS = ("add", "add", "subtract", "subtract", "larger", "smaller", "count")


@dataclass(frozen=True)
class Question:
    problem: str
    answer: str
    kind: str
    reading: str
    symbols: str
    """What the picture shows from the left, one character a cell: a digit, `+`, `-` or a blank."""


class Handwriting:
    """Draws pictures, dark ink on white, from the handwriting of one side of the split."""

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        digits = load_digits()
        part = np.random.default_rng(0).permutation(len(digits.images))[SPLITS[split]]
        self.digits: dict[str, list[Image.Image]] = {str(d): [] for d in range(10)}
        for image, label in zip(digits.images[part], digits.target[part], strict=True):
            ink = Image.fromarray((255 - image * (255 / 16)).astype(np.uint8))
            side = CELL - 2 * MARGIN
            ink = ink.resize((side, side), Image.Resampling.BICUBIC)
            self.digits[str(int(label))].append(ink)

    def picture(self, symbols: str, rng: random.Random) -> Image.Image:
        """Grey picture of `symbols`, WIDTH cells wide."""
        picture = Image.new("L", (CELL * WIDTH, CELL), 255)
        for i, symbol in enumerate(symbols):
            if symbol.isdigit():
                ink = rng.choice(self.digits[symbol])
                picture.paste(ink, (i * CELL + MARGIN, MARGIN))
            else:
                picture.paste(_SIGNS[symbol], (i * CELL, 0))
        return picture


def _signs() -> dict[str, Image.Image]:
    blank = np.full((CELL, CELL), 255, np.uint8)
    minus, plus = blank.copy(), blank.copy()
    minus[13:15, 8:20] = plus[13:15, 8:20] = plus[8:20, 13:15] = 0
    return {" ": Image.fromarray(blank), "-": Image.fromarray(minus), "+": Image.fromarray(plus)}


_SIGNS = _signs()


def draw_question(kind: str, rng: random.Random) -> Question:
    """One question of `kind`, its operation drawn from `OPERATIONS`."""
    operation = rng.choice(OPERATIONS)
    if operation == "count":
        row = [str(rng.randrange(10)) for _ in range(rng.randint(3, 4))]
        target = rng.choice(row)
        # repeated often enough that 1 is not a safe guess
        row = [target if rng.random() < 0.35 else digit for digit in row]
        first, shown, ask = row[0], "".join(row), f"Count {target}."
        answer = shown.count(target)
        other = answer + 1 if answer == 1 else answer - 1
    elif operation in ("larger", "smaller"):
        a, b = rng.sample(range(100), 2)
        first, shown, ask = a, f"{a} {b}", f"Which is {operation}?"
        answer, other = (max(a, b), min(a, b)) if operation == "larger" else (min(a, b), max(a, b))
    else:
        a, b = rng.randrange(10), rng.randrange(10)
        if operation == "subtract":
            a, b = max(a, b) + rng.choice((0, 10)), min(a, b)
        first, ask = a, "Compute."
        shown = f"{a}+{b}" if operation == "add" else f"{a}-{b}"
        answer = a + b if operation == "add" else a - b
        other = abs(answer + rng.choice((-2, -1, 1, 2)))
        if other == answer:
            other += 1
    reading = shown.replace(" ", ",")
    if kind == "text_leaning":
        low, high = sorted((answer, other))
        ask += rng.choice((f" Given: {reading}", f" First: {first}", f" Choose: {low} or {high}"))
    return Question(ask + " <image>", str(answer), kind, reading, shown)


def write_questions(
    path: Path,
    n: int,
    split: str,
    seed: int,
    change: Callable[[int, Question, random.Random], Question] | None = None,
) -> None:
    """Write `n` questions, half of each kind in turn, to the parquet file `path`.

    The same arguments give the same file.

    Args:
        split: one of `SPLITS`; whose handwriting is used.
        change: what becomes of the question with this number. Its random numbers are its own, so
            that questions and pictures are the same with and without it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, rng_of_change = random.Random(f"{split}-{seed}"), random.Random(f"{split}-{seed}-change")
    handwriting = Handwriting(split)
    rows = []
    for i in range(n):
        question = draw_question(KINDS[i % 2], rng)
        png = io.BytesIO()
        handwriting.picture(question.symbols, rng).save(png, format="PNG")
        if change is not None:
            question = change(i, question, rng_of_change)
        rows.append(
            {
                "problem": question.problem,
                "answer": question.answer,
                "images": [png.getvalue()],
                "kind": question.kind,
                "reading": question.reading,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial)


def response(question_reading: str, answer: str) -> str:
    """The response that the warm start teaches: the reading first, then the boxed answer."""
    return f"<think>{question_reading}</think>\\boxed{{{answer}}}"
