"""One policy update on the device against the same update on the CPU in float32."""

import functools
import importlib.util
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace

import torch
from gpu_train_record import LeftOut
from torch.distributed.tensor import DTensor
from train_step_meter import dense_gradients
from update_memory import Case, configuration, experience, write_checkpoint

from papo_fast.experience import add_logprobs
from papo_fast.model.policy import Policy, SharedReference
from papo_fast.presets import get_preset
from papo_fast.samples import all_samples
from papo_fast.update import Updater

# Heads as the large models have them: 128 in the language model, 80 in the vision tower.
CASES = {
    family: Case(family, 512, 1024, 2, 4096, 160, 2, (8, 12), 20, 24, 3, 4, 2, 128, 80)
    for family in ("qwen2_5_vl", "qwen3_vl")
}
SMALL = {
    family: Case(family, 256, 256, 2, 512, 160, 2, (4, 8), 12, 6, 2, 3, 2, 128, 80)
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
            noise = torch.randn(p.shape, generator=g).to(p.device)
            p.mul_(1 + 0.05 * noise)
    return reference


def one_update(config, device, groups, *, mesh=None, dense=True, reference=True, updates=1):
    """(losses, {name: gradient on the CPU}, policy) of `updates` updates on `groups`.

    Args:
        mesh: to shard over; None: not sharded.
        dense: leave nothing out of the gradients of `token_stats`.
        reference: a whole model with other weights; False: what `Policy.reference` gives.
    """
    for sample in all_samples(groups):
        sample.old = sample.ref = sample.aug = None
    policy = Policy.load(config.model, [], device, config.parallel, mesh)
    other = None
    if config.objective.needs_reference:
        other = perturbed(policy.reference(config)) if reference else policy.reference(config)
    updater = Updater(config, policy, other, total_updates=updates)
    losses = []
    with dense_gradients() if dense else nullcontext():
        for _ in range(updates):
            add_logprobs(groups, policy, other, config)
            losses.append(updater.update(groups, lambda _: None)["loss"])
    return losses, gradients(policy), policy


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
    """Our exact terms and the official ones, float32 and bfloat16, dense and as by default."""
    case = case_of(recorder, family)
    path = recorder.folder / "model"
    write_checkpoint(case, path)
    groups = experience(case)
    run = functools.partial(one_update, groups=groups)
    cpu = torch.device("cpu")
    for parity in ("ours", "official"):
        config = configured(case, path, parity=parity)
        recorder.note(f"{parity}: reference KL", config.objective.kl_estimator)
        want = run(config, cpu)[:2]
        for dtype in ("float32", "bfloat16"):
            config = configured(case, path, dtype, parity)
            with recorder.part(f"{parity}, {dtype}, CPU"):
                if dtype == "bfloat16":  # how far bfloat16 is off by torch's own arithmetic
                    compare(recorder, f"{parity} bfloat16, CPU", run(config, cpu)[:2], want, dtype)
            if not recorder.cuda:
                continue
            with recorder.part(f"{parity}, {dtype}, CUDA"):
                compare(
                    recorder, f"{parity} {dtype}", run(config, recorder.device)[:2], want, dtype
                )
    with recorder.part("the sparse backward"):
        config = configured(case, path)
        want = run(config, cpu)[:2]
        got = run(config, recorder.device, dense=False)[:2]
        compare(recorder, "float32, default budget", got, want, "float32", SPARSE)
    with recorder.part("activation checkpointing"):
        config = configured(case, path, gradient_checkpointing=True)
        compare(recorder, "checkpointing", run(config, recorder.device)[:2], want, "float32")


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
            torch.manual_seed(0)
            config = configured(case, path, dtype, lr=1e-3, lora_rank=8)
            plain = configured(case, path, lr=1e-3, lora_rank=8)
            run = functools.partial(one_update, groups=groups, reference=False, updates=2)
            want = run(plain, torch.device("cpu"))[:2]
            torch.manual_seed(0)
            *got, policy = run(config, recorder.device)
            compare(recorder, f"LoRA {dtype}", tuple(got), want, dtype)
            if not isinstance(policy.reference(config), SharedReference):
                raise AssertionError("the reference of adapters is a model of its own")
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
        want = one_update(configured(case, path), torch.device("cpu"), groups)[:2]
        for dtype in ("float32", "bfloat16"):
            with recorder.part(f"{family}, {dtype}"):
                config = configured(case, path, dtype, liger="on")
                got = one_update(config, recorder.device, groups)[:2]
                compare(recorder, f"Liger {family} {dtype}", got, want, dtype)
