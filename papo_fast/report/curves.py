"""The six small panels: a metric against the step, raw values faint and a smoothed line strong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from papo_fast.run.metrics import Row

INK, GREY, GRID = "#222222", "#707070", "#e4e4e4"
# Okabe and Ito's palette: told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


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


def draw_panel(axes: Axes, panel: Panel, rows: Sequence[Row], last_row: bool) -> None:
    """Draw `panel` into `axes`; says so where there is nothing to draw."""
    _style(axes, panel.title, last_row)
    steps = np.array([row.get("step") or i for i, row in enumerate(rows, start=1)], dtype=float)
    drawn: list[tuple[float, str, str]] = []
    seen: list[np.ndarray] = []
    for key, label, colour in panel.lines:
        values = column(rows, key) * (100.0 if panel.percent else 1.0)
        known = np.isfinite(values)
        if not known.any():
            continue
        line = np.where(known, smooth(values, max(0.8, len(values) / 30)), np.nan)
        axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.9)
        axes.plot(
            steps[known],
            line[known],
            color=colour,
            linewidth=2.0,
            solid_capstyle="round",
            marker="o" if known.sum() < 4 else None,
            markersize=4,
        )
        drawn.append((float(line[known][-1]), label, colour))
        # A single spike must not flatten the rest: it may leave the panel.
        low, high = np.percentile(values[known], [2, 98])
        reach = 0.5 * (high - low)
        seen += [line[known], np.clip(values[known], low - reach, high + reach)]
    if not drawn:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, "not recorded", transform=axes.transAxes,
            ha="center", va="center", fontsize=8.5, color=GREY,
        )  # fmt: skip
        return
    _limits(axes, steps, np.concatenate(seen))
    _end_labels(axes, drawn)
    alarms = [step for step, row in zip(steps, rows, strict=True) if row.get("alarms")]
    if alarms:
        axes.plot(
            alarms, [0.0] * len(alarms), transform=axes.get_xaxis_transform(), clip_on=False,
            linestyle="none", marker="^", markersize=4.5, color="#CC0000", markeredgewidth=0,
            zorder=5,
        )  # fmt: skip


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


def _end_labels(axes: Axes, drawn: list[tuple[float, str, str]]) -> None:
    """Write each line's name at its end, moved apart where two ends are close."""
    labelled = sorted(entry for entry in drawn if entry[1])
    bottom, top = axes.get_ylim()
    places = [min(max((y - bottom) / (top - bottom), 0.03), 0.97) for y, _, _ in labelled]
    gap = 0.13  # of the panel's height: one line of text
    if len(places) == 2 and places[1] - places[0] < gap:
        middle = min(max(sum(places) / 2, gap / 2), 1 - gap / 2)
        places = [middle - gap / 2, middle + gap / 2]
    for place, (_, label, colour) in zip(places, labelled, strict=True):
        axes.text(
            1.015, place, label, transform=axes.transAxes, color=colour,
            fontsize=8.5, fontweight="bold", ha="left", va="center",
        )  # fmt: skip
