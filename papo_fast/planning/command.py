"""`papo-fast plan`: the table of a plan, and what to switch on where it does not fit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from papo_fast.config import Config
from papo_fast.config_checks import resolve
from papo_fast.errors import InputError
from papo_fast.planning import seconds
from papo_fast.planning.advice import effects, remedy
from papo_fast.planning.gpus import GIB, GPU, find_gpu
from papo_fast.planning.memory import RESERVE_BYTES, RESERVE_SHARE, Layout, MemoryPlan, plan_memory
from papo_fast.planning.seconds import StepTime, estimate_step
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.workload import Lengths

MOST_GPUS = 10**6


@dataclass(frozen=True)
class PlanArguments:
    """Memory per GPU and seconds per step, before anything runs, from config.json alone."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    gpu: str = "h100"
    """GPU type: a100-40g, a100, h100, h200, b200, l40s, rtx4090 or mi300x."""
    gpus: int = 1
    """GPUs, one process each."""
    mfu: float = seconds.MFU
    """Share of the GPU's dense bfloat16 rate that is assumed for the estimate of the time."""
    lengths: Lengths = field(default_factory=Lengths)


def print_plan(arguments: PlanArguments, console: Console) -> None:
    """Raises `InputError` for settings that cannot be planned with."""
    config, lengths = arguments.config, arguments.lengths
    if not 1 <= arguments.gpus <= MOST_GPUS:
        raise InputError(f"gpus is {arguments.gpus}: it must be between 1 and {MOST_GPUS}")
    if not 0 < arguments.mfu <= 1:
        raise InputError(f"mfu is {arguments.mfu}: expected a share in (0, 1]")
    lengths.check()
    gpu = find_gpu(arguments.gpu)
    # what is not needed to plan may be missing
    digits = dataclasses.replace(config.digits, enabled=False)
    data = dataclasses.replace(config.data, train=config.data.train or "any")
    config = resolve(dataclasses.replace(config, digits=digits, data=data))
    sizes = ModelSizes.of(config.model)
    layout = Layout(ranks=arguments.gpus, gpu_memory=gpu.memory)
    plan = plan_memory(config, sizes, lengths, layout)
    time = estimate_step(config, sizes, lengths, layout, gpu, arguments.mfu)
    console.print(
        f"[bold]{sizes.parameters / 1e9:.2f} B parameters ({sizes.family}) on {arguments.gpus} x "
        f"{gpu.name}[/], preset {config.preset}",
        soft_wrap=True,
    )
    console.print(_memory_table(plan, gpu))
    _print_about(arguments, plan, console)
    _print_time(arguments, time, gpu, console)
    _print_options(config, sizes, lengths, layout, plan, console)


def _memory_table(plan: MemoryPlan, gpu: GPU) -> Table:
    table = Table(title="GiB of one GPU", title_justify="left")
    for heading, justify in (("", "left"), ("update", "right"), ("rollout", "right")):
        table.add_column(heading, justify=justify)
    for name in dict.fromkeys([*plan.update, *plan.rollout]):
        values = [part.get(name, 0.0) for part in (plan.update, plan.rollout)]
        if any(values):
            table.add_row(name, *map(_gib, values))
    table.add_section()
    sums = [sum(part.values()) for part in (plan.update, plan.rollout)]
    table.add_row("[bold]sum[/]", *(f"[bold]{_gib(x)}[/]" for x in sums))
    table.add_row(f"of {gpu.name}", *[_gib(gpu.memory)] * 2)
    return table


def _print_about(arguments: PlanArguments, plan: MemoryPlan, console: Console) -> None:
    lengths, config, batch = arguments.lengths, arguments.config, plan.batch
    lines = [
        f"For prompts of {lengths.image} image and {lengths.text} text tokens, "
        f"{config.rollout.group_size} responses of {lengths.response}: micro-batches of "
        f"{batch.tokens} tokens in {batch.streams} stream(s).",
        f"Not held: {_gib(plan.logits)} GiB of logits and their gradients, which papo_kernels "
        "computes and drops.",
        f"Reserve: {RESERVE_BYTES / GIB:.1f} GiB and {RESERVE_SHARE:.0%} of the GPU, assumed for "
        "CUDA, NCCL and fragments.",
        f"CPU memory: {_gib(plan.loading)} GiB in the main process while the model is loaded"
        + (f", {_gib(plan.host)} GiB in each while it trains (offload)" if plan.host else "")
        + f", and up to {_gib(plan.scoring)} GiB in the {config.reward.workers} reward worker(s) "
        f"of each process (--reward.workers). All {arguments.gpus} process(es) on one machine: up "
        f"to {_gib(plan.host_peak(arguments.gpus))} GiB.",
    ]
    if config.rollout.engine == "vllm_server" and not config.rollout.server_urls:
        lines.append(
            f"vLLM runs on {config.rollout.tensor_parallel} GPU(s) of its own beside these."
        )
    for line in lines:
        console.print(line, soft_wrap=True)


def _print_time(arguments: PlanArguments, time: StepTime, gpu: GPU, console: Console) -> None:
    config = arguments.config
    console.print(
        f"\nEstimated, not measured: [bold]{_duration(time.total)}[/] per step of "
        f"{config.rollout.prompts} prompts (rollout {_duration(time.rollout)}, experience "
        f"{_duration(time.experience)}, update {_duration(time.update)}), from FLOPs at "
        f"{arguments.mfu:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s (--mfu) and sampling at "
        f"{seconds.BANDWIDTH_SHARE:.0%} of {gpu.bandwidth / 1e9:.0f} GB/s; communication and "
        "rewards not counted.",
        soft_wrap=True,
    )


def _print_options(
    config: Config,
    sizes: ModelSizes,
    lengths: Lengths,
    layout: Layout,
    plan: MemoryPlan,
    console: Console,
) -> None:
    memory = layout.gpu_memory or 0
    table = Table(title="each option alone", title_justify="left")
    for heading, justify in (("", "left"), ("GiB of one GPU", "right"), ("", "left")):
        table.add_column(heading, justify=justify)
    for effect in effects(config, sizes, lengths, layout):
        word = "[green]fits[/]" if effect.fits else "does not fit"
        table.add_row(effect.option.name, _gib(effect.plan.peak), word)
    console.print()
    console.print(table)
    if plan.fits(memory):
        console.print(f"[green]fits[/]: {_gib(memory - plan.peak)} GiB are left")
        return
    console.print(
        "[red]does not fit[/]: "
        + (plan.problem or f"{_gib(plan.peak - memory)} GiB too much on each GPU")
    )
    found = remedy(config, sizes, lengths, layout)
    if found is None:
        console.print("no combination of these options makes it fit")
        return
    chosen, better = found
    flags = ", ".join(option.name for option in chosen)
    host = f", and {_gib(better.host)} GiB of CPU memory in each process" if better.host else ""
    console.print(
        f"switch on: [bold]{flags}[/] ({_gib(better.peak)} of {_gib(memory)} GiB{host})",
        soft_wrap=True,
    )


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"


def _duration(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
