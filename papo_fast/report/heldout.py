"""Held-out accuracies and errors of several runs as bars, one panel for each kind of question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from papo_fast.report.naming import NamedRun
from papo_fast.report.wording import INK, kind_name, printable, text_width
from papo_fast.run.files import Run

BAR, BETWEEN = 0.16, 0.1  # inches: a bar, and the room between two groups of bars
TITLE = 0.3
NAMES = 0.85  # inches left of the bars, for the groups' names
COLUMNS, GAP = 3, 0.3
BELOW = 0.12
ERRORS = "Wrong answers, vision-dependent, %"
TITLE_FONT = FontProperties(family="DejaVu Sans", size=9.5, weight="bold")


@dataclass(frozen=True)
class BarGroup:
    """One quantity of every run."""

    name: str
    shares: tuple[float | None, ...]
    faint: bool
    """Not what the run came to: before training, or with corrupted pictures."""


@dataclass(frozen=True)
class BarPanel:
    title: str
    groups: tuple[BarGroup, ...]

    @property
    def height(self) -> float:
        return sum(BAR * len(group.shares) + BETWEEN for group in self.groups)


def bar_panels(runs: Sequence[Run]) -> list[BarPanel]:
    """What the runs' summaries hold: accuracy for each kind of question, then the errors."""

    def group(name: str, key: str, kind: str | None = None, faint: bool = True) -> BarGroup | None:
        values = [run.summary.get(key) for run in runs]
        if kind is not None:
            values = [(value or {}).get(kind) for value in values]
        return None if all(v is None for v in values) else BarGroup(name, tuple(values), faint)

    found = []
    for kind in kinds(runs):
        groups = (
            group("before", "accuracy_before", kind),
            group("after", "accuracy_after", kind, faint=False),
            group("corrupted\nimages", "accuracy_after_corrupted", kind),
        )
        found.append((f"Right answers, {kind_name(kind)}, %", groups))
    errors = (
        group("misread\nbefore", "perception_errors_before"),
        group("misread\nafter", "perception_errors_after", faint=False),
        group("read right\nbefore", "reasoning_errors_before"),
        group("read right\nafter", "reasoning_errors_after", faint=False),
    )
    found.append((ERRORS, errors))
    panels = [BarPanel(title, tuple(filter(None, groups))) for title, groups in found]
    return [panel for panel in panels if panel.groups]


def kinds(runs: Sequence[Run]) -> list[str]:
    """The kinds of question that any of the runs was evaluated on."""
    keys = ("accuracy_before", "accuracy_after", "accuracy_after_corrupted")
    return list(
        dict.fromkeys(k for run in runs for key in keys for k in run.summary.get(key) or {})
    )


class Bars:
    """The panels in rows of three, laid out when made, so that the height is known (inches)."""

    def __init__(self, named: Sequence[NamedRun], width: float):
        self.named = named
        panels = bar_panels([entry.run for entry in named])
        self.rows = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
        self.column = (width - GAP * (COLUMNS - 1)) / COLUMNS
        self.height = sum(self._row_height(row) for row in self.rows)
        shares = [s for p in panels for g in p.groups for s in g.shares if s is not None]
        self.longest = max([0.1, *shares])

    def _row_height(self, row: Sequence[BarPanel]) -> float:
        return TITLE + max(panel.height for panel in row) + BELOW

    def draw(self, figure: Figure, left: float, top: float) -> None:
        """Draw with the upper left corner at (`left`, `top`), in inches from the lower left."""
        wide, high = figure.get_size_inches()
        for row in self.rows:
            for number, panel in enumerate(row):
                x = left + number * (self.column + GAP)
                figure.text(
                    x / wide, (top - 0.13) / high, _one_line(panel.title, self.column),
                    fontproperties=TITLE_FONT, color=INK, parse_math=False,
                )  # fmt: skip
                y = top - TITLE - panel.height
                box = (x + NAMES, y, self.column - NAMES, panel.height)
                axes = figure.add_axes((box[0] / wide, y / high, box[2] / wide, box[3] / high))
                self._draw_panel(axes, panel)
            top -= self._row_height(row)

    def _draw_panel(self, axes: Axes, panel: BarPanel) -> None:
        axes.set_axis_off()
        # the unit of both axes' room: inches down, and shares with room for a number behind them
        axes.set_ylim(panel.height, 0)
        axes.set_xlim(0, 1.28 * self.longest)
        y = 0.0
        for group in panel.groups:
            middle = y + BAR * len(group.shares) / 2
            axes.text(
                -0.03 * self.longest, middle, group.name,
                fontsize=8, color=INK, ha="right", va="center", linespacing=1.05,
            )  # fmt: skip
            for share, entry in zip(group.shares, self.named, strict=True):
                y += BAR
                centre = y - BAR / 2
                if share is not None:
                    axes.barh(
                        centre, share, height=0.82 * BAR, color=entry.colour,
                        alpha=0.45 if group.faint else 1.0, linewidth=0,
                    )  # fmt: skip
                axes.text(
                    (share or 0.0) + 0.02 * self.longest, centre,
                    "–" if share is None else f"{100 * share:.1f}",
                    fontsize=8, fontweight="normal" if group.faint else "bold",
                    color=INK, ha="left", va="center_baseline",
                )  # fmt: skip
            y += BETWEEN
        axes.plot([0, 0], [0, panel.height - BETWEEN], color="#b0b0b0", linewidth=0.8)


def _one_line(text: str, width: float) -> str:
    """`text`, cut where it is wider than `width` inches."""
    text = printable(text, TITLE_FONT)
    if text_width(text, TITLE_FONT) <= 72 * width:
        return text
    while text and text_width(text + "…", TITLE_FONT) > 72 * width:
        text = text[:-1]
    return text + "…"
