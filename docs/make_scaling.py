"""Writes tables of docs/scaling.md as `papo-fast plan --simulate` computes them.

    PYTHONPATH=.:kernels python docs/make_scaling.py

The tables are of the preset that the command takes where none is named. No GPU is touched.
"""

from __future__ import annotations

import made_pages

from papo_fast.planning import simulate
from papo_fast.planning.arguments import PlanArguments
from papo_fast.planning.command import simulated
from papo_fast.presets import get_preset

ARGUMENTS = PlanArguments(get_preset("papo-g-7b"))


def published() -> str:
    """The authors' schedule beside the seconds that they publish, and ours."""
    config, _, _ = simulated(ARGUMENTS)
    rows = [
        (
            found.name,
            str(found.gpus),
            str(found.published),
            f"{found.theirs.seconds:.0f}",
            _percent(found.error, "+"),
            f"{found.ours.seconds:.0f}",
        )
        for found in simulate.beside_published(config, ARGUMENTS.lengths)
    ]
    heads = ("", "GPUs", "published", "simulated", "error", "ours, simulated")
    return made_pages.table(rows, heads, numbers=5)


def throughput() -> str:
    """Our tokens/s/GPU and MFU for each model, in turn and overlapped, by the number of GPUs."""
    config, gpu, models = simulated(ARGUMENTS)
    rows = []
    for name, model in models.items():
        for label, schedule in (
            (name, simulate.ours),
            (f"{name}, overlapped", simulate.overlapped),
        ):
            steps = [
                schedule(config, model, ARGUMENTS.lengths, gpus, gpu)
                for gpus in simulate.GPUS_SIMULATED
            ]
            rows.append((label, *map(_rate, steps)))
    heads = (f"tokens/s/GPU (MFU) on {gpu.name.upper()}s", *map(str, simulate.GPUS_SIMULATED))
    return made_pages.table(rows, heads, numbers=len(simulate.GPUS_SIMULATED))


def _rate(step: simulate.Simulated | None) -> str:
    return "–" if step is None else f"{step.tokens_per_gpu:.0f} ({_percent(step.mfu)})"


def _percent(share: float, sign: str = "") -> str:
    return f"{share:{sign}.0%}".replace("-", "−").replace("%", " %")


def parts() -> dict[str, str]:
    return {"published steps": published(), "throughput": throughput()}


if __name__ == "__main__":
    made_pages.write_between("scaling.md", parts())
