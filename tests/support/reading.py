"""What somebody has to read to understand one step, from `Trainer.step` down to the loss.

    python tests/support/reading.py

Each definition that takes part is counted whole, with its docstring, its comments and its blank
lines. Kernels, engines and the model's own layers are left out, and so are imports, what a
checkpoint keeps, and the terms and metrics that PAPO's own loss does not have.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP = {
    "papo_fast/trainer.py": ("Trainer.step", "Trainer.load_sampler"),
    "papo_fast/experience.py": ("Collector", "add_logprobs", "_score"),
    "papo_fast/samples.py": ("Completion", "Sample", "Group", "all_samples"),
    "papo_fast/rollout/sampler.py": ("Sampler",),
    "papo_fast/update.py": ("Updater.update", "Updater._token_batch"),
    "papo_fast/model/packing.py": ("PackedBatch", "pack", "_Pictures"),
    "papo_fast/model/policy.py": (
        "Policy.stats",
        "Policy.stats_of_views",
        "Policy._hidden",
        "Policy._encoded_images",
    ),
    "papo_fast/objective.py": (
        "_log_ratio",
        "_policy_losses",
        "policy_loss",
        "reference_kl",
        "perception_kl",
        "entropy",
        "aug_entropy",
        "_aug",
        "mean_weights",
        "entropy_weights",
        "Term",
        "TERMS",
        "sum_of_terms",
        "objective",
    ),
    "papo_fast/token_batch.py": ("TokenBatch", "Denominators"),
}
"""File → names of definitions."""


def lines_of(path: str, names: tuple[str, ...]) -> int:
    found = {}

    def add(node: ast.stmt, prefix: str) -> None:
        if isinstance(node, ast.Assign):
            found[prefix + ast.unparse(node.targets[0])] = node.end_lineno - node.lineno + 1
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[prefix + node.name] = node.end_lineno - first + 1
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    add(member, f"{node.name}.")

    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        add(node, "")
    return sum(found[name] for name in names)


def counts() -> dict[str, int]:
    return {path: lines_of(path, names) for path, names in STEP.items()}


if __name__ == "__main__":
    for path, n in counts().items():
        print(f"{n:5}  {path}  {', '.join(STEP[path])}")
    print(f"{sum(counts().values()):5}  in {len(STEP)} files")
