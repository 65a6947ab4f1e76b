"""Linear attention over packed trees: a response goes on from the state that its prompt ends in.

A layer of Qwen3.5's gated delta rule looks at no keys. It carries a matrix along, its recurrent
state, and a causal convolution in front of it reads the last K - 1 inputs. So a prompt runs once,
from a state of zero, and each of its responses starts from what the prompt left behind. Nothing
else passes between segments. Gradients of all responses flow through state and convolution into
the prompt, where they add up.

The arithmetic is the layer's own: it runs over the prompts as one batch and over the responses as
another, and takes the states for a cache. On a GPU it therefore calls whatever transformers calls
there: `fla` and `causal_conv1d` where they are installed, else torch's functions, which are slow.
Only torch's functions on the CPU are tested. Kernels must have a gradient for the initial and for
the final state; those of `fla.ops.gated_delta_rule.chunk_gated_delta_rule` do.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papo_fast.model.attention import TreeLayout

LAYERS = ("Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")
"""transformers' classes whose forward is the one that `_State` stands in for a cache of."""


class _State:
    """What B sequences leave behind, in the place of transformers' cache.

    That one is written in place, through which no gradient flows.

    Args:
        recurrent: (B, heads, D_k, D_v), where the sequences start from; None for zero.
        inputs: (B, channels, K - 1), the convolution's last inputs; None for zero.

    Both are those of the sequences' ends once a layer has run.
    """

    record_past = True  # else a single token would be convolved by an update in place

    def __init__(self, recurrent: Tensor | None = None, inputs: Tensor | None = None):
        self.recurrent, self.inputs = recurrent, inputs
        self.layers = defaultdict(lambda: self)

    @classmethod
    def joined(cls, states: list[_State]) -> _State:
        return cls(torch.cat([s.recurrent for s in states]), torch.cat([s.inputs for s in states]))

    def of(self, sequences: Tensor) -> _State:
        """Of these sequences, each as often as it is named."""
        return _State(
            self.recurrent.index_select(0, sequences), self.inputs.index_select(0, sequences)
        )

    def has_previous_state(self, layer_idx: int, state_idx: int = 0) -> bool:
        return self.recurrent is not None

    @property
    def recurrent_states(self) -> tuple[Tensor | None]:
        return (self.recurrent,)

    def update_conv_state(self, x_BCL: Tensor, layer_idx: int, conv_kernel_size: int) -> Tensor:
        before = conv_kernel_size - 1
        if self.inputs is None:
            x_BCL = F.pad(x_BCL, (before, 0))
        else:
            x_BCL = torch.cat([self.inputs, x_BCL], dim=-1)
        self.inputs = x_BCL[..., x_BCL.shape[-1] - before :]
        return x_BCL

    def update_recurrent_state(self, state: Tensor, layer_idx: int) -> None:
        self.recurrent = state


class _InTrees(nn.Module):
    """Goes in front of a layer's class: its forward, which takes `tree` too."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        *,
        tree: TreeLayout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(1, T, D) of T packed tokens to (1, T, D); without `tree` the layer's own forward."""
        run = super().forward
        if tree is None:
            return run(hidden_states, cache_params, attention_mask, **kwargs)
        prompts, responses, row = tree.padded
        rows = [p.rows_BL for p in (*prompts, *responses)]
        gathered = hidden_states[0].index_select(0, torch.cat([r.flatten() for r in rows]))
        parts = gathered.split([r.numel() for r in rows])
        padded = [part.view(*r.shape, -1) for part, r in zip(parts, rows, strict=True)]
        # no layer has a bias here, so zeros in front of a prompt leave a state of zero as it is
        n, ends = len(prompts), [_State() for _ in prompts]
        outputs = [
            run(x_BLD, end, p.real_BL, **kwargs)
            for x_BLD, end, p in zip(padded[:n], ends, prompts, strict=True)
        ]
        end = _State.joined(ends)
        outputs += [
            run(x_BLD, end.of(p.parents_B), **kwargs)
            for x_BLD, p in zip(padded[n:], responses, strict=True)
        ]
        return torch.cat([out.flatten(0, 1) for out in outputs]).index_select(0, row)[None]


@functools.cache
def _in_trees(layer: type[nn.Module]) -> type[nn.Module]:
    """`layer` with `_InTrees` in front, under its own name."""
    return type(layer.__name__, (_InTrees, layer), {"__module__": layer.__module__})


def branch_linear_attention(model: nn.Module) -> None:
    """Lets the linear attention of a model of transformers take packed trees, in place.

    Models without such layers stay as they are, and so do other models of the same class.
    """
    for module in model.modules():
        if type(module).__name__ in LAYERS and not isinstance(module, _InTrees):
            module.__class__ = _in_trees(type(module))
