"""Seconds of a step: an estimate from FLOPs and bytes under stated assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from papo_fast.config import Config
from papo_fast.planning.gpus import GPU
from papo_fast.planning.memory import Layout
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.workload import Lengths, step_work

MFU = 0.35
"""Share of a GPU's dense bfloat16 rate that forward and backward passes are assumed to reach."""
BANDWIDTH_SHARE = 0.5
"""Share of its memory bandwidth that sampling is assumed to reach."""
TOKEN_SECONDS = {"hf": 0.03, "vllm": 0.005}
"""Least time of one sampling step, for Python and launches."""
VLLM_SEQUENCES = 256
"""Sequences that vLLM is assumed to sample at a time."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step's phases."""

    rollout: float
    experience: float
    update: float

    @property
    def total(self) -> float:
        return self.rollout + self.experience + self.update


def estimate_step(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout, gpu: GPU, mfu: float = MFU
) -> StepTime:
    """FLOPs / (rate x MFU) of passes; sampling reads weights and keys once per token.

    Communication and the CPU's work are taken to hide behind it, and rewards to be free.
    """
    work = step_work(config, lengths, sizes.flops)
    rate = layout.ranks * gpu.flops * mfu
    # sampling: every group of GPUs that shares one copy of the weights
    engine = config.rollout.engine
    vllm = engine != "hf"
    together = config.rollout.tensor_parallel if engine == "vllm_server" else 1
    engines = max(1, layout.ranks // together)
    each = -(-work.sequences // engines)
    at_a_time = min(each, VLLM_SEQUENCES if vllm else config.rollout.batch_size)
    # generate waits for the longest of a batch, which is taken to reach the limit
    steps = lengths.response if vllm else config.rollout.max_new_tokens
    width = 2 if vllm else 4
    cache = 2 * sizes.decoder.cached * lengths.tree(0.5)
    read = (width * sizes.parameters + at_a_time * cache) / together
    step = max(TOKEN_SECONDS["vllm" if vllm else "hf"], read / (gpu.bandwidth * BANDWIDTH_SHARE))
    sampling = -(-each // at_a_time) * steps * step
    return StepTime(
        rollout=work.prefill / rate + sampling,
        experience=work.experience / rate,
        update=work.update / rate,
    )
