"""Pictures of docs/evidence.md: differences to GRPO with intervals, and what γ does."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt

from bench.evidence.arms import ARMS, BEYOND, GAMMAS
from bench.evidence.outcomes import OUTCOMES, Outcome, differences

GOOD, BAD, INK = "#2a7f3f", "#b03030", "#222222"


def draw_differences(task: str, found: dict[str, dict[int, dict]], path: Path) -> Path:
    """One panel for each outcome, one line for each arm: mean and 95 % interval, in points."""
    outcomes = list(OUTCOMES[task].values())
    names = [name for name in ARMS if name in found and name != "grpo"]
    seeds = sorted({len(found[name]) for name in names})
    figure, panels = plt.subplots(
        1, len(outcomes), figsize=(1.8 + 2.3 * len(outcomes), 1.2 + 0.28 * len(names)), sharey=True
    )
    for axes, outcome in zip(panels, outcomes, strict=True):
        _draw_panel(axes, outcome, differences(outcome, found), names)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    said = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    figure.suptitle(f"{task}: points more or fewer than GRPO, {said} paired seeds", fontsize=10)
    return _saved(figure, path)


def _draw_panel(axes, outcome: Outcome, against: dict, names: list[str]) -> None:
    axes.axvline(0, color="#909090", linewidth=0.8)
    for y, name in enumerate(names):
        found = against.get(name)
        if found is None:
            continue
        better = outcome.good * found.mean > 0
        colour = GOOD if better else BAD
        if not math.isnan(found.low):
            axes.plot([100 * found.low, 100 * found.high], [y, y], color=colour, linewidth=1.6)
        certain = found.adjusted < 0.05
        axes.plot(
            100 * found.mean, y, "o", color=colour, markerfacecolor=colour if certain else "white"
        )
    axes.set_title(outcome.says, fontsize=8, color=INK)
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_gammas(tuned: dict[str, dict[str, list[dict]]], path: Path) -> Path:
    """Accuracy, honesty check and largest KL of every arm against γ, on development seeds."""
    vision, honest = OUTCOMES["digits"]["vision"], OUTCOMES["digits"]["honesty"]
    quantities = (
        ("right, vision-dependent, %", lambda run: 100 * vision.of(run)),
        ("honesty check, %", lambda run: 100 * honest.of(run)),
        ("largest KL, nats", lambda run: run["kl_prcp_largest"]),
    )
    figure, panels = plt.subplots(1, len(quantities), figsize=(11, 3.6))
    colours = plt.get_cmap("tab10").colors
    plain = [name for name in tuned if not name.endswith("-entropy")]
    for name, settings in tuned.items():
        points = sorted(
            (float(setting.removeprefix("gamma-")), runs)
            for setting, runs in settings.items()
            if setting.startswith("gamma-") and runs
        )
        if not points:
            continue
        base = name.removesuffix("-entropy")
        style = {"color": colours[plain.index(base) % 10], "ls": "-" if base == name else "--"}
        for axes, (_, of) in zip(panels, quantities, strict=True):
            values = [sum(map(of, runs)) / len(runs) for _, runs in points]
            axes.plot([g for g, _ in points], values, marker="o", ms=3, label=name, **style)
    for axes, (title, _) in zip(panels, quantities, strict=True):
        axes.set_xscale("log")
        gammas = [s.name.removeprefix("gamma-") for s in (*GAMMAS, *BEYOND)]
        axes.set_xticks([float(g) for g in gammas], [g.removeprefix("0") for g in gammas])
        axes.minorticks_off()
        axes.set_xlabel("γ", fontsize=8)
        axes.set_title(title, fontsize=9, color=INK)
        axes.tick_params(labelsize=7)
    panels[-1].set_yscale("log")
    panels[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return _saved(figure, path)


def _saved(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path
