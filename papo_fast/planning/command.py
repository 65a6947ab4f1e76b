"""`papo-fast plan`: the table of a plan, and what to switch on where it does not fit or is slow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from papo_fast.config import Config
from papo_fast.config_checks import check_processes, resolve, steps_of_epochs
from papo_fast.consoles import say
from papo_fast.errors import InputError
from papo_fast.planning import seconds
from papo_fast.planning.advice import (
    changed_by,
    effects,
    faster_engine,
    gpus_needed,
    remedy,
    with_engine,
)
from papo_fast.planning.arguments import Lengths, PlanArguments
from papo_fast.planning.gpus import GIB, GPU, find_gpu
from papo_fast.planning.memory import RESERVE_BYTES, RESERVE_SHARE, Layout, MemoryPlan, plan_memory
from papo_fast.planning.seconds import StepTime, estimate_step
from papo_fast.planning.shell import train_command
from papo_fast.planning.simulate import ASSUMPTIONS, EASYR1, QWEN2_5_VL, Model, tables
from papo_fast.planning.sizes import ModelSizes

MOST_GPUS = 10**6


@dataclass(frozen=True)
class _Case:
    """What is planned: the resolved configuration of one model on some GPUs."""

    config: Config
    sizes: ModelSizes
    lengths: Lengths
    layout: Layout
    gpu: GPU
    mfu: float
    steps: int

    def plan(self) -> MemoryPlan:
        return plan_memory(self.config, self.sizes, self.lengths, self.layout)

    def time(self) -> StepTime:
        return estimate_step(self.config, self.sizes, self.lengths, self.layout, self.gpu, self.mfu)

    @property
    def setup(self) -> tuple[Config, ModelSizes, Lengths, Layout]:
        return self.config, self.sizes, self.lengths, self.layout


def print_plan(arguments: PlanArguments, console: Console) -> None:
    """Raises `InputError` for settings that cannot be planned with."""
    if arguments.simulate:
        _print_simulation(arguments, console)
        return
    case = _case(arguments)
    plan, time, gpu = case.plan(), case.time(), case.gpu
    console.print(
        f"[bold]{case.sizes.parameters / 1e9:.2f} B parameters ({escape(case.sizes.family)}) on "
        f"{arguments.gpus} x {gpu.name}[/], preset {case.config.preset}",
        soft_wrap=True,
    )
    console.print(_memory_table(plan, gpu))
    _print_about(case, plan, console)
    _print_time(case, time, console)
    _print_options(case, plan, time, console)
    _print_commands(arguments.config, case, plan, time, console)


def simulated(arguments: PlanArguments) -> tuple[Config, GPU, dict[str, Model]]:
    """What `--simulate` simulates: the resolved configuration, with vLLM, on these GPUs, and models
    by the names that are printed.

    Raises `InputError` for settings that cannot be planned with.
    """
    config, models = arguments.config, QWEN2_5_VL
    if config.model.path:
        sizes = ModelSizes.of(config.model)
        models = {f"{sizes.parameters / 1e9:.1f} B": Model.of(sizes)}
    # vLLM in both schedules
    rollout = dataclasses.replace(
        config.rollout, engine="vllm", server_urls=(), server_transfer="disk"
    )
    model = dataclasses.replace(config.model, path=config.model.path or "any")
    config = dataclasses.replace(config, rollout=rollout, model=model)
    return _checked(dataclasses.replace(arguments, config=config)), _gpu(arguments), models


def _print_simulation(arguments: PlanArguments, console: Console) -> None:
    config, gpu, models = simulated(arguments)
    for table in tables(config, arguments.lengths, gpu, models):
        console.print(table)
    low, high = EASYR1
    console.print(
        f"Beside them: EasyR1 publishes {low} to {high} tokens/s/GPU for GRPO on eight H100s "
        "(geo3k, whose prompts are shorter).",
        soft_wrap=True,
    )
    for line in ASSUMPTIONS:
        console.print(f"- {line}", soft_wrap=True, highlight=False)


def _gpu(arguments: PlanArguments) -> GPU:
    given = (arguments.gpu_memory, arguments.gpu_tflops, arguments.gpu_bandwidth)
    return find_gpu(arguments.gpu, *given)


def _checked(arguments: PlanArguments) -> Config:
    """The resolved configuration; what is not needed to plan may be missing."""
    config = arguments.config
    if not 1 <= arguments.gpus <= MOST_GPUS:
        raise InputError(f"gpus is {arguments.gpus}: it must be between 1 and {MOST_GPUS}")
    if not 0 < arguments.mfu <= 1:
        raise InputError(f"mfu is {arguments.mfu}: expected a share in (0, 1]")
    if not 1 <= arguments.rows <= 10**9:
        raise InputError(f"rows is {arguments.rows}: it must be between 1 and 1e9")
    arguments.lengths.check()
    digits = dataclasses.replace(config.digits, enabled=False)
    data = dataclasses.replace(config.data, train=config.data.train or "any")
    return resolve(dataclasses.replace(config, digits=digits, data=data))


def _case(arguments: PlanArguments) -> _Case:
    gpu = _gpu(arguments)
    config = _checked(arguments)
    ranks = arguments.gpus - servers_gpus(config)
    if ranks < 1:
        raise InputError(
            f"gpus is {arguments.gpus}, of which the vLLM server takes {servers_gpus(config)} "
            "(rollout.tensor_parallel): none is left to train on"
        )
    check_processes(config, ranks)
    steps = config.train.steps or steps_of_epochs(config, arguments.rows)
    layout = Layout(ranks=ranks, gpu_memory=gpu.memory)
    sizes = ModelSizes.of(config.model)
    return _Case(config, sizes, arguments.lengths, layout, gpu, arguments.mfu, steps)


def servers_gpus(config: Config) -> int:
    """GPUs that a run's own vLLM server takes."""
    own = config.rollout.engine == "vllm_server" and not config.rollout.server_urls
    return config.rollout.tensor_parallel if own else 0


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


def _print_about(case: _Case, plan: MemoryPlan, console: Console) -> None:
    lengths, config, batch, ranks = case.lengths, case.config, plan.batch, case.layout.ranks
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
        f"of each process (--reward.workers). All {ranks} process(es) on one machine: up "
        f"to {_gib(plan.host_peak(ranks))} GiB.",
    ]
    if servers := servers_gpus(config):
        lines.append(f"vLLM's server has {servers} of the GPUs; {ranks} train.")
    for line in lines:
        console.print(line, soft_wrap=True)


def _print_time(case: _Case, time: StepTime, console: Console) -> None:
    gpu = case.gpu
    console.print(
        f"\nEstimated, not measured: [bold]{_duration(time.total)}[/] per step of "
        f"{case.config.rollout.prompts} prompts (rollout {_duration(time.rollout)}, experience "
        f"{_duration(time.experience)}, update {_duration(time.update)}"
        f"{'; the next rollout runs beside the rest' if time.overlapped else ''}), and "
        f"[bold]{_duration(case.steps * time.total)}[/] for the whole run of {case.steps} steps "
        f"(--rows), from FLOPs at {case.mfu:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s (--mfu), "
        f"sampling at {seconds.BANDWIDTH_SHARE:.0%} of {gpu.bandwidth / 1e9:.0f} GB/s and "
        f"{seconds.HOST_BANDWIDTH / 1e9:.0f} GB/s to the CPU's memory; communication between GPUs "
        "and rewards not counted.",
        soft_wrap=True,
    )


def _print_options(case: _Case, plan: MemoryPlan, time: StepTime, console: Console) -> None:
    memory = case.gpu.memory
    table = Table(title="each option alone", title_justify="left")
    for heading, justify in (
        ("", "left"),
        ("GiB of one GPU", "right"),
        ("a step", "right"),
        ("", "left"),
    ):
        table.add_column(heading, justify=justify)
    table.add_row("as it is", _gib(plan.peak), _duration(time.total), _fits(plan.fits(memory)))
    for effect in effects(*case.setup, case.gpu, case.mfu):
        peak, its_time = _gib(effect.plan.peak), _duration(effect.time.total)
        table.add_row(effect.option.name, peak, its_time, _fits(effect.fits))
    console.print()
    console.print(table)


def _fits(yes: bool) -> str:
    return "[green]fits[/]" if yes else "does not fit"


def _print_commands(
    given: Config, case: _Case, plan: MemoryPlan, time: StepTime, console: Console
) -> None:
    """What is left or missing, the options that mend it, a faster engine, and commands to copy."""
    memory = case.gpu.memory
    chosen = []
    if plan.fits(memory):
        console.print(f"[green]fits[/]: {_gib(memory - plan.peak)} GiB are left")
    else:
        console.print(
            "[red]does not fit[/]: "
            + (plan.problem or f"{_gib(plan.peak - memory)} GiB too much on each GPU")
        )
        found = remedy(*case.setup)
        if found is None:
            least = gpus_needed(*case.setup)
            more = f": it takes {least} of these" if least else ""
            console.print(
                f"no combination of these options makes it fit on so many GPUs{more}",
                soft_wrap=True,
            )
            return
        chosen, better = found
        host = f", and {_gib(better.host)} GiB of CPU memory in each process" if better.host else ""
        flags = ", ".join(option.name for option in chosen)
        console.print(
            f"switch on: [bold]{flags}[/] ({_gib(better.peak)} of {_gib(memory)} GiB{host})",
            soft_wrap=True,
        )
    config, layout = changed_by(chosen, case.config, case.layout)
    mended = dataclasses.replace(case, config=config, layout=layout)
    now = mended.time() if chosen else time
    command = train_command(given, layout.ranks, " ".join(option.flags for option in chosen))
    say(console, f"the command: {command}")
    found_effects = list(effects(*mended.setup, case.gpu, case.mfu))
    faster = faster_engine(found_effects, now)
    if faster is not None:
        _, there = faster.option.change(config, layout)
        flags = " ".join(option.flags for option in with_engine(chosen, faster.option))
        console.print(
            f"faster: vLLM takes [bold]{_duration(faster.time.total)}[/] for a step in place of "
            f"{_duration(now.total)}: {escape(train_command(given, there.ranks, flags))}",
            soft_wrap=True,
            highlight=False,
        )


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"


def _duration(value: float) -> str:
    if value < 120:
        return f"{value:.0f} s"
    if value < 7200:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h" if value < 48 * 3600 else f"{value / 86400:.1f} days"
