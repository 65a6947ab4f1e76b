"""One policy update on the device against the same update on the CPU in float32."""

import importlib.util
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace

import torch
from gpu_train_record import LeftOut
from torch.distributed.tensor import DTensor
from train_step_meter import by_definition, dense_gradients
from update_memory import Case, configuration, experience, write_checkpoint

from papo_fast.experience import add_logprobs
from papo_fast.model.policy import Policy
from papo_fast.presets import get_preset
from papo_fast.samples import all_samples
from papo_fast.update import Updater

CPU = torch.device("cpu")
# Heads as the large models have them: 128 in the language model, 80 in the vision tower.
CASES = {
    family: Case(family, 512, 1024, 2, 4096, 160, 2, (8, 12), 20, 24, 3, 4, 2, 128, 80)
    for family in ("qwen2_5_vl", "qwen3_vl")
}
SMALL = {
    family: Case(family, 256, 256, 2, 256, 160, 2, (4, 8), 10, 5, 2, 2, 1, 128, 80)
    for family in ("qwen2_5_vl", "qwen3_vl")
}
GROUPS = ("visual", "embed_tokens", "self_attn", "mlp", "norm", "lm_head")
# Of the loss relative to its terms' size, and of each group's gradient, relative (Frobenius).
MOST_LOSS = {"float32": 2e-4, "bfloat16": 3e-2}
MOST_GRADIENT = {"float32": 2e-3, "bfloat16": 1e-1}
# What the sparse backward may move besides.
SPARSE = 5e-3


def case_of(recorder, family):
    return (SMALL if recorder.small else CASES)[family]


PRESET = get_preset("papo-g-7b").objective
# All terms: exact ones with gradients into both streams and the exact reference KL; the authors'.
OBJECTIVES = {
    "ours": replace(PRESET, parity="ours", aug="trained", kl_estimator="exact"),
    "official": PRESET,
}


def perturbed(reference):
    """The reference with other weights than the policy's: a KL of 0 would hide a wrong term."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in reference.parameters():
            mine = p.to_local() if isinstance(p, DTensor) else p  # of a mesh of one: all of it
            mine.mul_(1 + 0.05 * torch.randn(mine.shape, generator=g).to(mine.device))
    return reference


def one_update(config, device, groups, *, mesh=None, how=dense_gradients, updates=1):
    """(losses, {name: gradient on the CPU}, policy) of `updates` updates on `groups`.

    Args:
        mesh: to shard over; None: not sharded.
        how: context in which `token_stats` runs: with dense gradients, as it is, by definition.
    """
    for sample in all_samples(groups):
        sample.old = sample.ref = sample.aug = None
    policy = Policy.load(config.model, [], device, config.parallel, mesh)
    reference = None
    if config.objective.needs_reference and config.model.lora_rank:
        reference = policy.reference(config)
    elif config.objective.needs_reference:
        other = Policy.load(config.model, [], device, config.parallel, mesh)
        reference = perturbed(other.requires_grad_(False).eval())
    updater = Updater(config, policy, reference, total_updates=updates)
    losses = []
    with how():
        for _ in range(updates):
            add_logprobs(groups, policy, reference, config)
            losses.append(updater.update(groups, lambda _: None)["loss"])
    return losses, gradients(policy), policy


def by_cpu(config, groups, **options):
    """What is to come out: the same in float32 on the CPU, from whole logits."""
    losses, grads, _ = one_update(config, CPU, groups, how=by_definition, **options)
    return losses, grads


def gradients(policy):
    found = {}
    for name, p in policy.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            found[name] = grad.detach().float().cpu()
    return found


def group_of(name):
    return next((g for g in ("lora", *GROUPS) if g in name), "other")


def gradient_errors(got, want):
    """{group: relative error}; parameters that lack a gradient on one side are an error of 1."""
    wrong, size = defaultdict(float), defaultdict(float)
    for name in want.keys() | got.keys():
        w, g = want.get(name), got.get(name)
        w, g = (torch.zeros_like(g) if w is None else w), (torch.zeros_like(w) if g is None else g)
        wrong[group_of(name)] += (g - w).double().norm().item() ** 2
        size[group_of(name)] += w.double().norm().item() ** 2
    return {k: (wrong[k] / max(size[k], 1e-300)) ** 0.5 for k in sorted(size)}


def compare(recorder, label, got, want, dtype, extra=0.0):
    """Check the loss and the worst group's gradient; note all groups."""
    (losses, grads), (want_losses, want_grads) = got, want
    size = max(max(map(abs, want_losses)), 0.01)
    off = max(abs(a - b) for a, b in zip(losses, want_losses, strict=True)) / size
    errors = gradient_errors(grads, want_grads)
    recorder.note(f"{label}: gradients", errors)
    recorder.check(f"{label}: loss", off, MOST_LOSS[dtype])
    worst = max(errors, key=errors.get)
    recorder.check(f"{label}: {worst}", errors[worst], MOST_GRADIENT[dtype] + extra)


def configured(case, path, dtype="float32", parity="ours", lr=0.0, **model):
    config = configuration(case, path, {"dtype": dtype, "liger": "off"} | model)
    train = replace(config.train, lr=lr, grad_clip=float("inf"))
    return replace(config, objective=OBJECTIVES[parity].resolved(), train=train)


def update(recorder, family):
    """Our exact terms and the official ones, in float32 and in bfloat16."""
    case = case_of(recorder, family)
    path = recorder.folder / "model"
    write_checkpoint(case, path)
    groups = experience(case)
    device, want = recorder.device, {}
    for parity in ("ours", "official"):
        config = configured(case, path, parity=parity)
        recorder.note(f"{parity}: reference KL", config.objective.kl_estimator)
        want[parity] = by_cpu(config, groups)
        for dtype in ("float32", "bfloat16"):
            config = configured(case, path, dtype, parity)
            with recorder.part(f"{parity}, {dtype}"):
                losses, grads, _ = one_update(config, device, groups)
                compare(recorder, f"{parity} {dtype}", (losses, grads), want[parity], dtype)
    config = configured(case, path)
    with recorder.part("the sparse backward, as it is by default"):
        losses, grads, _ = one_update(config, device, groups, how=nullcontext)
        compare(recorder, "default budget", (losses, grads), want["ours"], "float32", SPARSE)
    with recorder.part("activation checkpointing"):
        config = configured(case, path, gradient_checkpointing=True)
        losses, grads, _ = one_update(config, device, groups)
        compare(recorder, "checkpointing", (losses, grads), want["ours"], "float32")
    if recorder.cuda:
        with recorder.part("bfloat16 on the CPU, for comparison"):
            config = configured(case, path, "bfloat16")
            _, grads, _ = one_update(config, CPU, groups, how=by_definition)
            errors = gradient_errors(grads, want["ours"][1])
            recorder.note("ours bfloat16 on the CPU: gradients", errors)


def lora(recorder):
    """Two updates of adapters, whose reference is the model beneath them."""
    if importlib.util.find_spec("peft") is None:
        raise LeftOut("peft is not installed")
    case = case_of(recorder, "qwen2_5_vl")
    path = recorder.folder / "model"
    write_checkpoint(case, path)
    groups = experience(case)
    for dtype in ("float32", "bfloat16"):
        with recorder.part(dtype):
            torch.manual_seed(0)  # adapters are drawn on the CPU
            want = by_cpu(configured(case, path, lr=1e-3, lora_rank=8), groups, updates=2)
            torch.manual_seed(0)
            config = configured(case, path, dtype, lr=1e-3, lora_rank=8)
            losses, grads, policy = one_update(config, recorder.device, groups, updates=2)
            compare(recorder, f"LoRA {dtype}", (losses, grads), want, dtype)
            policy.save(recorder.folder / f"merged-{dtype}")


def liger(recorder):
    """Liger's RMSNorm and SwiGLU in place of torch's own layers."""
    if not recorder.cuda:
        raise LeftOut("Liger's kernels need a GPU")
    if importlib.util.find_spec("liger_kernel") is None:
        raise LeftOut("liger-kernel is not installed")
    for family in ("qwen2_5_vl", "qwen3_vl"):
        case = case_of(recorder, family)
        path = recorder.folder / family
        write_checkpoint(case, path)
        groups = experience(case)
        want = by_cpu(configured(case, path), groups)
        for dtype in ("float32", "bfloat16"):
            with recorder.part(f"{family}, {dtype}"):
                config = configured(case, path, dtype, liger="on")
                losses, grads, _ = one_update(config, recorder.device, groups)
                compare(recorder, f"Liger {family} {dtype}", (losses, grads), want, dtype)
