"""The log-probs of a policy in float64: what those in float32 are measured against."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from papo_fast.model.packing import PackedBatch
from papo_fast.model.plain import PaddedBatch
from papo_fast.model.policy import Policy, inference


class Float64InsteadOfFloat32(TorchDispatchMode):
    """What is asked for in float32 comes in float64.

    Models of transformers ask for it in norms and in rotary positions, whatever their own dtype.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def logprobs_in_float64(
    policy: Policy, batch: PackedBatch | PaddedBatch, temperature: float
) -> Tensor:
    """What `policy.stats(batch, temperature=temperature)` rounds, (N,) float64.

    The whole logits are written out here, so heads with a soft cap are not what it computes.
    """
    double = copy.deepcopy(policy).double()
    double.dtype = torch.float64
    options = double.head_options(temperature)
    assert options.get("softcap") is None
    with inference(double), Float64InsteadOfFloat32():
        hidden_ND, head_VD = double.hidden_and_head(batch)
        logits_NV = (hidden_ND @ head_VD.T + options["bias"]) / temperature
        logprobs_NV = logits_NV.log_softmax(dim=-1)
    assert logprobs_NV.dtype == torch.float64
    return logprobs_NV.gather(1, batch.targets_N[:, None])[:, 0]
