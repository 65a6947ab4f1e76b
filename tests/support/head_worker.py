"""One rank of a test: gradients of both streams under FSDP2 layouts, beside those of whole logits.

    python head_worker.py OUT LAYOUT...

Run by test_sharded_head.py, with torchrun's variables in the environment. Each rank has a batch of
its own. The truth comes first, from the model before it is sharded: the gradient of all ranks'
batches, averaged over ranks, by `log_softmax` of the model's own logits. Written for each rank and
layout: the relative error of every parameter's gradient.
"""

import copy
import json
import sys
import types
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import AutoModelForImageTextToText

from papo_fast.cli import leave
from papo_fast.integrations.streams import AugStream, two_streams
from papo_fast.integrations.verl import linear_cross_entropy
from papo_fast.parallel import gather, process_group, rank, world_size
from support.family_checkpoints import byte_tokenizer, family_config, spread

WEIGHTS = (1.0, 0.3, 0.2, 0.1, -0.5)
"""Of the loss's terms: log-probs, entropy, those of the corrupted stream, perception KL."""


def make_model(tied: bool) -> torch.nn.Module:
    config = family_config("qwen2_5_vl", byte_tokenizer())
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    spread(model)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    return model


def batch_of(model: torch.nn.Module, of_rank: int) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """What the backbone takes, the labels of two of three positions, and corrupted pictures."""
    g = torch.Generator().manual_seed(100 + of_rank)
    ids = torch.randint(0, 200, (2, 13), generator=g)
    ids[:, 2:6] = model.config.image_token_id
    labels = ids.roll(-1, 1)
    labels[:, ::3] = -100
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(32, 3 * 2 * 14**2, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }
    return inputs, labels, torch.randn(32, 3 * 2 * 14**2, generator=g)


def loss_of_logits(model: torch.nn.Module, of_rank: int) -> torch.Tensor:
    inputs, labels, aug = batch_of(model, of_rank)
    counted = labels != -100
    p, q = (
        model(**{**inputs, "pixel_values": x}).logits[counted].log_softmax(-1)
        for x in (inputs["pixel_values"], aug)
    )
    chosen = labels[counted][:, None]
    terms = (
        p.gather(-1, chosen),
        -(p.exp() * p),
        q.gather(-1, chosen),
        -(q.exp() * q),
        p.exp() * (p - q),
    )
    return sum(w * term.sum() for w, term in zip(WEIGHTS, terms, strict=True))


def forward(self: torch.nn.Module, of_rank: int) -> torch.Tensor:
    inputs, labels, aug = batch_of(self, of_rank)
    stats, _ = two_streams(self, inputs, labels, aug=AugStream(aug), grad_budget=0.0)
    return sum(w * x.sum() for w, x in zip(WEIGHTS, stats[:5], strict=True))


def shard(model: torch.nn.Module, layout: str) -> float:
    """Apply FSDP2; returns what its gradient is of the mean over ranks."""
    shape, names = (world_size(),), ("shard",)
    if layout == "HSDP":
        shape, names = (2, world_size() // 2), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    text = model.model.language_model
    units = list(text.layers)
    if layout == "tail group":
        units.append([text.norm, model.lm_head])
    elif layout != "tied":
        units.append(model.lm_head)
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh)
    if layout != "summed":
        return 1.0
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
            module.set_gradient_divide_factor(1.0)
    return float(world_size())


def errors_of(layout: str) -> dict[str, float]:
    model = make_model(tied=layout == "tied")
    mean = sum(loss_of_logits(model, r) for r in range(world_size())) / world_size()
    mean.backward()
    truth = {n: copy.deepcopy(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    factor = shard(model, layout)
    model.forward = types.MethodType(forward, model)
    with torch.no_grad():
        model(rank())
    parts = 1
    for step in range(2):  # the second finds what the passes before have left behind
        model.zero_grad()
        if layout == "accumulated" and step == 1:
            parts = 2
            model.set_requires_gradient_sync(False)
            model(rank()).backward()
            model.set_requires_gradient_sync(True)
        model(rank()).backward()
    errors = {}
    for name, parameter in model.named_parameters():
        if name in truth:
            whole = parameter.grad.full_tensor() / factor / parts
            errors[name] = ((whole - truth[name]).norm() / truth[name].norm()).item()
    return errors


def errors_of_function() -> dict[str, float]:
    """verl's `linear_cross_entropy` of a weight that is still a shard, with HSDP's two axes."""
    shape = (2, world_size() // 2) if world_size() > 2 else (1, world_size())
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=g)
    hidden = torch.randn(world_size(), 5, 8, generator=g)
    labels = torch.randint(0, 50, (world_size(), 5), generator=g)
    leaf = weight.clone().requires_grad_()
    (hidden @ leaf.T).log_softmax(-1).gather(-1, labels[..., None]).sum().backward()
    truth = leaf.grad / world_size()
    sharded = distribute_tensor(weight, mesh, [Replicate(), Shard(0)]).requires_grad_()
    logprobs, _ = linear_cross_entropy(hidden[rank()], sharded, labels[rank()])
    logprobs.sum().backward()
    error = (sharded.grad.full_tensor() - truth).norm() / truth.norm()
    # replicas agree, which full_tensor does not ask them
    alike = [x.equal(sharded.grad.to_local()) for x in gather(sharded.grad.to_local())]
    assert sum(alike) == shape[0]
    return {"weight": error.item()}


def main(out: str, *layouts: str) -> None:
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        found = {layout: errors_of(layout) for layout in layouts}
        found["linear_cross_entropy"] = errors_of_function()
        Path(out, f"rank{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
