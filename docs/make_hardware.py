"""Writes the table of docs/hardware.md from `papo-fast plan`.

    PYTHONPATH=.:kernels python docs/make_hardware.py

No GPU is touched and no weights are read: tests/data/configs holds the models' config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import made_pages

from papo_fast.config import Config
from papo_fast.config_checks import steps_of_epochs
from papo_fast.planning.advice import changed_by, effects, faster_engine, remedy, with_engine
from papo_fast.planning.arguments import VIRL39K, Lengths
from papo_fast.planning.gpus import GIB, GPU, GPUS
from papo_fast.planning.memory import Layout, plan_memory
from papo_fast.planning.seconds import estimate_step
from papo_fast.planning.shell import train_command
from papo_fast.planning.sizes import ModelSizes
from papo_fast.presets import get_preset

CONFIGS = Path(__file__).parents[1] / "tests" / "data" / "configs"
# preset, file of the model, its name on the hub
MODELS = (
    ("papo-qwen3-2b", "qwen3_vl_2b", "Qwen/Qwen3-VL-2B-Thinking"),
    ("papo-g-3b", "qwen2_5_vl_3b", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ("papo-g-7b", "qwen2_5_vl_7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ("papo-g-7b", "qwen2_5_vl_32b", "Qwen/Qwen2.5-VL-32B-Instruct"),
)
CARDS = (  # and how many of them
    *(("rtx4090", 1), ("rtx4090", 4), ("l40s", 1), ("l40s", 4)),
    *(("a100", 1), ("a100", 8), ("h100", 1), ("h100", 8)),
)
# rows whose commands the page shows: model and GPUs, and what is said of them
SHOWN = (
    (("Qwen2.5-VL-3B", "1 x rtx4090"), "for the 3B on one card of 24 GB"),
    (("Qwen2.5-VL-7B", "8 x h100"), "for the 7B on eight H100s"),
)

Row = tuple[str, ...]


def rows(preset: str, file: str, name: str) -> Iterator[tuple[Row, str | None]]:
    """Of each card: the row of the table, and the command without the data, where it fits."""
    config = get_preset(preset)
    here = dataclasses.replace(config.model, path=str(CONFIGS / f"{file}.json"))
    resolved = dataclasses.replace(config, model=here, objective=config.objective.resolved())
    given = dataclasses.replace(config, model=dataclasses.replace(config.model, path=name))
    sizes = ModelSizes.of(here)
    for card, gpus in CARDS:
        yield row(resolved, given, sizes, GPUS[card], gpus)


def row(
    resolved: Config, given: Config, sizes: ModelSizes, gpu: GPU, gpus: int
) -> tuple[Row, str | None]:
    lengths, layout = Lengths(), Layout(gpus, gpu.memory)
    found = remedy(resolved, sizes, lengths, layout)
    name = given.model.path.partition("/")[2].rpartition("-")[0]
    start = (name, f"{gpus} x {gpu.name}")
    if found is None:
        return (*start, "nothing makes it fit", "", ""), None
    chosen = list(found[0])
    changed, there = changed_by(chosen, resolved, layout)
    now = estimate_step(changed, sizes, lengths, there, gpu)
    engine = faster_engine(list(effects(changed, sizes, lengths, there, gpu)), now)
    if engine is not None:
        chosen = with_engine(chosen, engine.option)
        changed, there = changed_by(chosen, resolved, layout)
    plan = plan_memory(changed, sizes, lengths, there)
    time = estimate_step(changed, sizes, lengths, there, gpu).total
    hours = steps_of_epochs(given, VIRL39K) * time / 3600
    flags = " ".join(option.flags for option in chosen)
    shown = f"`{flags}`" if flags else "–"
    memory = f"{plan.peak / GIB:.0f} of {gpu.memory / GIB:.0f}"
    return (*start, shown, memory, f"{hours:.0f}"), train_command(given, there.ranks, flags)


def parts() -> dict[str, str]:
    found = [of_card for model in MODELS for of_card in rows(*model)]
    heads = ("model", "GPUs", "options beyond the preset's", "GiB of one GPU", "hours for ViRL39K")
    table = made_pages.table((cells for cells, _ in found), heads, numbers=2)
    commands = {cells[:2]: command for cells, command in found}
    shown = [f"\nThe command {what}:\n\n```bash\n{commands[cells]}\n```\n" for cells, what in SHOWN]
    return {"hardware": table + "".join(shown)}


if __name__ == "__main__":
    made_pages.write_between("hardware.md", parts())
