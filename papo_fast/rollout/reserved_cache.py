"""Keys and values of responses that are being written, with room for what is still to come."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def branch(cache: DynamicCache, count: int, n: int, room: int) -> None:
    """Make the cache of `count` prompts that of their responses, `n` of each in turn, in place.

    Args:
        room: tokens that a response may still have. `DynamicCache` copies all keys and values for
            each token; here they stay where they are. Layers of other kinds, such as those with a
            sliding window or a state of linear attention, are repeated as they are.
    """
    rows = torch.arange(count).repeat_interleave(n)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = ReservedLayer(layer, n, room)
        else:
            layer.reorder_cache(rows)


class ReservedLayer(DynamicLayer):
    """A layer of the cache: (R, H, K, D) keys and values at the front of longer tensors."""

    def __init__(self, prompts: DynamicLayer, n: int, room: int):
        super().__init__()
        self.lazy_initialization(prompts.keys, prompts.values)
        self._all = [_longer(x, n, room) for x in (prompts.keys, prompts.values)]
        self._show(prompts.keys.shape[2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add (R, H, k, D) and return everything. Raises `RuntimeError` where there is no room."""
        start, more = self.keys.shape[2], key_states.shape[2]
        for whole, new in zip(self._all, (key_states, value_states), strict=True):
            whole.narrow(2, start, more).copy_(new)
        self._show(start + more)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        self._all = [whole.index_select(0, beam_idx) for whole in self._all]
        self._show(self.keys.shape[2])

    def _show(self, length: int) -> None:
        self.keys, self.values = (whole[:, :, :length] for whole in self._all)


def _longer(prompts_BHKD: Tensor, n: int, room: int) -> Tensor:
    b, heads, length, width = prompts_BHKD.shape
    whole = prompts_BHKD.new_empty(b, n, heads, length + room, width)
    whole[:, :, :, :length] = prompts_BHKD[:, None]
    return whole.flatten(0, 1)
