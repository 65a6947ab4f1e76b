"""The command line, called as users call it with something wrong, and what it has to say then.

What is refused exits with status 2, says one line on stderr and leaves no run behind; no attack
ends in a traceback.
"""

from __future__ import annotations

import json

from papo_fast.cli import main
from support.small_runs import png

RUN = [
    *("--model.dtype", "float32", "--data.min-pixels", "3136", "--data.max-pixels", "12544"),
    *("--rollout.prompts", "2", "--rollout.group-size", "2", "--rollout.max-new-tokens", "3"),
    *("--train.update-prompts", "2", "--train.steps", "1", "--reward.workers", "1"),
    *("--data.no-shuffle", "--device", "cpu", "--name", "run"),
]


def row(i, **changes):
    return {"problem": "What?", "answer": str(i), "images": [png(i)]} | changes


def jsonl(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def train_on(place, tmp_path, data):
    return [
        *("train", "grpo", "--model.path", place / "model", "--data.train", data),
        *("--out", tmp_path / "runs", *RUN),
    ]


def refused(capfd, argv, *names):
    """The one line on stderr, which holds each of `names`, however dashes are written."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert status == 2, lines
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    for name in names:
        assert name.replace("-", "_") in lines[0].replace("-", "_"), lines[0]
    return lines[0]


def assert_no_run(tmp_path):
    """Nothing but the lock that a run's folder has from its first moment."""
    left = {p.name for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    assert left <= {".lock"}, left
