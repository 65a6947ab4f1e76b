"""`report.png`: the curves of a run above a strip of its examples.

Drawn on a `Figure` of its own, without pyplot, so that a training process can draw it too.
Sizes are in inches: 10 wide at 150 dpi, so a README that shows it 1000 pixels wide has 100 to
the inch and the smallest print is 10 pixels high.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from papo_fast.report.curves import GREY, INK, draw_panel, panels
from papo_fast.report.examples import Strip, choose
from papo_fast.report.wording import DPI, duration, kind_name, printable, wrap
from papo_fast.run.files import REPORT, Run, read_run

WIDTH = 10.0
MARGIN = 0.35
TITLE, ACCURACY_LINE, BELOW_HEADER = 0.26, 0.2, 0.36
PANEL_HEIGHT, PANEL_GAP_X, PANEL_GAP_Y = 1.3, 0.5, 0.5
AXIS = 0.42  # below the lower panels: tick labels and "step"
HEADING = 0.3
NOTE_FONT = FontProperties(family="DejaVu Sans", size=7.5)
NOTE_LINE = 0.15
ACCURACY_FONT = FontProperties(family="DejaVu Sans", size=9)


def write_report(run_dir: Path) -> Path:
    """Draw `report.png` of a run, finished or not, from its files; returns the picture's path.

    What is missing is left out and named in a note at the bottom. Raises `InputError` as
    `read_run` does.
    """
    run = read_run(run_dir)
    path = run.path / REPORT
    partial = run.path / (REPORT + ".partial")
    with style.context("default", after_reset=True):  # a user's usetex or dark theme stays out
        draw(run).savefig(partial, format="png", dpi=DPI, facecolor="white")
    partial.replace(path)
    return path


def draw(run: Run) -> Figure:
    """The whole picture, as high as its content needs."""
    inner = WIDTH - 2 * MARGIN
    chosen = choose(run.examples)
    strip = Strip(run.path, chosen, inner) if chosen else None
    notes = _notes(run, inner)
    accuracy = wrap(printable(_accuracy(run), ACCURACY_FONT), ACCURACY_FONT, inner * 72)
    header = TITLE + ACCURACY_LINE * len(accuracy) + BELOW_HEADER
    grid = 2 * PANEL_HEIGHT + PANEL_GAP_Y + AXIS if run.rows else 0.0
    strip_height = HEADING + strip.height + 0.15 if strip else 0.0
    height = 0.2 + header + grid + 0.15 + strip_height + NOTE_LINE * len(notes) + 0.15
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)

    y = height - 0.2
    _header(figure, run, accuracy, y)
    y -= header
    if run.rows:
        _curves(figure, run, y)
        y -= grid
    y -= 0.15
    if strip:
        _heading(figure, strip, y)
        strip.draw(figure, MARGIN, y - HEADING)
        y -= strip_height
    for line in notes:
        y -= NOTE_LINE
        figure.text(
            MARGIN / WIDTH, y / height, line, fontproperties=NOTE_FONT, color=GREY, parse_math=False
        )
    return figure


def _header(figure: Figure, run: Run, accuracy: list[str], top: float) -> None:
    height = figure.get_size_inches()[1]
    said = {**run.config, **run.summary}
    name = said.get("preset") or run.path.resolve().name
    seed = f", seed {said['seed']}" if said.get("seed") is not None else ""
    steps = said.get("steps") or max((r.get("step") or 0 for r in run.rows), default=0)
    seconds = said.get("seconds") or max((r.get("seconds") or 0 for r in run.rows), default=0)
    facts = [f"{steps} step{'s' * (steps != 1)}" + " so far" * (not run.finished)]
    facts.append(duration(seconds))
    if said.get("git_commit"):
        facts.append(str(said["git_commit"])[:9])
    title = FontProperties(family="DejaVu Sans", size=14, weight="bold")
    figure.text(
        MARGIN / WIDTH, (top - 0.2) / height, printable(f"{name}{seed}", title)[:40],
        fontproperties=title, color=INK, parse_math=False,
    )  # fmt: skip
    figure.text(
        1 - MARGIN / WIDTH, (top - 0.2) / height, " · ".join(facts),
        fontsize=9, color=GREY, ha="right", parse_math=False,
    )  # fmt: skip
    for number, line in enumerate(accuracy, start=1):
        figure.text(
            MARGIN / WIDTH, (top - TITLE + 0.02 - number * ACCURACY_LINE) / height, line,
            fontproperties=ACCURACY_FONT, color=INK, parse_math=False,
        )  # fmt: skip


def _accuracy(run: Run) -> str:
    before = run.summary.get("accuracy_before") or {}
    after = run.summary.get("accuracy_after") or {}
    corrupted = run.summary.get("accuracy_after_corrupted") or {}
    said = []
    for kind in dict.fromkeys([*before, *after]):
        first, last = (_percent(accuracy.get(kind)) for accuracy in (before, after))
        shown = f" (images corrupted: {_percent(corrupted[kind])})" if kind in corrupted else ""
        said.append(f"{kind_name(kind)} {first} → {last} %{shown}")
    if not said:
        return "Accuracy on held-out questions: not measured yet" if not run.finished else ""
    samples = run.summary.get("samples_per_question")
    mean = f", mean@{samples}" if samples else ""
    return f"Held-out accuracy{mean}: " + " · ".join(said)


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.1f}"


def _curves(figure: Figure, run: Run, top: float) -> None:
    height = figure.get_size_inches()[1]
    left, right = MARGIN + 0.2, 1.0  # room for tick labels, and for the names at the lines' ends
    wide = (WIDTH - left - right - 2 * PANEL_GAP_X) / 3
    for index, panel in enumerate(panels(run.rows)):
        row, col = divmod(index, 3)
        x = left + col * (wide + PANEL_GAP_X)
        y = top - PANEL_HEIGHT - row * (PANEL_HEIGHT + PANEL_GAP_Y)
        axes = figure.add_axes((x / WIDTH, y / height, wide / WIDTH, PANEL_HEIGHT / height))
        draw_panel(axes, panel, run.rows, last_row=row == 1)


def _heading(figure: Figure, strip: Strip, top: float) -> None:
    height = figure.get_size_inches()[1]
    when = strip.cards[0].row["when"]
    figure.text(
        MARGIN / WIDTH, (top - 0.12) / height, f"Examples {when} training",
        fontsize=9.5, fontweight="bold", color=INK,
    )  # fmt: skip
    if not strip.with_aug:
        return
    figure.text(
        1 - MARGIN / WIDTH, (top - 0.12) / height,
        "the picture and its corrupted copy; the response is to the uncorrupted one",
        fontsize=8, color=GREY, ha="right",
    )  # fmt: skip


def _notes(run: Run, width: float) -> list[str]:
    notes = [f"Red triangles: {run.alarms}"] if run.alarms else []
    notes += [note[0].upper() + note[1:] for note in run.notes]
    return [
        line
        for note in notes
        for line in wrap(printable(f"{note}.", NOTE_FONT), NOTE_FONT, width * 72)
    ]
