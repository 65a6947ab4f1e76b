"""What to switch on when a plan does not fit or could be faster, and what each option would bring.

Never more GPUs than there are: those of a vLLM server are taken from them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from papo_fast.config import Config
from papo_fast.planning.arguments import MFU, Lengths
from papo_fast.planning.gpus import GPU, GPUS
from papo_fast.planning.memory import Layout, MemoryPlan, plan_memory, vllm_least
from papo_fast.planning.seconds import VLLM_SEQUENCES, StepTime, estimate_step
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.workload import update_streams

LORA_RANK = 64
MOST_SHARE = 0.85
MOST_GPUS = 1024
WORTH = 0.9
"""A faster engine is advised where it takes less than this share of the time."""

Setup = tuple[Config, Layout]
Change = Callable[[Config, Layout], Setup]


@dataclass(frozen=True)
class Option:
    """Something to switch on, in the words of the command line."""

    name: str
    change: Change

    @property
    def flags(self) -> str:
        """Its name without remarks."""
        return self.name.partition(" (")[0]


@dataclass(frozen=True)
class Effect:
    """What an option alone would bring."""

    option: Option
    plan: MemoryPlan
    time: StepTime
    fits: bool


def _option(name: str, section: str, **changes: object) -> Option:
    def change(config: Config, layout: Layout) -> Setup:
        part = dataclasses.replace(getattr(config, section), **changes)
        return dataclasses.replace(config, **{section: part}), layout

    return Option(name, change)


def lora_option(name: str, **changes: object) -> Option:
    """Adapters, whose base is in no float32 copy and under no compact optimizer's rounding."""

    def change(config: Config, layout: Layout) -> Setup:
        model = dataclasses.replace(config.model, weights_dtype="float32", **changes)
        train = dataclasses.replace(config.train, master_weights=False)
        return dataclasses.replace(config, model=model, train=train), layout

    return Option(name, change)


def offload_option() -> Option:
    """Everything in the CPU's memory, in place of the options that move or shrink a part of it."""

    def change(config: Config, layout: Layout) -> Setup:
        parallel = dataclasses.replace(config.parallel, offload=True, offload_optimizer=False)
        model = dataclasses.replace(config.model, weights_dtype="float32")
        train = dataclasses.replace(config.train, master_weights=False)
        return dataclasses.replace(config, parallel=parallel, model=model, train=train), layout

    return Option("--parallel.offload", change)


def overlap_option(config: Config) -> Option:
    """Sampling beside the update, with what corrects for its older weights."""
    changes: dict[str, object] = {"overlap": True}
    name = "--rollout.overlap"
    if not config.corrects_for_sampler:
        changes["old_logprobs"] = "sampler"
        name += " --rollout.old-logprobs sampler"
    return _option(name, "rollout", **changes)


def rollout_options(config: Config, sizes: ModelSizes, layout: Layout) -> Iterator[Option]:
    """vLLM in each process where one GPU can hold its weights, and on some of the GPUs alone."""
    memory = layout.gpu_memory or 1
    at_a_time = max(config.rollout.batch_size, VLLM_SEQUENCES)
    many = f" --rollout.batch-size {at_a_time}"
    share = math.ceil(20 * vllm_least(sizes) / memory) / 20
    if share <= MOST_SHARE and (config.rollout.engine, config.rollout.gpu_memory) != (
        "vllm",
        share,
    ):
        yield _option(
            f"--rollout.engine vllm --rollout.gpu-memory {share}{many}",
            "rollout",
            engine="vllm",
            gpu_memory=share,
            batch_size=at_a_time,
        )
    if config.rollout.engine == "vllm_server" and not config.rollout.overlap:
        yield overlap_option(config)
    together = 1
    while vllm_least(sizes) / together > MOST_SHARE * memory:
        together *= 2
    if config.rollout.engine != "vllm_server" and together < layout.ranks:

        def server(config: Config, layout: Layout) -> Setup:
            rollout = dataclasses.replace(
                config.rollout,
                engine="vllm_server",
                tensor_parallel=together,
                batch_size=at_a_time,
            )
            rest = dataclasses.replace(layout, ranks=layout.ranks - together)
            return dataclasses.replace(config, rollout=rollout), rest

        yield Option(
            f"--rollout.engine vllm_server --rollout.tensor-parallel {together}{many} "
            f"({together} of the GPUs)",
            server,
        )


def options(config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout) -> list[Option]:
    """What is not on yet, the harmless first."""
    model, train, parallel = config.model, config.train, config.parallel
    found = []
    if not model.gradient_checkpointing:
        found.append(
            _option("--model.gradient-checkpointing", "model", gradient_checkpointing=True)
        )
    # one response and its prompt must fit
    least = update_streams(config) * lengths.tree(1)
    found += [
        _option(f"--train.max-tokens {tokens}", "train", max_tokens=tokens)
        for tokens in (train.max_tokens // 2, train.max_tokens // 8)
        if tokens >= least
    ]
    fewer = max(config.rollout.group_size, config.rollout.batch_size // 4)
    if config.rollout.engine == "hf" and fewer < config.rollout.batch_size:
        found.append(_option(f"--rollout.batch-size {fewer}", "rollout", batch_size=fewer))
    full, halves = not model.lora_rank, model.dtype == "bfloat16"
    alone = layout.ranks == 1 and not parallel.offload
    if full and config.objective.needs_reference and model.reference_dtype != "bfloat16":
        found.append(
            _option("--model.reference-dtype bfloat16", "model", reference_dtype="bfloat16")
        )
    found += rollout_options(config, sizes, layout)
    if train.optimizer != "adamw_8bit":
        found.append(_option("--train.optimizer adamw_8bit", "train", optimizer="adamw_8bit"))
    if full and halves and alone and model.weights_dtype != "bfloat16":
        found.append(_option("--model.weights-dtype bfloat16", "model", weights_dtype="bfloat16"))
    if alone and not parallel.offload_optimizer:
        found.append(_option("--parallel.offload-optimizer", "parallel", offload_optimizer=True))
    if model.gradient_checkpointing and not parallel.offload_activations:
        found.append(
            _option("--parallel.offload-activations", "parallel", offload_activations=True)
        )
    if model.train_vision and full:
        found.append(_option("--model.no-train-vision", "model", train_vision=False))
    if not parallel.offload:
        found.append(offload_option())
    if full:
        found.append(lora_option(f"--model.lora-rank {LORA_RANK}", lora_rank=LORA_RANK))
    if model.quantize != "nf4":
        rank = model.lora_rank or LORA_RANK
        flags = (f"--model.lora-rank {rank} " if full else "") + "--model.quantize nf4"
        found.append(lora_option(flags, lora_rank=rank, quantize="nf4"))
    return found


def effects(
    config: Config,
    sizes: ModelSizes,
    lengths: Lengths,
    layout: Layout,
    gpu: GPU = GPUS["h100"],
    mfu: float = MFU,
) -> Iterator[Effect]:
    """Each option alone."""
    for option in options(config, sizes, lengths, layout):
        changed, there = option.change(config, layout)
        plan = plan_memory(changed, sizes, lengths, there)
        time = estimate_step(changed, sizes, lengths, there, gpu, mfu)
        yield Effect(option, plan, time, plan.fits(there.gpu_memory or 0))


def faster_engine(found: list[Effect], now: StepTime) -> Effect | None:
    """The engine among these effects that fits and takes least time, where that is worth it."""
    engines = [e for e in found if e.fits and e.option.name.startswith("--rollout.engine")]
    best = min(engines, key=lambda effect: effect.time.total, default=None)
    return best if best is not None and best.time.total < WORTH * now.total else None


def with_engine(chosen: list[Option], engine: Option) -> list[Option]:
    """Options and an engine in the place of transformers, whose small batches it needs not."""
    kept = [o for o in chosen if not o.name.startswith("--rollout.batch-size")]
    return [*kept, engine]


def remedy(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout
) -> tuple[list[Option], MemoryPlan] | None:
    """Options that make it fit on these GPUs, the harmless first, of which none can be left out.

    None where nothing makes it fit.
    """
    chosen = _enough(config, sizes, lengths, layout)
    if chosen is None:
        return None
    return chosen, _plan_with(chosen, config, sizes, lengths, layout)


def gpus_needed(config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout) -> int | None:
    """Twice as many GPUs again and again, until options make it fit; None for too many."""
    ranks = layout.ranks
    while ranks <= MOST_GPUS:
        there = dataclasses.replace(layout, ranks=ranks)
        if _enough(config, sizes, lengths, there) is not None:
            return ranks
        ranks *= 2
    return None


def changed_by(chosen: list[Option], config: Config, layout: Layout) -> Setup:
    """Configuration and layout with all these options."""
    for option in chosen:
        config, layout = option.change(config, layout)
    return config, layout


def _enough(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout
) -> list[Option] | None:
    """As few options as it takes on this number of GPUs, or None."""
    memory = layout.gpu_memory or 0
    plan = plan_memory(config, sizes, lengths, layout)
    if plan.fits(memory):
        return []
    found = options(config, sizes, lengths, layout)
    for option in found:
        if _plan_with([option], config, sizes, lengths, layout).fits(memory):
            return [option]
    chosen: list[Option] = []
    # twice: what makes sampling smaller is of no use until updates are small
    for option in [*found, *found]:
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
    changed, there = changed_by(chosen, config, layout)
    return plan_memory(changed, sizes, lengths, there)
