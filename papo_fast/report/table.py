"""The table at the end of a run, and `papo-fast report RUN`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from papo_fast.errors import InputError
from papo_fast.report.figure import write_report
from papo_fast.report.heldout import kinds
from papo_fast.report.naming import NamedRun, name_runs
from papo_fast.report.wording import duration, kind_name
from papo_fast.run.files import METRICS, PAGE, read_run


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Print accuracy per kind of question and the error shares, before and after, in per cent.

    Differences are in percentage points. What `summary` lacks is shown as a dash.
    """
    before = summary.get("accuracy_before") or {}
    after = summary.get("accuracy_after") or {}
    corrupted = summary.get("accuracy_after_corrupted") or {}
    samples = summary.get("samples_per_question")
    kinds = list(dict.fromkeys([*before, *after, *corrupted]))
    if kinds:
        table = Table(
            title="Accuracy on held-out questions" + (f", mean@{samples}" * bool(samples))
        )
        table.add_column("questions")
        for name in ("before", "after", "change", "corrupted images", "change"):
            table.add_column(name, justify="right")
        for kind in kinds:
            table.add_row(
                Text(kind_name(kind)),  # plain text: a kind may hold [brackets]
                _percent(before.get(kind)),
                _percent(after.get(kind)),
                _points(before.get(kind), after.get(kind), good=1),
                _percent(corrupted.get(kind)),
                _points(after.get(kind), corrupted.get(kind), good=0),
            )
        console.print(table)
    errors = [(name, *(summary.get(f"{name}_errors_{w}") for w in ("before", "after")))
              for name in ("perception", "reasoning")]  # fmt: skip
    if any(value is not None for _, *values in errors for value in values):
        table = Table(title="Errors, share of samples on vision-dependent questions")
        table.add_column("error")
        for name in ("before", "after", "change"):
            table.add_column(name, justify="right")
        meaning = {"perception": "perception (misread)", "reasoning": "reasoning (read right)"}
        for name, first, last in errors:
            table.add_row(
                meaning[name], _percent(first), _percent(last), _points(first, last, good=-1)
            )
        console.print(table)
    _print_honesty(summary.get("honesty_before"), summary.get("honesty_after"), console)
    facts = [f"{key} {summary[key]}" for key in ("preset", "seed", "steps") if key in summary]
    if summary.get("seconds") is not None:
        facts.append(duration(summary["seconds"]))
    console.print(Text(" · ".join(facts), style="dim"))


HACKED = 0.25
"""What is left of the honesty check's accuracy before training, below which the table says that the
policy recognises corrupted pictures. GRPO alone loses nothing in the default job."""


def _print_honesty(before: float | None, after: float | None, console: Console) -> None:
    """Text-leaning questions with corrupted pictures: a policy that looks is as good as before."""
    if after is None:
        return
    line = Text("Honesty check, text-leaning questions with corrupted images: ")
    if before is None:
        line.append(f"{_percent(after)} right")
    else:
        line.append(f"{_percent(before)} right before, {_percent(after)} after (")
        line.append_text(_points(before, after, good=1)).append(")")
    console.print(line)
    if before is not None and after < HACKED * before:
        console.print(
            Text(
                "The text of these questions gives the answer, and still they go wrong once the "
                "picture is corrupted: the policy recognises corrupted pictures.",
                style="red",
            )
        )


def print_run(run_dir: Path, console: Console, beside: Sequence[Path] = ()) -> None:
    """Print the run's table, draw its picture and say where it is.

    Args:
        beside: other runs, which get a column each, and their curves beside the run's own.

    Raises `InputError` if one of them is not a run or has no metrics yet (see `read_run`).
    """
    run = read_run(run_dir)
    named = name_runs([run, *map(read_run, beside)]) if beside else []
    if not run.rows:
        raise InputError(
            f"{run.path / METRICS} has no step yet: wait for the first one. "
            "The examples from before training are in examples.jsonl"
        )
    if named:
        print_beside(named, console)
    elif run.summary:
        print_summary(run.summary, console)
    else:
        _print_progress(run.rows, console)
    path = write_report(run.path, beside)
    if run.alarms:
        console.print(Text(run.alarms[0].upper() + run.alarms[1:], style="red"))
    for note in run.notes:
        console.print(Text(f"Note: {note}", style="yellow"))
    for entry in named[1:]:
        for note in entry.run.notes:
            console.print(Text(f"Note on {entry.name}: {note}", style="yellow"))
    console.print(Text(f"Picture: {path}"), soft_wrap=True)
    console.print(Text(f"Every example: {path.with_name(PAGE)}"), soft_wrap=True)


def print_beside(named: Sequence[NamedRun], console: Console) -> None:
    """Print one column for each run: accuracies and errors in per cent, steps and time.

    A dash stands for what a run did not measure.
    """
    table = Table(title="Held-out questions, runs side by side")
    table.add_column("")
    for entry in named:
        table.add_column(Text(entry.name), justify="right")
    summaries = [entry.run.summary for entry in named]

    def row(name: str, key: str, kind: str | None = None) -> None:
        values = [summary.get(key) for summary in summaries]
        if kind is not None:
            values = [(value or {}).get(kind) for value in values]
        if any(value is not None for value in values):
            table.add_row(Text(name), *map(_percent, values))

    for kind in kinds([entry.run for entry in named]):
        row(f"{kind_name(kind)}, before", "accuracy_before", kind)
        row(f"{kind_name(kind)}, after", "accuracy_after", kind)
        row(f"{kind_name(kind)}, images corrupted", "accuracy_after_corrupted", kind)
        table.add_section()
    row("honesty check, before", "honesty_before")
    row("honesty check, after", "honesty_after")
    for name, error in (("misread", "perception"), ("read right but wrong", "reasoning")):
        row(f"{name}, before", f"{error}_errors_before")
        row(f"{name}, after", f"{error}_errors_after")
    table.add_section()
    samples = [summary.get("samples_per_question") for summary in summaries]
    for name, values in (
        ("samples per question", samples),
        ("seed", [entry.run.said("seed") for entry in named]),
        ("steps", [entry.run.steps for entry in named]),
    ):
        table.add_row(name, *("–" if value is None else str(value) for value in values))
    table.add_row("time", *(duration(entry.run.seconds) for entry in named))
    console.print(table)


def _print_progress(rows: list[dict[str, Any]], console: Console) -> None:
    """The first and the newest tenth of an unfinished run, side by side."""
    part = max(1, len(rows) // 10)
    table = Table(title=f"Training so far, {len(rows)} steps")
    table.add_column("mean of")
    for name in (f"first {part}", f"last {part}"):
        table.add_column(name, justify="right")
    for key in ("reward", "accuracy", "kl_prcp", "entropy", "aug_entropy", "response_length"):
        cells = []
        for chosen in (rows[:part], rows[-part:]):
            values = [row[key] for row in chosen if row.get(key) is not None]
            cells.append(f"{sum(values) / len(values):.4g}" if values else "–")
        table.add_row(key, *cells)
    console.print(table)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _points(first: float | None, last: float | None, good: int) -> Text:
    """The difference, green where it has the sign of `good`, red where it has the other."""
    if first is None or last is None:
        return Text("–")
    points = 100 * (last - first)
    style = "" if good * points == 0 else "green" if good * points > 0 else "red"
    return Text(f"{points:+.1f}", style=style)
