"""What gradient checkpointing stores of each layer, kept in the CPU's memory until its backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

LEAST = 1 << 16
"""Numbers of the smallest tensor that is worth a copy."""


class OffloadedActivations(saved_tensors_hooks):
    """A context for a forward pass, whose large activations wait in the CPU's memory.

    Those are what depends on weights, and is none: residual streams between layers. Positions and
    masks, which all layers share, stay.

    Attributes:
        offloaded: bytes that were moved.
    """

    def __init__(self) -> None:
        self.offloaded = 0
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.grad_fn is None or tensor.numel() < LEAST or not tensor.is_floating_point():
            return tensor.device, tensor
        self.offloaded += tensor.nbytes
        kept = torch.empty(
            tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda"
        )
        return tensor.device, kept.copy_(tensor.detach(), non_blocking=True)

    @staticmethod
    def _unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)
