"""The six small panels: a metric against the step, raw values faint and a smoothed line strong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from papo_fast.report.naming import BLUE, ORANGE, NamedRun
from papo_fast.report.wording import GREY, INK
from papo_fast.run.files import Run
from papo_fast.run.metrics import Row

GRID = "#e4e4e4"
ALARM = "#CC0000"
FAINT, FAINT_BESIDE = 0.28, 0.16


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[tuple[str, str, str], ...]
    """(key of the metrics row, label at the line's end, colour); one line needs no label."""
    percent: bool = False
    """Shares in [0, 1] are drawn as percentages."""


PANELS = (
    Panel("Reward", (("reward", "", BLUE),)),
    Panel("Perception KL, nats", (("kl_prcp", "", BLUE),)),
    Panel(
        "Entropy, nats",
        (("entropy", "real", BLUE), ("aug_entropy", "corrupted", ORANGE)),
    ),
    Panel("Accuracy in training, %", (("accuracy", "", BLUE),), percent=True),
    Panel("Response length, tokens", (("response_length", "", BLUE),)),
    Panel(
        "Clipped tokens, %",
        (("clip_fraction_high", "high", BLUE), ("clip_fraction_low", "low", ORANGE)),
        percent=True,
    ),
)  # two rows of three; lines that need a label stand on the right, where there is room for it
GRADIENT = Panel("Gradient norm", (("grad_norm", "", BLUE),))


def panels(rows: Sequence[Row]) -> tuple[Panel, ...]:
    """The six panels; the gradient norm takes the length's place if no length was logged."""
    if any(row.get("response_length") is not None for row in rows):
        return PANELS
    return tuple(GRADIENT if panel.lines[0][0] == "response_length" else panel for panel in PANELS)


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Gaussian average over neighbours, `width` steps of standard deviation; NaNs are left out.

    `values` is (n,) float; the result is NaN only where no value lies within three widths.
    """
    reach = max(1, math.ceil(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    known = np.isfinite(values)
    weights = np.convolve(known.astype(float), kernel)[reach:-reach]
    total = np.convolve(np.where(known, values, 0.0), kernel)[reach:-reach]
    return np.where(weights > 1e-9, total / np.maximum(weights, 1e-9), np.nan)


def column(rows: Sequence[Row], key: str) -> np.ndarray:
    """(n,) float64: the metric of each row, NaN where it is missing."""
    values = [row.get(key) for row in rows]
    return np.array([math.nan if v is None else float(v) for v in values], dtype=float)


@dataclass(frozen=True)
class Line:
    """One metric of one run against its steps, both (n,) float64; values are NaN where missing."""

    steps: np.ndarray
    values: np.ndarray
    label: str
    """Stands at the line's end, if it is not empty."""
    colour: str
    dashed: bool = False
    faint: float = FAINT
    """Opacity of the raw values behind the smoothed ones."""


def lines_of(panel: Panel, run: Run) -> list[Line]:
    """The panel's lines of one run, each in a colour of its own."""
    scale = 100.0 if panel.percent else 1.0
    steps = steps_of(run)
    return [
        Line(steps, column(run.rows, key) * scale, label, colour)
        for key, label, colour in panel.lines
    ]


def lines_beside(panel: Panel, runs: Sequence[NamedRun]) -> list[Line]:
    """The panel's lines of several runs: one colour a run, dashed for the panel's second metric."""
    return [
        replace(
            line,
            label="" if number else named.name,
            colour=named.colour,
            dashed=number > 0,
            faint=FAINT_BESIDE,
        )
        for named in runs
        for number, line in enumerate(lines_of(panel, named.run))
    ]


def steps_of(run: Run) -> np.ndarray:
    return np.array([row.get("step") or i for i, row in enumerate(run.rows, start=1)], dtype=float)


def draw_panel(
    axes: Axes,
    panel: Panel,
    lines: Sequence[Line],
    alarms: Sequence[tuple[np.ndarray, str]],
    last_row: bool,
    lowest: float = 0.0,
) -> None:
    """Draw `lines` into `axes`; says so where there is nothing to draw.

    Args:
        alarms: steps to mark at the bottom, and the colour of the marks.
        lowest: share of the panel's height below which no name of a line stands.
    """
    _style(axes, panel.title, last_row)
    drawn: list[tuple[float, str, str]] = []
    seen: list[np.ndarray] = []
    steps: list[np.ndarray] = []
    for line in lines:
        known = np.isfinite(line.values)
        if not known.any():
            continue
        smoothed = np.where(known, smooth(line.values, max(0.8, len(known) / 30)), np.nan)
        axes.plot(line.steps, line.values, color=line.colour, alpha=line.faint, linewidth=0.9)
        axes.plot(
            line.steps[known],
            smoothed[known],
            color=line.colour,
            linewidth=2.0,
            linestyle=(0, (3, 1.2)) if line.dashed else "-",
            solid_capstyle="round",
            marker="o" if known.sum() < 4 else None,
            markersize=4,
        )
        drawn.append((float(smoothed[known][-1]), line.label, line.colour))
        # A single spike must not flatten the rest: it may leave the panel.
        low, high = np.percentile(line.values[known], [2, 98])
        reach = 0.5 * (high - low)
        seen += [smoothed[known], np.clip(line.values[known], low - reach, high + reach)]
        steps.append(line.steps)
    if not drawn:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, "not recorded", transform=axes.transAxes,
            ha="center", va="center", fontsize=8.5, color=GREY,
        )  # fmt: skip
        return
    _limits(axes, np.concatenate(steps), np.concatenate(seen))
    _end_labels(axes, drawn, lowest)
    for marked, colour in alarms:
        if len(marked):
            axes.plot(
                marked, [0.0] * len(marked), transform=axes.get_xaxis_transform(), clip_on=False,
                linestyle="none", marker="^", markersize=4.5, color=colour, markeredgewidth=0,
                zorder=5,
            )  # fmt: skip


def say_what_is_dashed(axes: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    """In the upper right corner, where most curves leave room, if such a line was drawn."""
    if any(line.dashed and np.isfinite(line.values).any() for line in lines):
        axes.text(
            0.99, 0.97, f"dashed: {panel.lines[1][1]}", transform=axes.transAxes,
            fontsize=8, color=GREY, ha="right", va="top",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip


def alarm_steps(run: Run) -> np.ndarray:
    return steps_of(run)[[bool(row.get("alarms")) for row in run.rows]]


def _style(axes: Axes, title: str, last_row: bool) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, color=INK, fontweight="bold", pad=5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, labelcolor=GREY, pad=3)
    axes.locator_params(axis="y", nbins=5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    if last_row:
        axes.set_xlabel("step", fontsize=8.5, color=GREY, labelpad=2)


def _limits(axes: Axes, steps: np.ndarray, seen: np.ndarray) -> None:
    low, high = float(seen.min()), float(seen.max())
    flat = high - low <= 1e-9 * max(1.0, abs(high))
    if 0 <= low < 0.3 * high or (flat and low >= 0):
        low = 0.0
    span = high - low or 1.0
    high = low + span
    axes.set_ylim(low - (0.03 if low == 0 else 0.08) * span, high + 0.1 * span)
    first, last = float(steps.min()), float(steps.max())
    room = max(0.02 * (last - first), 0.5 if first == last else 0.0)
    axes.set_xlim(first - room, last + room)


def _end_labels(axes: Axes, drawn: list[tuple[float, str, str]], lowest: float) -> None:
    """Write each line's name at its end, moved apart where two ends are close."""
    labelled = sorted(entry for entry in drawn if entry[1])
    bottom, top = axes.get_ylim()
    places = spread([(y - bottom) / (top - bottom) for y, _, _ in labelled], 0.13, lowest)
    for place, (_, label, colour) in zip(places, labelled, strict=True):
        axes.text(
            1.015, place, label, transform=axes.transAxes, color=colour,
            fontsize=8.5, fontweight="bold", ha="left", va="center", parse_math=False,
        )  # fmt: skip


def spread(places: Sequence[float], gap: float, lowest: float = 0.0) -> list[float]:
    """Ascending `places` in [0, 1], moved apart to at least `gap` and as little as that takes.

    `gap` is one line of text, whose middle stands at a place, and never below `lowest`.
    """
    places = [min(max(place, 0.03, lowest), 0.97) for place in places]
    # neighbours that are too close share a stretch, whose middle is the middle of theirs
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1:
            below, above = (_stretch(group, gap, lowest) for group in groups[-2:])
            if below[-1] + gap <= above[0]:
                break
            last = groups.pop()
            groups[-1] += last
    return [place for group in groups for place in _stretch(group, gap, lowest)]


def _stretch(group: Sequence[float], gap: float, lowest: float) -> list[float]:
    if len(group) == 1:
        return list(group)
    half = gap * (len(group) - 1) / 2
    middle = min(max(sum(group) / len(group), lowest + half), 1 - half)
    return [middle - half + gap * i for i in range(len(group))]
