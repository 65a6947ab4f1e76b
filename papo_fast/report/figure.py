"""`report.png`: the curves of a run, and of others beside it, above a strip of its examples.

Drawn on a `Figure` of its own, without pyplot, so that a training process can draw it too.
Sizes are in inches: 10 wide at 150 dpi, so a README that shows it 1000 pixels wide has 100 to
the inch and the smallest print is 10 pixels high.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from papo_fast.errors import InputError
from papo_fast.report.curves import (
    ALARM,
    alarm_steps,
    draw_panel,
    lines_beside,
    lines_of,
    panels,
    say_what_is_dashed,
)
from papo_fast.report.examples import Strip, before_training, choose, how_chosen
from papo_fast.report.heldout import Bars
from papo_fast.report.naming import NamedRun, name_runs
from papo_fast.report.page import write_page
from papo_fast.report.wording import (
    DPI,
    GREY,
    INK,
    duration,
    kind_name,
    printable,
    text_width,
    wrap,
)
from papo_fast.run.files import PAGE, REPORT, SUMMARY, Run, read_run
from papo_fast.whole_files import written_whole

WIDTH = 10.0
MARGIN = 0.35
TITLE, ACCURACY_LINE, BELOW_HEADER = 0.26, 0.2, 0.36
PANEL_HEIGHT, PANEL_GAP_X, PANEL_GAP_Y = 1.3, 0.5, 0.5
AXIS = 0.42  # below the lower panels: tick labels and "step"
HEADING = 0.3
NOTE_FONT = FontProperties(family="DejaVu Sans", size=7.5)
NOTE_LINE = 0.15
ACCURACY_FONT = FontProperties(family="DejaVu Sans", size=9)
# With other runs beside it: the legend, and the names at the ends of the curves.
LEGEND_LINE, BELOW_LEGEND, BELOW_BARS, SWATCH = 0.24, 0.4, 0.3, 0.3
NAME_FONT = FontProperties(family="DejaVu Sans", size=10, weight="bold")
END_FONT = FontProperties(family="DejaVu Sans", size=8.5, weight="bold")


def write_report(run_dir: Path, beside: Sequence[Path] = ()) -> Path:
    """Draw `report.png` of a run, finished or not, from its files; returns the picture's path.

    `report.html` is written beside it, with the picture and every example.

    Args:
        beside: other runs, whose curves and accuracies stand beside its own.

    What is missing is left out and named in a note at the bottom. Raises `InputError` as
    `read_run` and `name_runs` do, and where the picture cannot be written.
    """
    run = read_run(run_dir)
    others = [read_run(other) for other in beside]
    path = run.path / REPORT
    with style.context("default", after_reset=True):  # a user's usetex or dark theme stays out
        picture = draw(run, others)
        try:
            with written_whole(path) as partial:
                picture.savefig(partial, format="png", dpi=DPI, facecolor="white")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}") from error
    write_page(run)
    return path


def has_report(run_dir: Path) -> bool:
    """Whether the report of a finished run is there, and no older than its summary.

    It is not where the process was killed between writing the one and the other.
    """
    page = run_dir / PAGE  # what `write_report` writes last
    return page.is_file() and page.stat().st_mtime >= (run_dir / SUMMARY).stat().st_mtime


def draw(run: Run, others: Sequence[Run] = ()) -> Figure:
    """The whole picture, as high as its content needs."""
    named = name_runs([run, *others]) if others else []
    inner = WIDTH - 2 * MARGIN
    chosen = choose(run.examples)
    earlier = before_training(run.examples) if others else None
    strip = Strip(run.path, chosen, inner, earlier) if chosen else None
    notes = _notes(run, named, how_chosen(run.examples, chosen), inner)
    bars = Bars(named, inner)
    if named:
        accuracy, header = [], TITLE + LEGEND_LINE * len(_legend_lines(named)) + BELOW_LEGEND
    else:
        accuracy = wrap(printable(_accuracy(run), ACCURACY_FONT), ACCURACY_FONT, inner * 72)
        header = TITLE + ACCURACY_LINE * len(accuracy) + BELOW_HEADER
    header += bars.height + (BELOW_BARS if bars.height else 0.0)
    rows = any(r.rows for r in (run, *others))
    grid = 2 * PANEL_HEIGHT + PANEL_GAP_Y + AXIS if rows else 0.0
    strip_height = HEADING + strip.height + 0.15 if strip else 0.0
    height = 0.2 + header + grid + 0.15 + strip_height + NOTE_LINE * len(notes) + 0.15
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)

    y = height - 0.2
    _header(figure, run, named, accuracy, y)
    if named:
        below = TITLE + LEGEND_LINE * len(_legend_lines(named))
        bars.draw(figure, MARGIN, y - below - BELOW_LEGEND / 2)
    y -= header
    if rows:
        _curves(figure, run, named, y)
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


def _header(
    figure: Figure, run: Run, named: Sequence[NamedRun], accuracy: list[str], top: float
) -> None:
    height = figure.get_size_inches()[1]
    seeds = {r.said("seed") for r in [run, *(entry.run for entry in named)]}
    name = " beside ".join(entry.name for entry in named[:2]) or _title(run)
    name += f" and {len(named) - 2} more" * (len(named) > 2)
    seed = "" if len(seeds) > 1 or None in seeds else f", seed {run.said('seed')}"
    samples = run.summary.get("samples_per_question")
    facts = [f"mean@{samples}"] * bool(samples and named) + ([] if named else _facts(run))
    if run.said("git_commit"):
        facts.append(str(run.said("git_commit"))[:9])
    title = FontProperties(family="DejaVu Sans", size=14, weight="bold")
    figure.text(
        MARGIN / WIDTH, (top - 0.2) / height, printable(f"{name}{seed}", title)[:50],
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
    _legend(figure, named, top - TITLE - 0.04)


def _title(run: Run) -> str:
    return str(run.said("preset") or run.path.resolve().name)


def _facts(run: Run) -> list[str]:
    steps = run.steps
    return [f"{steps} step{'s' * (steps != 1)}" + " so far" * (not run.finished),
            duration(run.seconds)]  # fmt: skip


def _legend_text(entry: NamedRun) -> tuple[str, str]:
    """A run's name, and what the legend says about it."""
    # not the time: runs that were made at different hours or beside other work do not compare
    facts = _facts(entry.run)[:1]
    gamma = (entry.run.config.get("objective") or {}).get("kl_prcp_coef")
    if gamma is not None:
        facts.insert(0, f"γ = {gamma:g}")
    return printable(entry.name, NAME_FONT), " · ".join(facts)


def _legend_lines(named: Sequence[NamedRun]) -> list[list[tuple[NamedRun, float]]]:
    """Lines of the legend: each run with the place where its entry starts, in inches."""
    lines: list[list[tuple[NamedRun, float]]] = []
    x = 0.0
    for entry in named:
        name, facts = _legend_text(entry)
        wide = SWATCH + (text_width(name, NAME_FONT) + text_width(facts, ACCURACY_FONT)) / 72 + 0.1
        if not lines or x + wide > WIDTH - 2 * MARGIN:
            lines.append([])
            x = 0.0
        lines[-1].append((entry, x))
        x += wide + 0.4
    return lines


def _legend(figure: Figure, named: Sequence[NamedRun], top: float) -> None:
    height = figure.get_size_inches()[1]
    for number, line in enumerate(_legend_lines(named)):
        y = (top - number * LEGEND_LINE - 0.15) / height
        for entry, start in line:
            name, facts = _legend_text(entry)
            x = MARGIN + start
            figure.add_artist(
                Rectangle((x / WIDTH, y), 0.22 / WIDTH, 0.1 / height,
                          facecolor=entry.colour, edgecolor="none")
            )  # fmt: skip
            x += SWATCH
            figure.text(
                x / WIDTH, y, name, fontproperties=NAME_FONT, color=entry.colour, parse_math=False
            )
            x += text_width(name, NAME_FONT) / 72 + 0.1
            figure.text(
                x / WIDTH, y, facts, fontproperties=ACCURACY_FONT, color=GREY, parse_math=False
            )


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


def _curves(figure: Figure, run: Run, named: Sequence[NamedRun], top: float) -> None:
    height = figure.get_size_inches()[1]
    left, right = MARGIN + 0.2, 1.0  # room for tick labels, and for the names at the lines' ends
    gap = PANEL_GAP_X
    if named:
        names = max(text_width(entry.name, END_FONT) for entry in named) / 72 + 0.05
        right, gap = MARGIN + names, names + 0.42
    wide = (WIDTH - left - right - 2 * gap) / 3
    rows = [row for r in [run, *(entry.run for entry in named)] for row in r.rows]
    alarms = [(alarm_steps(entry.run), entry.colour) for entry in named]
    for index, panel in enumerate(panels(rows)):
        row, col = divmod(index, 3)
        x = left + col * (wide + gap)
        y = top - PANEL_HEIGHT - row * (PANEL_HEIGHT + PANEL_GAP_Y)
        axes = figure.add_axes((x / WIDTH, y / height, wide / WIDTH, PANEL_HEIGHT / height))
        lines = lines_beside(panel, named) if named else lines_of(panel, run)
        draw_panel(
            axes,
            panel,
            lines,
            alarms or [(alarm_steps(run), ALARM)],
            last_row=row == 1,
            lowest=0.05 if named else 0.0,  # clear of the last tick's label
        )
        say_what_is_dashed(axes, panel, lines)


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


def _notes(run: Run, named: Sequence[NamedRun], choice: list[str], width: float) -> list[str]:
    notes = []
    if choice:
        text = "; ".join(choice)
        notes.append(text[0].upper() + text[1:])
    if named:
        for entry in named:
            notes += [f"{entry.name}: triangles, {entry.run.alarms}"] if entry.run.alarms else []
            notes += [f"{entry.name}: {note}" for note in entry.run.notes]
    else:
        notes += [f"Red triangles: {run.alarms}"] if run.alarms else []
        notes += [note[0].upper() + note[1:] for note in run.notes]
    return [
        line
        for note in notes
        for line in wrap(printable(f"{note}.", NOTE_FONT), NOTE_FONT, width * 72)
    ]
