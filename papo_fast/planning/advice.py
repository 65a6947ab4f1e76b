"""What to switch on when a plan does not fit, and what each option would bring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from papo_fast.config import Config
from papo_fast.planning.memory import Layout, MemoryPlan, plan_memory
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.workload import Lengths, update_streams

LORA_RANK = 64
VLLM_SHARE = 0.35
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


def vllm_option(sizes: ModelSizes, layout: Layout) -> Option:
    # bfloat16 weights in at most two thirds of its share
    tensor_parallel = 1
    room = VLLM_SHARE * (layout.gpu_memory or 0) * 2 / 3
    while 2 * sizes.parameters / tensor_parallel > room and tensor_parallel < layout.ranks:
        tensor_parallel *= 2

    def change(config: Config, layout: Layout) -> Setup:
        return config, dataclasses.replace(
            layout,
            vllm=True,
            vllm_share=VLLM_SHARE,
            vllm_tensor_parallel=tensor_parallel,
        )

    return Option(f"--vllm-share {VLLM_SHARE} --vllm-tp {tensor_parallel}", change)


def gpus_option(ranks: int) -> Option:
    def change(config: Config, layout: Layout) -> Setup:
        return config, dataclasses.replace(layout, ranks=ranks)

    return Option(f"--gpus {ranks}", change)


def options(config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout) -> list[Option]:
    """What is not on yet, the harmless first."""
    found = []
    if not config.model.gradient_checkpointing:
        found.append(
            model_option("--model.gradient-checkpointing True", gradient_checkpointing=True)
        )
    # one response and its prompt must fit
    least = update_streams(config) * lengths.tree(1)
    tokens = config.train.max_tokens // 2
    if tokens >= least:
        found.append(train_option(tokens))
    if tokens // 4 >= least:
        found.append(train_option(tokens // 4))
    if layout.ranks > 1 and not layout.vllm:
        found.append(vllm_option(sizes, layout))
    if config.model.train_vision and not config.model.lora_rank:
        found.append(model_option("--model.train-vision False", train_vision=False))
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
        yield Effect(option, plan, plan.peak <= (there.gpu_memory or 0))


def remedy(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout
) -> tuple[list[Option], MemoryPlan] | None:
    """Options that make it fit: one if one is enough, else the fewest from the front, more GPUs last.

    None where even all of them together do not.
    """
    found = list(effects(config, sizes, lengths, layout))
    for effect in found:
        if effect.fits:
            return [effect.option], effect.plan
    chosen: list[Option] = []
    for effect in found[:-1]:
        trial_config, trial_layout = effect.option.change(config, layout)
        plan = plan_memory(trial_config, sizes, lengths, trial_layout)
        before = plan_memory(config, sizes, lengths, layout)
        if plan.peak >= before.peak:  # it brings nothing on top of the others
            continue
        chosen = [o for o in chosen if o.name.split()[0] != effect.option.name.split()[0]]
        chosen.append(effect.option)
        config, layout = trial_config, trial_layout
        if plan.peak <= (layout.gpu_memory or 0):
            return chosen, plan
    ranks = layout.ranks
    while ranks < MOST_GPUS:
        ranks *= 2
        there = dataclasses.replace(layout, ranks=ranks)
        plan = plan_memory(config, sizes, lengths, there)
        if plan.peak <= (layout.gpu_memory or 0):
            return [*chosen, gpus_option(ranks)], plan
    return None
