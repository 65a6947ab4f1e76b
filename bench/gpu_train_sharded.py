"""FSDP2 on a mesh of one: every path of several ranks that one GPU can run."""

import contextlib
import os
from dataclasses import replace

import torch
import torch.distributed as dist
from gpu_train_update import by_cpu, case_of, compare, configured, one_update
from torch.distributed.device_mesh import init_device_mesh
from update_memory import experience, write_checkpoint

from papo_fast.model.policy import Policy
from papo_fast.parallel import backend
from papo_fast.run.checkpoint import CheckpointStore
from papo_fast.update import Updater

WAYS = {
    # name: dtype, offload, options of the model
    "float32": ("float32", False, {}),
    "bfloat16": ("bfloat16", False, {}),
    "offload": ("float32", True, {}),
    "checkpointing": ("bfloat16", False, {"gradient_checkpointing": True}),
    "offload and checkpointing": ("bfloat16", True, {"gradient_checkpointing": True}),
}


@contextlib.contextmanager
def alone(device):
    """A process group and a mesh of this process alone."""
    if device.type == "cuda":
        torch.cuda.set_device(0)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")  # there may be no network
    dist.init_process_group(backend(device), store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
    finally:
        dist.destroy_process_group()


def sharded(recorder):
    """Loss and gradients of a sharded policy against the whole one's in float32 on the CPU."""
    case = case_of(recorder, "qwen3_vl")
    path = recorder.folder / "model"
    write_checkpoint(case, path)
    groups = experience(case)
    device = recorder.device
    want = by_cpu(configured(case, path), groups)
    with alone(device) as mesh:
        for name, (dtype, offload, model) in WAYS.items():
            with recorder.part(name):
                config = configured(case, path, dtype, **model)
                config = replace(config, parallel=replace(config.parallel, offload=offload))
                losses, grads, policy = one_update(config, device, groups, mesh=mesh)
                compare(recorder, f"sharded, {name}", (losses, grads), want, dtype)
                if not all(hasattr(p, "device_mesh") for p in policy.parameters()):
                    raise AssertionError("parameters are not sharded")
        with recorder.part("checkpoint of a sharded policy"):
            recorder.check("weights after a checkpoint", _checkpoint(recorder, case, path, mesh), 0)


def _checkpoint(recorder, case, path, mesh):
    """Largest difference of a weight that was saved, changed and loaded again."""
    config = configured(case, path, lr=1e-3)
    policy = Policy.load(config.model, [], recorder.device, config.parallel, mesh)
    updater = Updater(config, policy, None, total_updates=1)
    weights = [p.full_tensor().detach().clone() for p in policy.parameters()]
    store = CheckpointStore(recorder.folder / "checkpoints")
    store.save(1, policy, updater.optimizer, {"score": 0.0})
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    store.load(policy, updater.optimizer)
    after = [p.full_tensor().detach() for p in policy.parameters()]
    return max((a - b).abs().max().item() for a, b in zip(after, weights, strict=True))
