"""Seconds of a step: an estimate from FLOPs and bytes under stated assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from papo_fast.config import Config
from papo_fast.optimizer import is_compact
from papo_fast.planning.arguments import MFU, Lengths
from papo_fast.planning.gpus import GPU
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.units import FULL, Layout, ModelBytes
from papo_fast.planning.workload import micro_batch, step_work

BANDWIDTH_SHARE = 0.5
"""Share of its memory bandwidth that sampling, and the optimizer, are assumed to reach."""
HOST_BANDWIDTH = 20e9
"""Bytes per second between a GPU and the CPU's memory, each way, that are assumed (PCIe 4)."""
TOKEN_SECONDS = {"hf": 0.03, "vllm": 0.005}
"""Least time of one sampling step, for Python and launches."""
VLLM_SEQUENCES = 256
"""Sequences that vLLM can sample at a time, and is advised to (`rollout.batch_size`)."""
STEP_BYTES = {"plain": 28, "compact": 60}
"""Bytes that an optimizer step reads and writes per parameter: fused, or in a dozen passes."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step's phases."""

    rollout: float
    experience: float
    update: float
    overlapped: bool = False
    """Whether the next rollout runs beside the rest (`rollout.overlap`)."""

    @property
    def total(self) -> float:
        training = self.experience + self.update
        return max(self.rollout, training) if self.overlapped else self.rollout + training


def estimate_step(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout, gpu: GPU, mfu: float = MFU
) -> StepTime:
    """FLOPs / (rate x MFU) of passes; sampling reads weights and keys once per token.

    Beside these, what options to save memory cost: copies to and from the CPU's memory, weights
    made of 4 bits, and the optimizer. Communication between GPUs and the rest of the CPU's work are
    taken to hide behind it, and rewards to be free.
    """
    work = step_work(config, lengths, sizes.flops)
    rate = layout.ranks * gpu.flops * mfu
    experience, update = of_options(config, sizes, lengths, layout, gpu)
    return StepTime(
        rollout=sampling_seconds(config, sizes, lengths, layout, gpu, mfu),
        experience=work.experience / rate + experience,
        update=work.update / rate + update,
        overlapped=config.rollout.overlap,
    )


def sampling_seconds(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout, gpu: GPU, mfu: float = MFU
) -> float:
    """Seconds of a rollout: prompts once, then a token of all responses at a time."""
    work = step_work(config, lengths, sizes.flops)
    engine = config.rollout.engine
    vllm = engine != "hf"
    # GPUs that share one copy of the weights, and such groups
    together = config.rollout.tensor_parallel if engine == "vllm_server" else 1
    servers = max(1, len(config.rollout.server_urls))
    engines = servers if engine == "vllm_server" else layout.ranks
    each = -(-work.sequences // engines)
    at_a_time = min(each, config.rollout.batch_size)
    # generate waits for the longest of a batch, which is taken to reach the limit
    steps = lengths.response if vllm else config.rollout.max_new_tokens
    weights = 2.0 * sizes.parameters
    if not vllm:
        batch = micro_batch(config, lengths, sizes.vision.merge, layout.ranks)
        model = ModelBytes(config, sizes, layout, batch)
        weights = model.weights + _of_codes(model)
    cache = 2 * sizes.decoder.cached * lengths.tree(0.5)
    read = (weights + at_a_time * cache) / together
    step = max(TOKEN_SECONDS["vllm" if vllm else "hf"], read / (gpu.bandwidth * BANDWIDTH_SHARE))
    prefill = work.prefill / (engines * together * gpu.flops * mfu)
    return prefill + -(-each // at_a_time) * steps * step


def of_options(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout, gpu: GPU
) -> tuple[float, float]:
    """Seconds of a step that passes without gradient, and updates, take beyond their FLOPs."""
    batch = micro_batch(config, lengths, sizes.vision.merge, layout.ranks)
    model = ModelBytes(config, sizes, layout, batch)
    updates = config.updates_per_rollout
    trees = lengths.tree(config.rollout.group_size) * config.train.update_prompts
    batches = max(1.0, trees * batch.streams / max(1, batch.tokens) / layout.ranks)
    bandwidth = gpu.bandwidth * BANDWIDTH_SHARE
    numbers = model.trainable / model.shards
    passes = passes_of_update(config)
    per_update = numbers * STEP_BYTES["compact" if is_compact(config) else "plain"] / bandwidth
    per_batch = passes * _of_codes(model) / bandwidth
    per_batch += 2 * model.waiting() / HOST_BANDWIDTH
    if config.parallel.offload:  # weights over at each pass, gradients back; AdamW on the CPU
        shard = model.weights / model.shards
        per_batch += (passes * shard + FULL * numbers) / HOST_BANDWIDTH
        per_update += numbers * STEP_BYTES["plain"] / HOST_BANDWIDTH
    elif config.parallel.offload_optimizer:
        per_update += 2 * model.state(numbers) / HOST_BANDWIDTH
    experience = batches * updates * _of_codes(model) / bandwidth
    return experience, updates * (per_update + batches * per_batch)


def passes_of_update(config: Config) -> int:
    """How often an update goes over the weights: forward, backward, and once to recompute."""
    return 3 if config.model.gradient_checkpointing else 2


def _of_codes(model: ModelBytes) -> float:
    """Bytes of a pass over weights in 4 bits: codes are read, weights written and read."""
    return model.codes + (2.0 * model.compute * model.codes_numbers if model.codes else 0.0)
