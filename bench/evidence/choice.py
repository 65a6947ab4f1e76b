"""Each arm's setting, chosen from its development runs and kept in a file.

The rule: of the settings that collapsed on no development seed, the one with the highest mean
accuracy on vision-dependent questions; of equal ones the first. Where every setting collapsed, the
first, which is the smallest γ. An arm whose development runs are not complete gets none.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.evidence.arms import ARMS, Arm
from bench.evidence.protocol import DEVELOPMENT_SEEDS, TUNED_ON, Cell, mean
from bench.evidence.runner import result_of
from papo_fast.digits.task import KINDS
from papo_fast.run.folder import write_json

FILE = "chosen.json"
VISION, _ = KINDS


def chosen_settings(results: Path) -> dict[str, str]:
    """Arm → name of its setting; arms that have none are left out."""
    path = results / FILE
    if not path.is_file():
        return {}
    return {arm: entry["setting"] for arm, entry in json.loads(path.read_text()).items()}


def choose(results: Path) -> str:
    """Write the choice of every arm whose development runs are complete; what to tell the user."""
    found = json.loads((results / FILE).read_text()) if (results / FILE).is_file() else {}
    lines = []
    for name, arm in ARMS.items():
        if name in found:
            lines.append(f"{name}: {found[name]['setting']}, as chosen before")
            continue
        table = development(arm, results)
        missing = sum(None in runs for runs in table.values())
        if missing:
            lines.append(f"{name}: none yet, {missing} of {len(table)} settings have runs to make")
            continue
        found[name] = {"setting": best(table), "accuracy": _accuracies(table)}
        lines.append(f"{name}: {found[name]['setting']}")
    if found:
        write_json(results / FILE, found)
    return "\n".join(lines)


def development(arm: Arm, results: Path) -> dict[str, list[dict | None]]:
    """Setting → its results, one for each development seed, None where it is not there."""
    return {
        setting.name: [
            result_of(Cell("development", TUNED_ON, arm, setting, seed), results)
            for seed in DEVELOPMENT_SEEDS
        ]
        for setting in arm.settings
    }


def best(table: dict[str, list[dict]]) -> str:
    stands = [name for name, runs in table.items() if not any(run["collapsed"] for run in runs)]
    accuracy = _accuracies(table)
    return max(stands, key=lambda name: accuracy[name]) if stands else next(iter(table))


def _accuracies(table: dict[str, list[dict]]) -> dict[str, float]:
    return {
        name: mean([run["summary"]["accuracy_after"][VISION] for run in runs])
        for name, runs in table.items()
    }
