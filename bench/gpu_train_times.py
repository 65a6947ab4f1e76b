"""Times and memory of updates on the device: sharing, group sizes, the plan, layers of a 7B."""

import gc
import time
from dataclasses import replace

import torch
from gpu_train_record import LeftOut
from gpu_train_update import OBJECTIVES
from measure import PeakMemory
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import describe_policy
from train_step_case import Size, make_case
from train_step_case import write_checkpoint as write_step_checkpoint
from train_step_meter import counted
from train_step_ways import OURS, PADDED, UNSHARED, WAYS
from transformers import AutoModelForImageTextToText
from update_memory import Case, configuration, experience, peak_of_update, planned
from update_memory import write_checkpoint as write_memory_checkpoint

from papo_fast.model.attention import NAME
from papo_fast.model.batching import tree_flops
from papo_fast.model.picture_attention import attend_inside_pictures
from papo_fast.model.policy import Policy
from papo_fast.update import Updater

# The published lengths, heads as large as the large models', 0.26 B parameters.
STEP = Size(1024, 8, 4, 32_768, (40, 64), 120, 350, 16_384, 0.46, 128, 80, 48)
SMALL_STEP = Size(64, 2, 2, 96, (8, 8), 6, 8, 200, 0.5)
SMALL_MEMORY = Case("qwen2_5_vl", 128, 256, 2, 512, 64, 2, (8, 8), 8, 8, 2, 2, 1)
MEMORY = Case("qwen2_5_vl", 1024, 4096, 8, 32_768, 320, 4, (40, 64), 120, 350, 4, 5, 2, 128, 80)
MEMORY_WAYS = {
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
    "bfloat16, checkpointing": ("bfloat16", {"gradient_checkpointing": True}),
    "bfloat16, frozen vision tower": ("bfloat16", {"train_vision": False}),
    "bfloat16, LoRA of rank 16": ("bfloat16", {"lora_rank": 16}),
}
BIG = Case("qwen2_5_vl", 3584, 18_944, 1, 152_064, 1280, 2, (40, 64), 120, 350, 2, 5, 2, 128, 80)


def memory(recorder):
    """Most bytes of an update against `papo-fast plan`, whose reserve is for what no tensor is."""
    case = SMALL_MEMORY if recorder.small else MEMORY
    total = torch.cuda.get_device_properties(0).total_memory if recorder.cuda else None
    path = recorder.folder / "model"
    write_memory_checkpoint(case, path)
    for name, (dtype, model) in MEMORY_WAYS.items():
        with recorder.part(name):
            options = {"dtype": dtype, "liger": "off"} | model
            config = configuration(case, path, options)
            got = peak_of_update(case, config, recorder.device)
            plan = planned(case, config, gpu_memory=total)
            told = sum(v for k, v in plan.update.items() if k != "reserve")
            recorder.note(
                name,
                {
                    "measured MiB": got / 2**20,
                    "planned MiB": told / 2**20,
                    "planned / measured": told / got,
                },
            )
        gc.collect()


# (objective, name, label); what is expensive on a GPU comes last
TIMED = (
    ("official", OURS["official"], "papo_fast, official parity"),
    ("grpo", OURS["grpo"], "papo_fast, GRPO"),
    ("both", UNSHARED, "papo_fast, nothing shared"),
    ("official", PADDED["official"], "the authors' schedule, whole logits"),
)


def times(recorder, group_size):
    """Seconds of an update with and without sharing, beside the authors' schedule and TRL's."""
    size = SMALL_STEP if recorder.small else STEP
    path = recorder.folder / "model"
    write_step_checkpoint(size, path)
    dtype = "float32" if recorder.small else "bfloat16"
    case = make_case(size, group_size, path, recorder.device, dtype)
    recorder.note("policy, nats", describe_policy(case))
    ours = _way("both", OURS["both"])
    with recorder.part("papo_fast"):
        _time(recorder, "papo_fast", ours, case)
    with recorder.part("where the time goes"):
        profiled(recorder, lambda: ours(case))
    for objective, name, label in TIMED:
        with recorder.part(label):
            _time(recorder, label, _way(objective, name), case)
    with recorder.part("TRL"):
        from train_step_trl import TRL

        _time(recorder, "TRL's GRPOTrainer", TRL(), case, trl=True)


def _way(objective, name):
    [way] = [w for w in WAYS if (w.objective, w.name) == (objective, name)]
    return way


def _time(recorder, label, way, case, trl=False):
    way(case)  # compiles, allocates, builds TRL's trainer
    peak = PeakMemory(recorder.device)
    peak.start()
    models = [way.trainer.model, way.trainer.ref_model] if trl else None
    with counted(models or [case.policy.model, case.reference.model], trl=trl) as work:
        loss = way(case)
    found = {"loss": loss, "peak MiB beyond weights": peak.read() / 2**20}
    seconds = recorder.seconds(lambda: way(case), repeat=1 if recorder.small else 3, warm=0)
    found |= {
        "ms": seconds * 1e3,
        "response tokens/s": case.tokens / seconds,
        "TFLOP/s": sum(work.flops.values()) / seconds / 1e12,
    }
    if work.kept is not None:
        found["columns kept"] = work.kept
    recorder.note(label, found)


# What a host does for a GPU, by the names of CUDA's calls.
CALLS = ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def profiled(recorder, call, most=15):
    """The kernels that take most of one call, how many are launched and how often it waits."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * recorder.cuda
    recorder.wait()
    start = time.perf_counter()
    with profile(activities=activities) as found:
        call()
        recorder.wait()
    wall = time.perf_counter() - start
    events = found.key_averages()
    kind = "self_device_time_total" if recorder.cuda else "self_cpu_time_total"
    on_device = DeviceType.CUDA if recorder.cuda else DeviceType.CPU
    rows = [e for e in events if e.device_type == on_device]
    rows.sort(key=lambda e: -getattr(e, kind))
    counts = {e.key: e.count for e in events}
    recorder.note("profiled ms", wall * 1e3)
    recorder.note("ms of all kernels", sum(getattr(e, kind) for e in rows) / 1e3)
    recorder.note("kernels launched", sum(counts.get(name, 0) for name in CALLS))
    recorder.note("waits for the device", sum(counts.get(name, 0) for name in WAITS))
    largest = {e.key[:70]: getattr(e, kind) / 1e3 for e in rows[:most]}
    recorder.note("ms by kernel", largest)
    recorder.note("calls by kernel", {e.key[:70]: e.count for e in rows[:most]})


def layers_of_7b(recorder):
    """An update through 1 and through 3 layers of a 7B's shape, and what 28 would then take."""
    if not recorder.cuda:
        raise LeftOut("layers of this size are for a GPU")
    seconds = {}
    for layers in (1, 3):
        case = replace(BIG, layers=layers)
        with recorder.part(f"{layers} layers"):
            seconds[layers] = _update_of_layers(recorder, case, profile_it=layers == 3)
        gc.collect()
        torch.cuda.empty_cache()
    if len(seconds) == 2:
        each = (seconds[3] - seconds[1]) / 2
        recorder.note("ms of one layer", each * 1e3)
        recorder.note("s of 28 layers, extrapolated", seconds[1] + 27 * each)


def _update_of_layers(recorder, case, profile_it):
    config = configuration(case, "", {"dtype": "bfloat16", "liger": "off"})
    goal = replace(OBJECTIVES["ours"].resolved(), kl_coef=0.0)
    config = replace(config, objective=goal)
    attention = {"": "sdpa", "text_config": NAME}
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(
            case.model_config(), attn_implementation=attention, dtype=torch.float32
        )
    attend_inside_pictures(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, [], torch.bfloat16).to("cuda")
    groups = experience(case)
    updater = Updater(config, policy, None, total_updates=1)
    torch.cuda.reset_peak_memory_stats()
    found = recorder.seconds(lambda: updater.update(groups, lambda _: None), repeat=2)
    # both streams, forward and backward
    flops = 2 * 3 * sum(tree_flops(group, policy.shape) for group in groups)
    recorder.note(
        f"{case.layers} layers",
        {
            "ms": found * 1e3,
            "TFLOP/s (3 forward passes)": flops / found / 1e12,
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        },
    )
    if profile_it:
        profiled(recorder, lambda: updater.update(groups, lambda _: None))
    return found
