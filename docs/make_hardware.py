"""Writes the table of docs/hardware.md from `papo-fast plan`: python docs/make_hardware.py

No GPU is touched and no weights are read: tests/data/configs holds the models' config.json.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from papo_fast.config_checks import steps_of_epochs
from papo_fast.planning.advice import changed_by, effects, faster_engine, remedy
from papo_fast.planning.arguments import VIRL39K, Lengths
from papo_fast.planning.gpus import GIB, GPUS
from papo_fast.planning.memory import Layout, plan_memory
from papo_fast.planning.seconds import estimate_step
from papo_fast.planning.shell import train_command
from papo_fast.planning.sizes import ModelSizes
from papo_fast.presets import get_preset

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hardware.md"
BEGIN, END = "<!-- hardware -->\n", "<!-- end of hardware -->"
# preset, file of the model, its name on the hub
MODELS = (
    ("papo-qwen3-2b", "qwen3_vl_2b", "Qwen/Qwen3-VL-2B-Thinking"),
    ("papo-g-3b", "qwen2_5_vl_3b", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ("papo-g-7b", "qwen2_5_vl_7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
    ("papo-g-7b", "qwen2_5_vl_32b", "Qwen/Qwen2.5-VL-32B-Instruct"),
)
CARDS = (
    *(("rtx4090", 1), ("rtx4090", 4), ("l40s", 1), ("l40s", 4)),
    *(("a100", 1), ("a100", 8), ("h100", 1), ("h100", 8)),
)


def config_of(file: str) -> Path:
    return ROOT / f"tests/data/configs/{file}.json"


@functools.cache
def sizes_of(preset: str, file: str) -> ModelSizes:
    return ModelSizes.of(dataclasses.replace(get_preset(preset).model, path=str(config_of(file))))


def row(preset: str, file: str, name: str, card: str, gpus: int) -> tuple[str, str | None]:
    """A line of the table, and the command without the data, where it fits."""
    config, gpu = get_preset(preset), GPUS[card]
    here = dataclasses.replace(config.model, path=str(config_of(file)))
    resolved = dataclasses.replace(config, model=here, objective=config.objective.resolved())
    sizes, lengths, layout = sizes_of(preset, file), Lengths(), Layout(gpus, gpu.memory)
    found = remedy(resolved, sizes, lengths, layout)
    start = f"| {name.partition('/')[2].rpartition('-')[0]} | {gpus} x {card} "
    if found is None:
        return f"{start}| nothing makes it fit | | |", None
    chosen = list(found[0])
    changed, there = changed_by(chosen, resolved, layout)
    now = estimate_step(changed, sizes, lengths, there, gpu)
    engine = faster_engine(list(effects(changed, sizes, lengths, there, gpu)), now)
    if engine is not None:
        chosen.append(engine.option)
        changed, there = changed_by([engine.option], changed, there)
    plan = plan_memory(changed, sizes, lengths, there)
    time = estimate_step(changed, sizes, lengths, there, gpu).total
    hours = steps_of_epochs(config, VIRL39K) * time / 3600
    flags = " ".join(option.flags for option in chosen)
    shown = f"`{flags}`" if flags else "–"
    given = dataclasses.replace(config, model=dataclasses.replace(config.model, path=name))
    line = f"{start}| {shown} | {plan.peak / GIB:.0f} of {gpu.memory / GIB:.0f} | {hours:.0f} |"
    return line, train_command(given, there.ranks, flags)


def table() -> str:
    lines = [
        "| model | GPUs | options beyond the preset's | GiB of one GPU | hours for ViRL39K |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    shown = ""
    for model in MODELS:
        for card, gpus in CARDS:
            line, command = row(*model, card, gpus)
            lines.append(line)
            if model[1] == "qwen2_5_vl_7b" and (card, gpus) == ("h100", 8):
                shown = command or ""
    command = f"\nThe command of a row, here of the 7B on eight H100s:\n\n```bash\n{shown}\n```\n"
    return "\n".join(lines) + "\n" + command


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
