"""Several runs in one picture or table: what each is called, and its colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.font_manager import FontProperties

from papo_fast.errors import InputError
from papo_fast.report.wording import printable
from papo_fast.run.files import Run

# Okabe and Ito's palette: told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#333333"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK)
FONT = FontProperties(family="DejaVu Sans", weight="bold")
LONGEST = 16  # characters of a name that stands at the end of a curve


@dataclass(frozen=True)
class NamedRun:
    run: Run
    name: str
    colour: str


def name_runs(runs: Sequence[Run]) -> list[NamedRun]:
    """Each run with a colour and its preset's name.

    Runs of one preset are told apart by their seeds, or by their folders where these are equal too.

    Raises:
        InputError: the same run twice, or more runs than there are colours.
    """
    if len(runs) > len(COLOURS):
        raise InputError(
            f"{len(runs)} runs in one picture, but there are colours for {len(COLOURS)}: name at "
            f"most {len(COLOURS) - 1} behind --beside"
        )
    folders = Counter(run.path.resolve() for run in runs)
    twice = [str(folder) for folder, count in folders.items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]} is named twice: --beside takes other runs")
    names = [str(run.said("preset") or run.path.resolve().name) for run in runs]
    names = [printable(name, FONT) or "run" for name in names]
    for more in ("seed", "folder"):
        counts = Counter(names)
        names = [
            name if counts[name] == 1 else _longer(run, more, name)
            for run, name in zip(runs, names, strict=True)
        ]
    return [
        NamedRun(run, name if len(name) <= LONGEST else name[: LONGEST - 1] + "…", colour)
        for run, name, colour in zip(runs, names, COLOURS, strict=False)
    ]


def _longer(run: Run, more: str, name: str) -> str:
    if more == "folder":
        return printable(run.path.resolve().name, FONT)
    return name if run.said("seed") is None else f"{name} {run.said('seed')}"
