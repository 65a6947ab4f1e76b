"""Bytes that one process holds at the worst moment of a step."""

from __future__ import annotations

from dataclasses import dataclass

from papo_fast.config import Config
from papo_fast.planning.arguments import Lengths
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.units import FULL, Bytes, Layout, ModelBytes
from papo_fast.planning.workload import MicroBatch, micro_batch, update_streams
from papo_fast.reward_settings import rewarded
from papo_fast.rewards import answer_check, function_worker

__all__ = ["Layout", "MemoryPlan", "plan_memory"]

RESERVE_BYTES, RESERVE_SHARE = 3 * 2**30 // 2, 0.05
"""CUDA context, NCCL's buffers and the allocator's fragments: an assumption."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process.

    Attributes:
        update: by category, at the worst moment of an update; `rollout` while sampling.
        host: bytes of CPU memory that offloads take, per process.
        scoring: bytes that a process's reward workers may take at most, who compare answers.
        loading: bytes of CPU memory that the main process takes while it loads.
        logits: what two streams' whole logits and their gradients would have taken on top.
        batch: the micro-batch it is for.
        problem: why it cannot run however much memory there is, or nothing.
    """

    update: Bytes
    rollout: Bytes
    host: float
    scoring: float
    loading: float
    logits: float
    batch: MicroBatch
    problem: str = ""

    @property
    def peak(self) -> float:
        return max(sum(self.update.values()), sum(self.rollout.values()))

    def host_peak(self, ranks: int) -> float:
        """CPU memory of `ranks` processes on one machine; no worker starts before all is loaded."""
        return max(self.loading, ranks * (self.host + self.scoring))

    def fits(self, gpu_memory: int) -> bool:
        return self.peak <= gpu_memory and not self.problem

    @property
    def worst(self) -> Bytes:
        return max(self.update, self.rollout, key=lambda parts: sum(parts.values()))


def plan_memory(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout | None = None
) -> MemoryPlan:
    """What one process holds at most, for prompts and responses of these lengths."""
    layout = layout or Layout()
    batch = micro_batch(config, lengths, sizes.vision.merge, layout.ranks)
    model = ModelBytes(config, sizes, layout, batch)
    shards = model.shards if model.sharded else 1
    kept = 2 if config.model.reference_dtype == "bfloat16" else FULL
    needs_second = config.objective.needs_reference and not model.lora
    static: Bytes = {
        "weights": model.weights / model.shards + model.codes,
        "reference": kept * sizes.parameters / shards if needs_second else 0,
        "optimizer": model.state(model.trainable) / shards,
    }
    gradients = FULL * model.trainable / shards
    host = model.waiting()
    if config.parallel.offload:  # all but the codes, which are no parameters
        host += sum(static.values()) - model.codes + gradients
        static, gradients = {"weights": model.codes}, 0.0
    elif config.parallel.offload_optimizer and model.cuda:
        host += static.pop("optimizer")
    idle, sampling = sampling_bytes(config, sizes, lengths, model)
    standing = idle | {"weights gathered": model.gathered(), "reserve": 0.0}
    if layout.gpu_memory is not None:
        standing["reserve"] = RESERVE_BYTES + RESERVE_SHARE * layout.gpu_memory
    there = gradients if batch.accumulated or model.sharded else 0.0
    moments = [static | standing | moment for moment in model.moments(there)]
    step = 0.0 if config.parallel.offload else model.step()
    moments.append(static | standing | {"gradients": gradients, "optimizer step": step})
    update = max(moments, key=lambda m: sum(m.values()))
    rollout = static | standing | {"weights gathered": 0.0} | sampling
    problem = ""
    in_process = config.rollout.engine == "vllm" and layout.gpu_memory is not None
    if in_process and sampling["vLLM"] < vllm_least(sizes):
        problem = (
            f"rollout.gpu_memory = {config.rollout.gpu_memory} is "
            f"{sampling['vLLM'] / 2**30:.1f} GiB, less than the {vllm_least(sizes) / 2**30:.1f}"
            " GiB that vLLM needs in each process"
        )
    scored = batch.response_tokens * update_streams(config)
    return MemoryPlan(
        update=update,
        rollout=rollout,
        host=host,
        scoring=config.reward.workers * _of_a_reward_worker(config),
        loading=model.width * sizes.parameters,
        logits=2 * FULL * scored * sizes.vocab,
        batch=batch,
        problem=problem,
    )


def sampling_bytes(
    config: Config, sizes: ModelSizes, lengths: Lengths, model: ModelBytes
) -> tuple[Bytes, Bytes]:
    """What the sampler holds during an update, and while it samples."""
    layout, rollout = model.layout, config.rollout
    if rollout.engine == "vllm_server":  # on GPUs of its own
        return {}, {}
    if rollout.engine == "vllm":  # asleep during an update
        return {}, {"vLLM": rollout.gpu_memory * (layout.gpu_memory or 0)}
    whole = {"sampler": model.weights + model.codes} if model.sharded else {}
    each = model.compute * sizes.decoder.cached
    tokens = lengths.prompt + rollout.max_new_tokens
    return whole, whole | {"keys and values": rollout.batch_size * tokens * each}


def vllm_least(sizes: ModelSizes) -> float:
    """Bytes that vLLM needs at least: bfloat16 weights, and something for keys and values."""
    return 2 * sizes.parameters * 1.05 + 2**31


def _of_a_reward_worker(config: Config) -> int:
    """Bytes: of a process that compares answers, and of one that calls functions, if there are."""
    own = any(one.is_own for one in rewarded(config.reward))
    return answer_check.MEMORY_LIMIT + own * function_worker.MEMORY_LIMIT
