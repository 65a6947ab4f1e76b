"""AdamW with its state as small, and where, a configuration asks for it.

The plain one is torch's. `CompactAdamW` does the same arithmetic in float32, a piece of a weight at
a time, and keeps less between updates: moments in 8 bits, weights in bfloat16 (rounded at random,
or with a float32 copy), or all state in the CPU's memory. With none of these it gives torch's
weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from papo_fast.blockwise import blocks_of, code_8, dequantize_8, quantize_8
from papo_fast.config import Config
from papo_fast.parallel import local

PIECE = 1 << 22
"""Numbers of a weight that are updated at a time."""
TEMPORARIES = 6
"""Float32 tensors of a piece's size that an update takes."""
LEAST_8BIT = 4096
"""Smaller weights keep their moments in float32, as in bitsandbytes; so do vectors."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(config: Config, parameters: list[Tensor], device: torch.device) -> Optimizer:
    """The optimizer that `train` and `model` ask for.

    Args:
        device: on which the model computes.
    """
    train = config.train
    common: dict[str, Any] = {
        "lr": train.lr,
        "betas": train.betas,
        "weight_decay": train.weight_decay,
    }
    if not is_compact(config):
        on = device.type == "cuda" if train.fused == "auto" else train.fused == "on"
        # not False, which would turn off torch's own choice too
        return torch.optim.AdamW(parameters, fused=True if on else None, **common)
    return CompactAdamW(
        parameters,
        **common,
        eight_bits=train.optimizer == "adamw_8bit",
        master=train.master_weights,
        offload=config.parallel.offload_optimizer,
        device=device,
        seed=config.seed,
    )


def is_compact(config: Config) -> bool:
    """Whether it takes `CompactAdamW`."""
    return (
        config.train.optimizer != "adamw"
        or config.model.weights_dtype != "float32"
        or config.parallel.offload_optimizer
    )


class CompactAdamW(Optimizer):
    """AdamW of `torch.optim`, with less memory.

    Args:
        parameters: float32 or bfloat16; gradients are of either.
        eight_bits: keep the moments of matrices in 8 bits, by bitsandbytes.
        master: keep a float32 copy of bfloat16 weights; they are else rounded at random.
        offload: keep all state in the CPU's memory.
        device: on which updates are computed.
        seed: of the random rounding, which also depends on the update and on the weight.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        eight_bits: bool = False,
        master: bool = False,
        offload: bool = False,
        device: torch.device,
        seed: int = 0,
    ):
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.master, self.offload, self.device, self.seed = master, offload, device, seed
        self.codes: dict[str, Tensor] = {}
        if eight_bits:
            self.codes = {name: code_8(name == "exp_avg", device) for name in MOMENTS}
        # now and not in the first step: a checkpoint is loaded into what is there
        for parameter in self._parameters():
            self.state[parameter] = self._new_state(parameter)

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        rows, columns = _rows(parameter).shape
        matrix = parameter.ndim > 1 and parameter.numel() >= LEAST_8BIT
        state = {"step": torch.tensor(0.0)}
        for name in MOMENTS:
            if self.codes and matrix:
                zero = int(self.codes[name].abs().argmin())
                state[name] = self._like(parameter, parameter.shape, torch.uint8, zero)
                blocks = torch.Size((rows, blocks_of(columns)))
                state[f"{name}_scale"] = self._like(parameter, blocks, torch.float32, 0)
            else:
                state[name] = self._like(parameter, parameter.shape, torch.float32, 0)
        if self.master and parameter.dtype != torch.float32:
            state["master"] = self._like(parameter, parameter.shape, torch.float32, 0)
            local(state["master"]).copy_(local(parameter.detach()))
        return state

    def _like(self, parameter: Tensor, shape: torch.Size, dtype: torch.dtype, value: int) -> Tensor:
        """A tensor of this shape beside `parameter`, sharded as it is."""
        here = (*local(parameter).shape[:1], *shape[1:])
        pinned = self.offload and self.device.type == "cuda"
        where = torch.device("cpu") if self.offload else parameter.device
        made = torch.full(here, value, dtype=dtype, device=where, pin_memory=pinned)
        if not isinstance(parameter, DTensor):
            return made
        return DTensor.from_local(
            made,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        ).to(where)  # from_local moves it to the mesh's device, where offloaded weights are not

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(group, parameter, number)
        if self.offload and self.device.type == "cuda":
            torch.cuda.synchronize()  # a checkpoint reads the state on the CPU

    def _update(self, group: dict[str, Any], parameter: Tensor, number: int) -> None:
        state = dict(self.state[parameter])
        count = state.pop("step").add_(1)
        step, state = int(count), {name: _rows(local(x)) for name, x in state.items()}
        weight, gradient = _rows(local(parameter)), _rows(local(parameter.grad))
        if weight.numel() == 0:  # a shard of nothing
            return
        rounds = weight.dtype != torch.float32 and not self.master
        random = torch.Generator(weight.device) if rounds else None
        if random is not None:
            random.manual_seed(hash((self.seed, step, number)) & (2**63 - 1))
        rows = max(1, PIECE // weight.shape[1])
        for first in range(0, len(weight), rows):
            piece = slice(first, first + rows)
            here = {name: x[piece] for name, x in state.items()}
            self._update_piece(group, step, weight[piece], gradient[piece], here, random)

    def _update_piece(
        self,
        group: dict[str, Any],
        step: int,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        random: torch.Generator | None,
    ) -> None:
        """The equations of torch.optim.AdamW, in its order, on (R, C) rows of a weight."""
        device = weight.device
        near = {name: x.to(device, non_blocking=True) for name, x in state.items()}
        new = near.get("master", weight).float()
        gradient = gradient.float()
        first, second = (self._moment(name, near) for name in MOMENTS)
        beta1, beta2 = group["betas"]
        new.mul_(1 - group["lr"] * group["weight_decay"])
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"] / (1 - beta1**step)
        spread = (second.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        new.addcdiv_(first, spread, value=-size)
        for name, moment in zip(MOMENTS, (first, second), strict=True):
            if f"{name}_scale" in near:
                codes, scales = quantize_8(moment, self.codes[name])
                state[name].copy_(codes, non_blocking=True)
                state[f"{name}_scale"].copy_(scales, non_blocking=True)
            else:
                state[name].copy_(moment, non_blocking=True)
        if "master" in state:
            state["master"].copy_(new, non_blocking=True)
        if random is not None:
            stochastic_rounding_(new, random)
        weight.copy_(new)

    def _moment(self, name: str, near: Mapping[str, Tensor]) -> Tensor:
        scales = near.get(f"{name}_scale")
        return near[name] if scales is None else dequantize_8(near[name], scales, self.codes[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state in place; torch's own would give moments the weights' dtype."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                for name, value in self.state[parameter].items():
                    value.copy_(state_dict["state"][key][name])
            group.update({k: v for k, v in saved.items() if k != "params"})


def stochastic_rounding_(values: Tensor, random: torch.Generator) -> Tensor:
    """Round float32 values to bfloat16 numbers in place, up or down at random.

    The probabilities are such that the mean is the value: bfloat16 is float32 without its last 16
    bits, and random ones are added before these are cut off.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=random
    )
    bits.add_(noise).bitwise_and_(-(1 << 16))
    return values


def _rows(tensor: Tensor) -> Tensor:
    """(R, C): a vector is one row."""
    return tensor.view(1, -1) if tensor.ndim < 2 else tensor.flatten(1)
