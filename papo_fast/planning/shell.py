"""A configuration as the command that trains it."""

from __future__ import annotations

import shlex
from typing import Any

from papo_fast.config import Config
from papo_fast.presets import get_preset
from papo_fast.setting_bounds import leaves

PER_NODE = 8
"""GPUs of a machine that the command is for, where there are more."""
_UNSAID = ("preset",)


def train_command(config: Config, ranks: int, flags: str = "") -> str:
    """`papo-fast train …`, or under torchrun for several processes, without what the preset says.

    Args:
        config: as the user gave it, not resolved.
        flags: further options, which come last.
    """
    start = "papo-fast"
    if ranks > 1:
        nodes, rest = divmod(ranks, PER_NODE)
        several = nodes > 1 and not rest
        where = (
            f"--nnodes {nodes} --nproc-per-node {PER_NODE} --rdzv-backend c10d "
            "--rdzv-endpoint HOST:29500"
            if several
            else f"--nproc-per-node {ranks}"
        )
        start = f"torchrun {where} -m papo_fast"
    parts = [start, "train", config.preset, *_differences(config)]
    if not config.digits.enabled and not config.data.train:
        parts.append("--data.train TRAIN.parquet")
    return " ".join(filter(None, [*parts, flags]))


def _differences(config: Config) -> list[str]:
    """The settings that are not the preset's, as options."""
    preset = get_preset(config.preset) if config.preset else Config()
    usual = {name: value for name, _, value in leaves(preset)}
    return [
        _flag(name, value)
        for name, _, value in leaves(config)
        if name not in _UNSAID and value != usual[name]
    ]


def _flag(name: str, value: Any) -> str:
    section, dot, leaf = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{section}{dot}{'' if value else 'no-'}{leaf}"
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([f"--{section}{dot}{leaf}", *(shlex.quote(str(v)) for v in values)])
