"""What tests of options that save memory need."""

from __future__ import annotations

import pytest
import torch

CPU = torch.device("cpu")
QUANT = "pip install -e '.[quant]'"


def needs(option):
    if "8bit" in option or "4-bit" in option:
        pytest.importorskip("bitsandbytes", reason=QUANT)
    if "4-bit" in option or "LoRA" in option:
        pytest.importorskip("peft", reason="pip install -e '.[lora]'")
