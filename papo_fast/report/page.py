"""`report.html`: every example of a run with its pictures, before and after training.

One file that any browser shows without a network. Pictures are those of the run's folder, by their
relative paths, so that the page stays small; it is moved together with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from papo_fast.errors import InputError
from papo_fast.report.examples import before_training, is_lucky, is_right
from papo_fast.report.wording import duration, kind_name
from papo_fast.run.files import PAGE, REPORT, Run
from papo_fast.run.metrics import Row
from papo_fast.whole_files import written_whole

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em;
       color: #222; background: #fff; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #ccc; padding: .3em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
article { border-top: 1px solid #ccc; padding: 1em 0; display: grid; gap: 0 1.5em;
          grid-template-columns: 16em 1fr; }
img { max-width: 100%; image-rendering: pixelated; }
article img { width: 16em; margin-bottom: .5em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .2em 0 .8em; background: #f6f6f6;
      padding: .5em; max-height: 24em; overflow-y: auto; }
.right { color: #06632a; } .wrong { color: #a11; } .small { color: #666; font-size: 13px; }
label { margin-right: 1em; }
body:has(#wrong:checked) article.is-right, body:has(#right:checked) article.is-wrong {
  display: none; }
"""


def write_page(run: Run) -> Path:
    """Write `report.html` of a run, finished or not; returns its path.

    Raises `InputError` where it cannot be written.
    """
    path = run.path / PAGE
    try:
        with written_whole(path) as partial:
            # half an emoji, which a model may say, is no UTF-8
            partial.write_text(page(run), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    return path


def page(run: Run) -> str:
    """The page's HTML."""
    name = escape(run.path.resolve().name)
    facts = [str(run.said("preset") or ""), f"seed {run.said('seed')}", f"{run.steps} steps"]
    facts.append(duration(run.seconds))
    notes = [*([run.alarms] if run.alarms else []), *run.notes]
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{name}</title>",
        f"<style>{_STYLE}</style><h1>{name}</h1>",
        f"<p>{escape(' · '.join(fact for fact in facts if fact))}</p>",
        *(f"<p class='small'>{escape(note[0].upper() + note[1:])}.</p>" for note in notes),
        _accuracies(run.summary),
        f"<p><img src='{REPORT}' alt='curves and examples'></p>",
        *_examples(run.examples),
        "</html>",
    ]
    return "\n".join(part for part in parts if part)


def _accuracies(summary: Mapping[str, Any]) -> str:
    """A table of accuracies by kind of question."""
    columns = {
        "before": "accuracy_before",
        "after": "accuracy_after",
        "before, corrupted": "accuracy_before_corrupted",
        "after, corrupted": "accuracy_after_corrupted",
    }
    kinds = [*dict.fromkeys(k for key in columns.values() for k in summary.get(key) or {})]
    if not kinds:
        return ""
    rows = [
        f"<tr><td>{escape(kind_name(kind))}</td>"
        + "".join(
            f"<td>{_percent((summary.get(k) or {}).get(kind))}</td>" for k in columns.values()
        )
        for kind in kinds
    ]
    heads = "".join(f"<th>{head}</th>" for head in columns)
    return f"<table><tr><th>accuracy</th>{heads}</tr>{''.join(rows)}</table>"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _examples(examples: Sequence[Row]) -> list[str]:
    """Those from after training with what was said before, and those from before that are left."""
    earlier = before_training(examples)
    paired = {id(row) for row in earlier.values()}
    shown = [row for row in examples if row.get("when") == "after"]
    shown += [row for row in examples if row.get("when") == "before" and id(row) not in paired]
    if not shown:
        return []
    choices = "".join(
        f"<label><input type='radio' name='shown' id='{i}'{' checked' * (i == 'all')}> {i}</label>"
        for i in ("all", "right", "wrong")
    )
    return [
        f"<h2>{len(shown)} examples</h2><p>{choices}</p>",
        *(_example(row, earlier.get(id(row))) for row in shown),
    ]


def _example(row: Row, before: Row | None) -> str:
    pictures = "".join(
        f"<img src='{quote(str(row[key]))}' alt='{alt}' loading='lazy'>"
        for key, alt in (("image", "picture"), ("corrupted", "corrupted picture"))
        if row.get(key)
    )
    facts = [kind_name(str(row.get("kind") or "")), f"expected {row.get('answer')}"]
    if row.get("reading") is not None:
        facts.append(f"the picture says {row['reading']}")
    kind = "is-right" if is_right(row) else "is-wrong"
    said = _response(f"{row.get('when')} training", row)
    said += _response("before training", before) if before is not None else ""
    return (
        f"<article class='{kind}'><div>{pictures}</div><div>"
        f"<strong>{escape(str(row.get('problem')))}</strong>"
        f"<p class='small'>{escape(' · '.join(fact for fact in facts if fact))}</p>"
        f"{said}</div></article>"
    )


def _response(when: str, row: Row) -> str:
    right = is_right(row)
    verdict = "right" if right else "wrong"
    luck = ", but the picture was read wrong" if is_lucky(row) else ""
    reward = row.get("reward")
    earned = "" if reward is None else f", reward {reward:.2f}"
    return (
        f"<div class='{verdict}'>{'✓' if right else '✗'} {verdict} {when}{earned}{luck}</div>"
        f"<pre>{escape(str(row.get('response') or '(empty)'))}</pre>"
    )
