"""The processes of one run: who they are, what they tell each other, how weights are sharded.

One SPMD program: `torchrun` starts as many processes as there are devices, on one machine or on
many; a plain `python` run is a world of one, in which everything here does nothing. Weights,
gradients and optimizer are sharded by FSDP2 (`fully_shard`), each decoder layer and vision block a
unit of its own. With replicas (HSDP) the shards stay within a group of ranks and gradients are
averaged over groups.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from papo_fast.config import ParallelConfig
from papo_fast.errors import InputError

# How long a rank waits for the others: a rollout or a checkpoint of the slowest one. One that has
# died is noticed at once: gloo's connections close, and torchrun ends the others.
TIMEOUT = timedelta(minutes=30)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out", "Broken pipe")


_of_thread = threading.local()  # `group`, of a thread that has one of its own
_alone = False  # the main process, while the others wait for it in `main_first`


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


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


def backend(device: torch.device) -> str:
    """Of processes on such devices; what lies in the CPU's memory, as offloaded gradients do, is
    reduced there."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def process_group(device: torch.device, offload: bool = False) -> Iterator[None]:
    """Joins the processes that torchrun started; leaves them at the end. Alone: does nothing.

    Args:
        offload: `parallel.offload`, for which one process alone becomes a group too: FSDP, which
            moves the layers to and fro, shards over a mesh.

    Raises `InputError` where another process died or was not heard of for `TIMEOUT`.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if (alone and not offload) or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", device.index or 0)))
    if alone:
        store = dist.HashStore()
        dist.init_process_group(backend(device), store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend(device), timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(x in str(error) for x in _LOST):
            raise
        said = str(error).splitlines()[0]
        raise InputError(
            f"rank {rank()} lost another process of this run ({said}). The error that ended it is "
            "further up or in that process's own output; the same command with --resume goes on "
            "from the last checkpoint"
        ) from error
    finally:
        if dist.is_initialized():  # vLLM ends it where an engine has joined it
            dist.destroy_process_group()


def share_of(items: Sequence[Any]) -> list[int]:
    """Positions in `items` that are this rank's: equal numbers, up to one."""
    return list(range(rank(), len(items), world_size()))


def gather_in_order(mine: Sequence[Any], count: int) -> list[Any]:
    """All ranks' results by the positions of `share_of`, `count` in all, on every rank."""
    if world_size() == 1:
        return list(mine)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(mine), group=getattr(_of_thread, "group", None))
    everything: list[Any] = [None] * count
    for r, part in enumerate(parts):
        everything[r :: world_size()] = part
    return everything


def gather(value: Any) -> list[Any]:
    """`value` of every rank, on every rank."""
    if world_size() == 1:
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value, group=getattr(_of_thread, "group", None))
    return parts


class Collectives:
    """A process group for one thread, whose messages must not mix with the main thread's.

    Every rank makes one at the same time, in its main thread.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(timeout=TIMEOUT, backend="gloo") if world_size() > 1 else None

    @contextmanager
    def of_this_thread(self) -> Iterator[None]:
        """`gather` and `gather_in_order` go through it, in the thread that calls them."""
        _of_thread.group = self._group
        try:
            yield
        finally:
            _of_thread.group = None


def whole(tensor: Tensor) -> Tensor:
    """All of it, of a sharded one gathered from the ranks, which all take part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block as if it were alone, then the others do."""
    global _alone
    if not is_main():
        dist.barrier()
        yield
        return
    _alone = True
    try:
        yield
    finally:
        _alone = False
    wait_for_all()


def device_mesh(device: torch.device, parallel: ParallelConfig) -> DeviceMesh | None:
    """One axis of shards, or replicas x shards; None for a world of one that offloads nothing.

    Raises `InputError` where `replicas` does not divide the number of processes.
    """
    world, replicas = world_size(), parallel.replicas
    if world % replicas:
        raise InputError(
            f"parallel.replicas is {replicas}, but there are {world} processes: it must divide them"
        )
    if world == 1 and not parallel.offload:
        return None
    if replicas == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    shape = (replicas, world // replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def shard(
    policy: nn.Module,
    units: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    offload: bool,
    forwards: Sequence[str],
) -> nn.Module:
    """Shard `policy` over `mesh`, `units` each on their own, with the main process's values.

    The main process holds the values, on the CPU; the others may hold an empty (meta) policy.

    Args:
        dtype: of the gathered weights; gradients are reduced in float32.
        offload: keep weights, gradients and optimizer in the CPU's memory.
        forwards: names of the methods that run the model; inside them all weights are whole.
    """
    whole = policy.state_dict() if is_main() else {}
    buffers = {name: b.clone() for name, b in policy.named_buffers()} if is_main() else {}
    _weights_to_meta(policy)
    policy.to("meta")
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    cuda = mesh.device_type == "cuda"
    offloading = CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy()
    for unit in (*units, policy):
        fully_shard(unit, mesh=mesh, mp_policy=precision, offload_policy=offloading)
    for name in forwards:
        register_fsdp_forward_method(policy, name)
    device = torch.device(mesh.device_type, torch.cuda.current_device() if cuda else None)
    policy.to_empty(device="cpu" if offload else device)
    set_model_state_dict(
        policy,
        whole,
        options=StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload
        ),
    )
    # not in the state dict: rotary frequencies, the bans
    for name, buffer in policy.named_buffers():
        value = buffers[name].to(device) if is_main() else torch.empty_like(buffer, device=device)
        dist.broadcast(value, src=0)
        owner, _, leaf = name.rpartition(".")
        setattr(policy.get_submodule(owner), leaf, value)
    return policy


def _weights_to_meta(module: nn.Module) -> None:
    """Weights without values; those that two layers share stay one, which `Module.to` would undo.

    The processes without values have them shared, and all must gather the same.
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            if weight not in moved:
                moved[weight] = nn.Parameter(weight.to("meta"), weight.requires_grad)
            setattr(part, name, moved[weight])
