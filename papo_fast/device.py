"""Which device a run uses."""

from __future__ import annotations

import torch

from papo_fast.errors import InputError


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where torch sees one, else cpu; any other name is taken as it is."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {name!r}, but torch sees no CUDA device: see papo-fast doctor")
    return device
