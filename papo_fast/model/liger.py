"""Liger's kernels in the place of a model's own layers, where there is a GPU to run them."""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys

import torch
from torch import nn

from papo_fast.config import ModelConfig
from papo_fast.errors import InputError

_log = logging.getLogger(__name__)


def use_liger(model: nn.Module, config: ModelConfig, device: torch.device) -> bool:
    """Patch RMSNorm and SwiGLU of this instance, as `model.liger` says; whether that was done.

    Rotary embedding stays torch's: Liger's replacement would change the library's module for all
    models, and for Qwen2.5-VL it replaces a function that transformers 5.19 no longer calls.

    Raises:
        InputError: `model.liger` is `on` and it cannot run here.
    """
    if config.liger == "off":
        return False
    why_not = ""
    if device.type != "cuda":
        why_not = f"its kernels need a GPU and this run is on {device.type}"
    elif importlib.util.find_spec("liger_kernel") is None:
        why_not = "liger-kernel is not installed (pip install -e '.[liger]')"
    if why_not:
        if config.liger == "on":
            raise InputError(
                f"model.liger is on, but {why_not}: pass --model.liger auto, or remove the reason"
            )
        _say_once(f"torch's own layers run, not Liger's: {why_not}")
        return False
    patch(model)
    _say_once("Liger's RMSNorm and SwiGLU run")
    return True


def patch(model: nn.Module) -> None:
    """Liger's layers in this instance; its weights stay where they are, other models too."""
    from liger_kernel.transformers import monkey_patch

    apply = getattr(monkey_patch, f"apply_liger_kernel_to_{model.config.model_type}")
    library = sys.modules[type(model).__module__]
    before = dict(vars(library))
    apply(
        rope=False,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        rms_norm=True,
        swiglu=True,
        model=model,
    )
    for name, value in before.items():  # it has also replaced the library's own classes
        setattr(library, name, value)


@functools.cache
def _say_once(message: str) -> None:
    _log.info(message)
