"""Reading a run directory, finished or not, and writing its examples."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from papo_fast.config_file import CONFIG as CONFIG
from papo_fast.errors import InputError
from papo_fast.run.metrics import Row, json_line, read_json_lines, read_metrics
from papo_fast.whole_files import written_whole

METRICS, SUMMARY = "metrics.jsonl", "summary.json"
EXAMPLES, REPORT, PAGE = "examples.jsonl", "report.png", "report.html"


@dataclass(frozen=True)
class Run:
    """What the files of a run say. Anything that is not there yet is empty and has a note."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """Metrics, one row a step."""
    examples: list[Row] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged, each one short sentence for the reader of the report."""

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    def said(self, key: str) -> Any:
        """An entry of the summary, or of the configuration where the summary lacks it."""
        return {**self.config, **self.summary}.get(key)

    @property
    def steps(self) -> int:
        return self.said("steps") or max((row.get("step") or 0 for row in self.rows), default=0)

    @property
    def seconds(self) -> float:
        return self.said("seconds") or max(
            (row.get("seconds") or 0 for row in self.rows), default=0
        )

    @property
    def alarms(self) -> str | None:
        """When the collapse monitor spoke and what it said first; None if it never did."""
        rows = [row for row in self.rows if row.get("alarms")]
        if not rows:
            return None
        steps = [str(row.get("step", "?")) for row in rows]
        more = f" and {len(steps) - 12} more" if len(steps) > 12 else ""
        at = f"step{'s' * (len(steps) > 1)} {', '.join(steps[:12])}{more}"
        return f"collapse alarms at {at}. First: {rows[0]['alarms'][0]}"


def read_run(run_dir: Path) -> Run:
    """Read what there is in `run_dir`.

    Raises `InputError` if it is not a run (the message lists what is there and the runs beside
    it), if it has neither metrics nor examples yet, or if one of its files is damaged other than
    by a last line that was cut short, or holds values of other kinds than a run writes.
    """
    run_dir = Path(run_dir)
    if not is_run(run_dir):
        raise InputError(
            f"{run_dir} is not a run: {_what_is_there(run_dir)}. {_runs_near(run_dir)}"
        )
    notes: list[str] = []
    rows: list[Row] = []
    examples: list[Row] = []
    if (run_dir / METRICS).is_file():
        rows, torn = read_metrics(run_dir / METRICS)
        notes += [torn] if torn else []
        _check(run_dir / METRICS, rows, _METRICS, other=_NUMBER)
    if (run_dir / EXAMPLES).is_file():
        examples, torn = read_json_lines(run_dir / EXAMPLES)
        notes += [torn] if torn else []
        _check(run_dir / EXAMPLES, examples, _EXAMPLES)
    if not rows and not examples:
        raise InputError(
            f"{run_dir} has no metrics yet: {_what_is_there(run_dir)}. "
            f"Wait for its first step. {_runs_near(run_dir)}"
        )
    summary = _read_object(run_dir / SUMMARY)
    _check(run_dir / SUMMARY, [summary], _SUMMARY)
    if not rows:
        notes.append("no training step yet")
    if not examples:
        notes.append(f"no {EXAMPLES}, so no examples")
    if not summary:
        notes.append(f"no {SUMMARY}: the run is not finished")
    return Run(run_dir, _read_object(run_dir / CONFIG), rows, examples, summary, notes)


_NUMBER = "a number"
_METRICS = {"alarms": "a list of texts"}
_EXAMPLES = {
    **dict.fromkeys(("reward", "accuracy"), _NUMBER),
    **dict.fromkeys(("image", "corrupted", "prompt_end"), "a text"),
}
_SUMMARY = {
    **dict.fromkeys(("steps", "seconds", "samples_per_question", "bad_updates"), _NUMBER),
    **{
        f"{what}_{when}": kind
        for when in ("before", "after", "before_corrupted", "after_corrupted")
        for what, kind in (
            ("accuracy", "an object with a number for each kind of question"),
            ("perception_errors", _NUMBER),
            ("reasoning_errors", _NUMBER),
            ("honesty", _NUMBER),
        )
    },
}
"""Key → what the report needs it to be, where it is there and not null."""


def _check(path: Path, rows: Sequence[Row], kinds: Mapping[str, str], other: str = "") -> None:
    """Raise `InputError`, which names file, row and key, for a value that is of another kind."""
    for number, row in enumerate(rows, start=1):
        for key, value in row.items():
            kind = kinds.get(key, other)
            if value is not None and kind and not _is_of(kind, value):
                where = f"{path}, row {number}" if len(rows) > 1 else str(path)
                raise InputError(
                    f"{where}: {key} is {reprlib.repr(value)}; expected {kind}. Repair or delete it"
                )


def _is_of(kind: str, value: Any) -> bool:
    if kind == _NUMBER:
        return isinstance(value, int | float)
    if kind == "a text":
        return isinstance(value, str)
    if kind == "a list of texts":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    return isinstance(value, dict) and all(v is None or _is_of(_NUMBER, v) for v in value.values())


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (CONFIG, METRICS, SUMMARY))


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): delete it or run again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _what_is_there(path: Path) -> str:
    if not path.exists():
        return "there is no such directory"
    if not path.is_dir():
        return f"it is a file, expected a directory with {METRICS}"
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in path.iterdir())
    if not names:
        return "the directory is empty"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it holds {', '.join(names[:8])}{more}"


def _runs_near(path: Path) -> str:
    """The runs inside `path` (if it is a folder of runs) and beside it."""
    places = [p for p in (path, path.parent) if p.is_dir()]
    runs = [
        str(p)
        for place in places
        for p in sorted(place.iterdir())
        if p.is_dir() and (p / METRICS).is_file() and p.resolve() != path.resolve()
    ]
    if not runs:
        return f"No run with metrics in {path.parent}; `papo-fast train` makes one"
    more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
    return f"Runs with metrics: {', '.join(runs[:8])}{more}"


def save_examples(run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write examples to `examples.jsonl` and their pictures to `examples/*.png`.

    Each row has `when` ("before" or "after"), `image` and `corrupted` (PIL images or None, written
    as RGB; the file gets their paths relative to `run_dir`), and `problem`, `kind`, `answer`,
    `reading`, `prompt_end`, `response`, `reward`, `accuracy`, which are written as they are.
    Examples of the other `when` that the file holds are kept, those of the same `when` are
    replaced.
    """
    run_dir = Path(run_dir)
    for row in rows:
        if row["when"] not in ("before", "after"):
            raise ValueError(f"when is {row['when']!r}, expected 'before' or 'after'")
    path = run_dir / EXAMPLES
    kept: list[Row] = []
    if path.is_file():
        new = {row["when"] for row in rows}
        kept = [row for row in read_json_lines(path)[0] if row.get("when") not in new]
    (run_dir / "examples").mkdir(parents=True, exist_ok=True)
    for index, row in enumerate(rows):
        files: dict[str, str | None] = {}
        for key, suffix in (("image", ""), ("corrupted", "-corrupted")):
            files[key] = None
            if row.get(key) is not None:
                files[key] = f"examples/{row['when']}-{index:03d}{suffix}.png"
                row[key].convert("RGB").save(run_dir / files[key])
        kept.append({**row, **files})
    with written_whole(path) as partial:
        partial.write_text("".join(json_line(row) + "\n" for row in kept), encoding="utf-8")
