"""What to switch on when a plan does not fit, and what each option would bring."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from papo_fast.config import Config
from papo_fast.planning.memory import Layout, MemoryPlan, plan_memory, vllm_least
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.workload import Lengths, update_streams

LORA_RANK = 64
MOST_SHARE = 0.85
MOST_GPUS = 1024

Setup = tuple[Config, Layout]
Change = Callable[[Config, Layout], Setup]


@dataclass(frozen=True)
class Option:
    """Something to switch on, in the words of the command line."""

    name: str
    change: Change


@dataclass(frozen=True)
class Effect:
    """What an option alone would bring."""

    option: Option
    plan: MemoryPlan
    fits: bool


def model_option(flag: str, **changes: object) -> Option:
    def change(config: Config, layout: Layout) -> Setup:
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, **changes)
        ), layout

    return Option(flag, change)


def train_option(tokens: int) -> Option:
    def change(config: Config, layout: Layout) -> Setup:
        train = dataclasses.replace(config.train, max_tokens=tokens)
        return dataclasses.replace(config, train=train), layout

    return Option(f"--train.max-tokens {tokens}", change)


def offload_option() -> Option:
    def change(config: Config, layout: Layout) -> Setup:
        parallel = dataclasses.replace(config.parallel, offload=True)
        return dataclasses.replace(config, parallel=parallel), layout

    return Option("--parallel.offload", change)


def rollout_options(config: Config, sizes: ModelSizes, layout: Layout) -> Iterator[Option]:
    """vLLM in each process where one GPU can hold its weights, and on GPUs of its own."""

    def option(flag: str, **changes: object) -> Option:
        def change(config: Config, layout: Layout) -> Setup:
            rollout = dataclasses.replace(config.rollout, **changes)
            return dataclasses.replace(config, rollout=rollout), layout

        return Option(flag, change)

    memory = layout.gpu_memory or 1
    share = math.ceil(20 * vllm_least(sizes) / memory) / 20
    if share <= MOST_SHARE and (config.rollout.engine, config.rollout.gpu_memory) != (
        "vllm",
        share,
    ):
        yield option(
            f"--rollout.engine vllm --rollout.gpu-memory {share}", engine="vllm", gpu_memory=share
        )
    if config.rollout.engine != "vllm_server":
        together = 1
        while vllm_least(sizes) / together > MOST_SHARE * memory:
            together *= 2
        yield option(
            f"--rollout.engine vllm_server --rollout.tensor-parallel {together} "
            f"({together} more GPU{'s' * (together > 1)})",
            engine="vllm_server",
            tensor_parallel=together,
        )


def gpus_option(ranks: int) -> Option:
    def change(config: Config, layout: Layout) -> Setup:
        return config, dataclasses.replace(layout, ranks=ranks)

    return Option(f"--gpus {ranks}", change)


def options(config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout) -> list[Option]:
    """What is not on yet, the harmless first."""
    found = []
    if not config.model.gradient_checkpointing:
        found.append(model_option("--model.gradient-checkpointing", gradient_checkpointing=True))
    # one response and its prompt must fit
    least = update_streams(config) * lengths.tree(1)
    tokens = config.train.max_tokens // 2
    if tokens >= least:
        found.append(train_option(tokens))
    if tokens // 4 >= least:
        found.append(train_option(tokens // 4))
    found += rollout_options(config, sizes, layout)
    if config.model.train_vision and not config.model.lora_rank:
        found.append(model_option("--model.no-train-vision", train_vision=False))
    if layout.ranks > 1 and not config.parallel.offload:
        found.append(offload_option())
    if not config.model.lora_rank:
        found.append(model_option(f"--model.lora-rank {LORA_RANK}", lora_rank=LORA_RANK))
    found.append(gpus_option(2 * layout.ranks))
    return found


def effects(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout
) -> Iterator[Effect]:
    """Each option alone."""
    for option in options(config, sizes, lengths, layout):
        changed, there = option.change(config, layout)
        plan = plan_memory(changed, sizes, lengths, there)
        yield Effect(option, plan, plan.fits(there.gpu_memory or 0))


def remedy(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout
) -> tuple[list[Option], MemoryPlan] | None:
    """Options that make it fit, the harmless first, and more GPUs where these are not enough.

    None of them can be left out. None where nothing makes it fit.
    """
    ranks = layout.ranks
    while ranks <= MOST_GPUS:
        more = [gpus_option(ranks)] if ranks > layout.ranks else []
        there = dataclasses.replace(layout, ranks=ranks)
        chosen = _enough(config, sizes, lengths, there)
        if chosen is not None:
            chosen += more
            return chosen, _plan_with(chosen, config, sizes, lengths, layout)
        ranks *= 2
    return None


def _enough(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout
) -> list[Option] | None:
    """As few options as it takes on this number of GPUs, or None."""
    memory = layout.gpu_memory or 0
    plan = plan_memory(config, sizes, lengths, layout)
    if plan.fits(memory):
        return []
    found = options(config, sizes, lengths, layout)[:-1]  # the last one is more GPUs
    for option in found:
        if _plan_with([option], config, sizes, lengths, layout).fits(memory):
            return [option]
    chosen: list[Option] = []
    for option in found:
        if not plan.fits(memory):
            flag = option.name.split()[0]
            trial = [o for o in chosen if o.name.split()[0] != flag] + [option]
            better = _plan_with(trial, config, sizes, lengths, layout)
            if (bool(better.problem), better.peak) < (bool(plan.problem), plan.peak):
                chosen, plan = trial, better
    if not plan.fits(memory):
        return None
    for option in reversed(chosen):
        fewer = [o for o in chosen if o is not option]
        if _plan_with(fewer, config, sizes, lengths, layout).fits(memory):
            chosen = fewer
    return chosen


def _plan_with(
    chosen: list[Option], config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout
) -> MemoryPlan:
    for option in chosen:
        config, layout = option.change(config, layout)
    return plan_memory(config, sizes, lengths, layout)
