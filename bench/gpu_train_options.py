"""Options that save memory: two updates of each against the plain ones, and its memory, by plan."""

import gc
import importlib.util
from dataclasses import replace

import torch
from gpu_train_record import LeftOut
from gpu_train_times import MEMORY, SMALL_MEMORY
from gpu_train_update import SMALL, configured, one_update
from update_memory import (
    EIGHT,
    HALF,
    QLORA,
    configuration,
    experience,
    peak_of_update,
    planned,
    write_checkpoint,
)

HALF_REFERENCE = {"dtype": "bfloat16", "reference_dtype": "bfloat16"}
CHECKPOINTING = {"dtype": "bfloat16", "gradient_checkpointing": True}
WAYS = {
    # name: changes to model, train, parallel; most that a loss may differ
    "bfloat16 reference": (HALF_REFERENCE, {}, {}, 3e-2),
    "bfloat16 weights": (HALF, {}, {}, 5e-2),
    "bfloat16 weights, float32 copy": (HALF, {"master_weights": True}, {}, 3e-2),
    "8-bit AdamW": ({"dtype": "bfloat16"}, EIGHT, {}, 3e-2),
    "optimizer offloaded": ({"dtype": "bfloat16"}, {}, {"offload_optimizer": True}, 3e-2),
    "activations offloaded": (CHECKPOINTING, {}, {"offload_activations": True}, 3e-2),
    "LoRA on 4 bits": (QLORA, {}, {}, 2e-1),
}


def options(recorder):
    """Losses of two updates beside those of bfloat16 alone; most bytes beside the plan's."""
    if recorder.cuda and not importlib.util.find_spec("bitsandbytes"):
        recorder.note("bitsandbytes", "not installed: 8-bit AdamW and 4 bits are left out")
    case, large = SMALL["qwen2_5_vl"], SMALL_MEMORY if recorder.small else MEMORY
    path, large_path = recorder.folder / "model", recorder.folder / "large"
    write_checkpoint(case, path)
    write_checkpoint(large, large_path)
    groups = experience(case)
    total = torch.cuda.get_device_properties(0).total_memory if recorder.cuda else None
    plain = configured(case, path, "bfloat16", lr=1e-3)
    want, _, _ = one_update(plain, recorder.device, groups, updates=2)
    for name, (model, train, parallel, most) in WAYS.items():
        needed = [m for m in ("bitsandbytes",) if train == EIGHT or model == QLORA]
        needed += ["peft"] if model == QLORA else []
        with recorder.part(name):
            if missing := [m for m in needed if not importlib.util.find_spec(m)]:
                raise LeftOut(f"{missing[0]} is not installed")
            config = replace(
                plain,
                model=replace(plain.model, **model),
                train=replace(plain.train, **train),
                parallel=replace(plain.parallel, **parallel),
            )
            losses, _, _ = one_update(config, recorder.device, groups, updates=2)
            off = max(abs(a - b) for a, b in zip(losses, want, strict=True))
            recorder.check(f"{name}: loss", off, most)
            config = configuration(large, large_path, {"liger": "off"} | model, parallel, train)
            got = peak_of_update(large, config, recorder.device)
            plan = planned(large, config, gpu_memory=total)
            told = sum(v for k, v in plan.update.items() if k != "reserve")
            told += 0 if recorder.cuda else plan.host
            sizes = {"measured MiB": got / 2**20, "planned MiB": told / 2**20}
            recorder.note(name, sizes | {"planned / measured": told / got})
        gc.collect()
