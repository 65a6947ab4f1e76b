"""Seconds, tokens per second and MFU of a step on many GPUs, put together of modelled parts.

Two schedules. The authors' (EasyR1): every response carries its prompt and its pictures, and old,
reference and corrupted log-probs have passes of their own. Ours: groups packed around one prompt.
Their passes' utilisation is **fitted** to one published number, the masked forward pass of the 3B;
nothing is fitted to a step's time, nor to ours. All else is assumed, and listed in `ASSUMPTIONS`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rich.table import Table

from papo_fast.config import Config
from papo_fast.model.flops import ModelShape
from papo_fast.planning.arguments import MFU, Lengths
from papo_fast.planning.gpus import GPU, find_gpu
from papo_fast.planning.seconds import (
    BANDWIDTH_SHARE,
    TOKEN_SECONDS,
    VLLM_SEQUENCES,
    StepTime,
    passes_of_update,
)
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.workload import step_work

MASKED_FORWARD = 49.0
"""Published seconds of the pass with corrupted pictures, PAPO-G 3B on two H100s."""
PUBLISHED = {
    # model: (GPUs, {objective: seconds per step}), PAPO's paper, arXiv 2507.06448
    "3B": (2, {"GRPO": 360.9, "PAPO-G": 428.1}),
    "7B": (4, {"GRPO": 258.5, "PAPO-G": 367.1}),
}
EASYR1 = (1800, 2000)
"""Published tokens per second and GPU of EasyR1 on eight H100s, 3B and 7B, geo3k."""
GPUS_SIMULATED = (1, 2, 4, 8, 16, 32, 64)
GATHER = 300e9
"""Bytes per second at which a GPU gathers weights, by NVLink or by eight network cards together."""
SYNC = 10e9
"""Bytes per second at which new weights reach the sampler."""
FIXED = 5.0
"""Seconds of a step for data, rewards and Python that nothing hides."""

ASSUMPTIONS = (
    f"Ours: passes at {MFU:.0%} of the GPU's rate, which no run on these GPUs has shown.",
    "Theirs: passes at the utilisation that gives the published 49 s of the 3B's masked forward "
    "pass; this is the one number that was fitted.",
    f"vLLM reads weights and keys at {BANDWIDTH_SHARE:.0%} of the memory's rate, {VLLM_SEQUENCES} "
    f"responses at a time, {TOKEN_SECONDS['vllm'] * 1e3:.0f} ms per token at least, and waits for "
    "the longest response (rollout.max_new_tokens).",
    f"FSDP gathers at {GATHER / 1e9:.0f} GB/s, by NVLink and by eight network cards of a machine "
    "alike, behind the passes as far as these last.",
    "Whether it fits is not asked here: that is the plan's work.",
    f"New weights reach the sampler at {SYNC / 1e9:.0f} GB/s; {FIXED:.0f} s of each step for data, "
    "rewards and Python.",
    "Overlapped: the sampler has GPUs of its own, as many as make the step shortest, and a batch "
    "is one step old.",
)


@dataclass(frozen=True)
class Model:
    """What the parts depend on: parameters, numbers a token leaves in the cache, FLOPs."""

    parameters: int
    cached: int
    shape: ModelShape

    @classmethod
    def of(cls, sizes: ModelSizes) -> Model:
        return cls(sizes.parameters, sizes.decoder.cached, sizes.flops)


QWEN2_5_VL = {
    "3B": Model(
        3_754_622_976,
        18_432,
        ModelShape(2_774_532_096, 73_728, 311_164_928, 640_645_120, 4),
    ),
    "7B": Model(
        8_292_166_656,
        28_672,
        ModelShape(6_525_288_448, 100_352, 544_997_376, 642_611_200, 4),
    ),
    "32B": Model(
        33_452_718_336,
        131_072,
        ModelShape(31_205_621_760, 327_680, 778_567_680, 649_000_960, 4),
    ),
}
"""The published models, whose config.json need not be there."""


@dataclass(frozen=True)
class Simulated:
    """Seconds of a step and its parts; `flops` are of the passes without recomputation."""

    gpus: int
    rollout: float
    experience: float
    update: float
    sync: float
    tokens: float
    flops: float
    peak: float
    samplers: int = 0
    """GPUs that sample while the others train; 0: all do both, in turn."""

    @property
    def seconds(self) -> float:
        overlapped = self.samplers > 0
        parts = StepTime(self.rollout, self.experience, self.update, overlapped=overlapped)
        return parts.total + self.sync + FIXED

    @property
    def tokens_per_gpu(self) -> float:
        """Prompt and response tokens per second and GPU, every response with its prompt."""
        return self.tokens / self.seconds / self.gpus

    @property
    def mfu(self) -> float:
        return self.flops / self.seconds / self.gpus / self.peak


def rollout_seconds(config: Config, sizes: Model, lengths: Lengths, gpus: int, gpu: GPU) -> float:
    """One vLLM engine on each GPU: throughput, or the longest response where that takes longer."""
    each = -(-config.rollout.prompts * config.rollout.group_size // gpus)
    at_a_time = min(each, VLLM_SEQUENCES)
    cache = 2 * sizes.cached * lengths.tree(0.5)
    read = (2 * sizes.parameters + at_a_time * cache) / (gpu.bandwidth * BANDWIDTH_SHARE)
    step = max(TOKEN_SECONDS["vllm"], read)
    alone = max(TOKEN_SECONDS["vllm"], 2 * sizes.parameters / (gpu.bandwidth * BANDWIDTH_SHARE))
    tail = (config.rollout.max_new_tokens - lengths.response) * alone
    prefill = step_work(config, lengths, sizes.shape).prefill / (gpus * gpu.flops * MFU)
    return prefill + each / at_a_time * lengths.response * step + max(0.0, tail)


def gathers(sizes: Model, gpus: int, batches: float, passes: int) -> float:
    """Seconds of a rank's traffic: weights in bfloat16 at each pass, gradients in float32."""
    if gpus == 1:
        return 0.0
    share = (gpus - 1) / gpus
    return batches * share * sizes.parameters * (2 * passes + (4 if passes > 1 else 0)) / GATHER


def ours(
    config: Config,
    sizes: Model,
    lengths: Lengths,
    gpus: int,
    gpu: GPU,
    *,
    samplers: int = 0,
) -> Simulated:
    """This project's schedule, with vLLM.

    Args:
        samplers: GPUs that only sample, while the others train on the batch before.
    """
    trainers = gpus - samplers
    work = step_work(config, lengths, sizes.shape)
    rate = trainers * gpu.flops * MFU
    trees = lengths.tree(config.rollout.group_size) * config.rollout.prompts
    streams = config.objective.streams_at_once
    batches = max(1.0, streams * trees / config.train.max_tokens / trainers)
    update = max(work.update / rate, gathers(sizes, trainers, batches, passes_of_update(config)))
    experience = work.experience / rate
    if experience:
        experience = max(experience, gathers(sizes, trainers, batches, 1))
    useful = dataclasses.replace(
        config, model=dataclasses.replace(config.model, gradient_checkpointing=False)
    )
    without = step_work(useful, lengths, sizes.shape)
    sampled = config.rollout.prompts * config.rollout.group_size
    decoded = sampled * (
        sizes.shape.language(lengths.response, lengths.response * lengths.prompt)
        + sizes.shape.head(lengths.response)
    )
    return Simulated(
        gpus=gpus,
        rollout=rollout_seconds(config, sizes, lengths, samplers or gpus, gpu),
        experience=experience,
        update=update,
        sync=2 * sizes.parameters / SYNC,
        tokens=sampled * lengths.tree(1),
        flops=without.experience + without.update + without.prefill + decoded,
        peak=gpu.flops,
        samplers=samplers,
    )


def overlapped(
    config: Config, sizes: Model, lengths: Lengths, gpus: int, gpu: GPU
) -> Simulated | None:
    """The best split of the GPUs into samplers and trainers; None for a single one."""
    splits = sorted({max(1, round(gpus * share / 16)) for share in range(1, 16)} - {gpus})
    return min(
        (ours(config, sizes, lengths, gpus, gpu, samplers=n) for n in splits),
        key=lambda found: found.seconds,
        default=None,
    )


def unshared_forward(config: Config, lengths: Lengths, shape: ModelShape) -> float:
    """FLOPs of one pass in which every response carries its own prompt and pictures."""
    n = lengths.prompt + lengths.response
    each = shape.language(round(n), n * (n + 1) // 2) + shape.head(lengths.response)
    sequences = config.rollout.prompts * config.rollout.group_size
    return sequences * (each + shape.vision(lengths.image))


def fitted_mfu(config: Config, sizes_3b: Model, lengths: Lengths, gpu: GPU) -> float:
    """The utilisation at which the 3B's masked forward pass takes the published 49 s."""
    flops = unshared_forward(config, lengths, sizes_3b.shape)
    return flops / (MASKED_FORWARD * PUBLISHED["3B"][0] * gpu.flops)


def authors(
    config: Config,
    sizes: Model,
    lengths: Lengths,
    gpus: int,
    gpu: GPU,
    mfu: float,
    *,
    papo: bool,
) -> Simulated:
    """The authors' schedule: old and reference passes, the masked one, four for an update.

    An update's are the forward, the recomputed one and a backward of two. Drawing masks and
    shipping pictures, which the published times of PAPO hold besides, is left out.
    """
    forward = unshared_forward(config, lengths, sizes.shape)
    each = forward / (gpus * gpu.flops * mfu)
    sampled = config.rollout.prompts * config.rollout.group_size
    return Simulated(
        gpus=gpus,
        rollout=rollout_seconds(config, sizes, lengths, gpus, gpu),
        experience=(3 if papo else 2) * each,
        update=4 * each,
        sync=2 * sizes.parameters / SYNC,
        tokens=sampled * lengths.tree(1),
        flops=(5 + papo) * forward,
        peak=gpu.flops,
    )


@dataclass(frozen=True)
class Beside:
    """Published seconds of a step, and the same step simulated in both schedules."""

    name: str
    gpus: int
    published: float
    theirs: Simulated
    ours: Simulated

    @property
    def error(self) -> float:
        """Of the simulation of the authors' schedule, relative to what they publish."""
        return self.theirs.seconds / self.published - 1


def beside_published(config: Config, lengths: Lengths) -> list[Beside]:
    """`PUBLISHED` on H100s beside what is simulated.

    Args:
        config: resolved; GRPO's steps are of its objective without PAPO's terms.
    """
    h100 = find_gpu("h100")
    fitted = fitted_mfu(config, QWEN2_5_VL["3B"], lengths, h100)
    plain = dataclasses.replace(
        config.objective, kl_prcp_coef=0.0, entropy_coef=0.0, aug_entropy_coef=0.0
    )
    found = []
    for name, (gpus, seconds) in PUBLISHED.items():
        model = QWEN2_5_VL[name]
        for goal, published in seconds.items():
            papo = goal != "GRPO"
            theirs = authors(config, model, lengths, gpus, h100, fitted, papo=papo)
            changed = config if papo else dataclasses.replace(config, objective=plain)
            mine = ours(changed, model, lengths, gpus, h100)
            found.append(Beside(f"{goal} {name}", gpus, published, theirs, mine))
    return found


def tables(config: Config, lengths: Lengths, gpu: GPU, models: dict[str, Model]) -> list[Table]:
    """Published seconds beside the simulated ones, and ours on 1 to 64 GPUs.

    Args:
        config: resolved.
        models: by the names that are printed.
    """
    fitted = fitted_mfu(config, QWEN2_5_VL["3B"], lengths, find_gpu("h100"))
    check = _table(
        f"seconds per step on H100s; the authors' passes at {fitted:.1%} of the rate (fitted)",
        ("", "GPUs", "published", "simulated", "error", "ours, simulated"),
    )
    for found in beside_published(config, lengths):
        seconds = (str(found.published), f"{found.theirs.seconds:.0f}", f"{found.error:+.0%}")
        check.add_row(found.name, str(found.gpus), *seconds, f"{found.ours.seconds:.0f}")
    table = _table(
        f"our steps of {config.rollout.prompts} prompts on {gpu.name}s, simulated",
        (
            "",
            "GPUs",
            "s",
            "tokens/s/GPU",
            "MFU",
            "overlapped: s",
            "tokens/s/GPU",
            "MFU",
            "samplers",
        ),
    )
    for name, model in models.items():
        for gpus in GPUS_SIMULATED:
            now = ours(config, model, lengths, gpus, gpu)
            then = overlapped(config, model, lengths, gpus, gpu)
            cells = _cells(now) + (
                ("–",) * 4 if then is None else (*_cells(then), str(then.samplers))
            )
            table.add_row(name, str(gpus), *cells)
        table.add_section()
    return [check, table]


def _cells(found: Simulated) -> tuple[str, str, str]:
    return f"{found.seconds:.0f}", f"{found.tokens_per_gpu:.0f}", f"{found.mfu:.0%}"


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table
