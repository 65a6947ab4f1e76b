"""Runs of the comparison, and what its runner keeps of them, with figures at will.

Who imports this has the repository's root, where `bench` lies, on `sys.path`.
"""

from __future__ import annotations

import json

from bench.evidence.arms import ARMS
from bench.evidence.protocol import Cell


def cell(arm="grpo", setting=None, seed=100, task="digits", stage="test"):
    of = ARMS[arm]
    return Cell(stage, task, of, of.setting(setting) if setting else of.settings[0], seed)


def kinds(task):
    hints = [""] if task == "digits" else [f", hint {h}" for h in ("right", "absent", "misleading")]
    return [f"{kind}{hint}" for hint in hints for kind in ("vision_dependent", "text_leaning")]


def result(of, accuracy=0.7, collapsed=False, honesty=0.1):
    """What the runner keeps of a run, with these figures."""
    shares = {"accuracy": accuracy, "read": 0.6, "misread": 0.2, "miscalculated": 0.1}
    by_kind = {kind: {"questions": 128, **shares, "followed": 0.5} for kind in kinds(of.task)}
    ruler = {"kl_prcp": 1.0, "kl_first_token": 0.1, "entropy": 0.2, "aug_entropy": 0.9}
    corrupted = {"accuracy": dict.fromkeys(by_kind, honesty), "given": 0.3}
    swapped = {"accuracy": {}, "given": 0.8, "read": 0.6}
    measures = {"by_kind": by_kind, "corrupted": corrupted, "swapped": swapped, "ruler": ruler}
    return {
        "words": list(of.words),
        "summary": {"accuracy_after": dict.fromkeys(by_kind, accuracy)},
        "measures": {"before": measures, "after": measures},
        "collapsed": collapsed,
        "why": "it did" if collapsed else None,
        "kl_prcp_largest": None if of.arm.name in ("grpo", "dapo") else 2.5,
        "alarms": [[3, "a sign"]] if collapsed else [],
        "seconds": {"all": 240.0},
        "git_commit": "0123456789abcdef",
        "machine": {"cpu": "a processor", "capability": "AVX2"},
    }


def write(results, of, **figures):
    path = results / of.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result(of, **figures)))
