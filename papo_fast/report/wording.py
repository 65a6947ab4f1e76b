"""How the table and the picture put things into words, and how text is made to fit."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from matplotlib import font_manager, ft2font
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

INK, GREY = "#222222", "#707070"
DPI = 150  # of the picture; a text's width depends on it a little, through hinting
BREAKS = re.compile(r"(?<=[>},;/])|(?=[\\<])")  # where `<think>7+5</think>\boxed{12}` may break
MISSING = "\u25af"  # a box, for characters that the font cannot draw


def kind_name(kind: str) -> str:
    return kind.replace("_", "-")


def duration(seconds: float) -> str:
    """`45 s`, `5 min 12 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@cache
def _font(name: str) -> ft2font.FT2Font:
    return ft2font.FT2Font(name)


def printable(text: str, font: FontProperties) -> str:
    """`text` with one space for any run of white space and a box for what `font` cannot draw.

    Joiners, variation selectors and other marks without a width of their own are removed.
    """
    face = _font(font_manager.findfont(font))
    drawn = []
    for char in " ".join(text.split()):
        if unicodedata.category(char) in ("Mn", "Me", "Cf"):
            continue
        drawable = unicodedata.category(char)[0] != "C" and face.get_char_index(ord(char))
        drawn.append(char if drawable else MISSING)
    return "".join(drawn)


def wrap(text: str, font: FontProperties, width: float) -> list[str]:
    """Lines of `text` that are at most `width` points wide in `font`.

    Split between words, else around tags and LaTeX commands, and in a piece that is wider than a
    line anywhere. `text` must be `printable`.
    """
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        space = " "
        for piece in filter(None, BREAKS.split(word)):
            joined = line + space + piece if line else piece
            space = ""
            if text_width(joined, font) <= width:
                line = joined
                continue
            if line:
                lines.append(line)
            line = ""
            for char in piece:
                if line and text_width(line + char, font) > width:
                    lines.append(line)
                    line = ""
                line += char
    return [*lines, line] if line else lines


@cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, DPI)


def text_width(text: str, font: FontProperties) -> float:
    return _renderer().get_text_width_height_descent(text, font, ismath=False)[0] * 72 / DPI


def fit(text: str, font: FontProperties, width: float, limit: int, tail: int) -> list[str]:
    """`text` made printable and wrapped to at most `limit` lines.

    Of a longer text the first lines and the last `tail` are kept, and a line between them says how
    much was left out: the end of a response holds its answer.
    """
    text = printable(text, font)
    # Far more than fits: what is between is not worth measuring.
    lines = wrap(text if len(text) <= 600 else f"{text[:350]} {text[-250:]}", font, width)
    if len(lines) <= limit:
        return lines
    head, end = lines[: limit - tail - 1], lines[len(lines) - tail :]
    left_out = len(text) - sum(len(line) for line in head + end)
    return [*head, f"… {left_out} characters …", *end]
