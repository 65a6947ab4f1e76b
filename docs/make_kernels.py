"""Writes the tables of docs/kernels.md that compare bench/cost_model.py with what was measured.

    python docs/make_kernels.py

No GPU is touched: what one took is in bench/results/h200.
"""

from __future__ import annotations

import sys
from pathlib import Path

import made_pages

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import cost_model as model


def kernels() -> str:
    """Predicted and measured milliseconds of the kernels of all states."""
    h200, h100 = (model.machines()[name] for name in ("h200", "h100"))
    workloads = model.read_workloads()
    columns = []
    for w in workloads.values():
        found = model.predict(w, h200, model.MEASURED)
        columns.append(list(model.kernel_rows(found, model.measured(found))))
    on_h100 = model.predict(workloads[model.CALIBRATED_ON], h100, model.MEASURED)
    columns.append(list(model.kernel_rows(on_h100)))
    rows = []
    for of_kernel in zip(*columns, strict=True):
        name, bound = of_kernel[0][:2]
        cells = [f"{row[2]} / {row[3]}" for row in of_kernel[:-1]]
        rows.append((name, bound, *cells, of_kernel[-1][2]))
    heads = (
        "ms, predicted / measured",
        "bound on the H200 by",
        *(f"`{name}`" for name in workloads),
    )
    heads += (f"H100, `{model.CALIBRATED_ON}`",)
    return made_pages.table(rows, heads, numbers=len(heads) - 2)


def totals() -> str:
    """Of all states: the H200 as predicted and measured, and both machines with the code now."""
    rows = []
    machines = model.machines()
    for name, w in model.read_workloads().items():
        before = model.predict(w, machines["h200"], model.MEASURED)
        seen = model.measured(before)
        rows += [
            model.total_row(f"`{name}`, H200, 0019bf5: predicted", before),
            model.total_row(f"`{name}`, H200, 0019bf5: **measured**", before, seen),
        ]
        rows += [
            model.total_row(
                f"`{name}`, {machines[m].name}, now: predicted",
                model.predict(w, machines[m], model.NOW),
            )
            for m in ("h200", "h100")
        ]
    return made_pages.table(rows, model.TOTAL_HEADS, numbers=len(model.TOTAL_HEADS) - 1)


def parts() -> dict[str, str]:
    return {"predicted kernels": kernels(), "predicted totals": totals()}


if __name__ == "__main__":
    made_pages.write_between("kernels.md", parts())
