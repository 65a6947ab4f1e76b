"""Bytes that one process holds at the worst moment of a step.

What autograd keeps of a layer is counted tensor by tensor, as transformers' modules and
`papo_fast.model.attention` make them; the moments of a backward pass are walked through one by one,
since activations go as gradients come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from papo_fast.config import Config
from papo_fast.errors import InputError
from papo_fast.planning.sizes import ModelSizes, Part
from papo_fast.planning.workload import Lengths, MicroBatch, micro_batch, update_streams
from papo_fast.reward_settings import rewarded
from papo_fast.rewards import answer_check, function_worker
from papo_kernels.rows import CHUNK_ELEMENTS

FULL = 4  # bytes of master weights, gradients and moments
RESERVE_BYTES, RESERVE_SHARE = 3 * 2**30 // 2, 0.05
"""CUDA context, NCCL's buffers and the allocator's fragments: an assumption."""

Bytes = dict[str, float]

# Rows of a tile, which have a byte for each word, and of a group of tiles, as
# `papo_kernels.triton` has them; it cannot be imported where triton is not installed.
TILE_ROWS, GROUP_ROWS = 32, 2048


@dataclass(frozen=True)
class Layout:
    """`ranks` processes with one GPU of `gpu_memory` bytes each; None: they run on the CPU."""

    ranks: int = 1
    gpu_memory: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process.

    Attributes:
        update: by category, at the worst moment of an update; `rollout` while sampling.
        host: bytes of CPU memory that offload takes, per process.
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


@dataclass(frozen=True)
class _Unit:
    """One module of the forward pass, in bytes.

    kept: what stays of its forward until its backward; working: what its backward needs besides;
    gradient: what it leaves behind.
    """

    kept: float
    working: float
    gradient: float


class _Model:
    """The sizes in bytes under one configuration and layout."""

    def __init__(self, config: Config, sizes: ModelSizes, layout: Layout, batch: MicroBatch):
        self.config, self.sizes, self.layout, self.batch = config, sizes, layout, batch
        replicas = config.parallel.replicas
        if layout.ranks % replicas:
            raise InputError(
                f"parallel.replicas is {replicas}, but there are {layout.ranks} GPUs: it must "
                "divide them"
            )
        self.sharded = layout.ranks > 1
        self.shards = layout.ranks // replicas
        half = config.model.dtype != "float32"
        self.compute = 2 if half else 4
        # one process computes in bfloat16 by autocast, on float32 weights; FSDP gathers bfloat16,
        # and LoRA keeps frozen weights so
        self.lora = config.model.lora_rank > 0
        self.autocast = half and not self.sharded and not self.lora
        self.casts_adapters = half and not self.sharded and self.lora
        self.stream = 2 if half and (self.sharded or self.lora) else 4
        self.frozen = self.compute if self.lora else FULL
        self.cuda = layout.gpu_memory is not None

    # parameters

    def trained(self, part: Part, vision: bool = False) -> int:
        """Parameters of one of them that are trained."""
        if vision and not self.config.model.train_vision:
            return 0
        if self.lora:
            return part.adapters(self.config.model.lora_rank, self.config.model.lora_targets)
        return part.parameters

    @property
    def trainable(self) -> int:
        s = self.sizes
        lone = 0 if self.lora else sum(p.total for p in (s.embedding, s.head, s.norm))
        rest = 0 if self.lora else self.trained(s.vision_rest, True)
        return (
            s.layers.count * self.trained(s.layers)
            + s.blocks.count * self.trained(s.blocks, True)
            + lone
            + rest
        )

    @property
    def weights(self) -> int:
        """Bytes of all parameters of one copy, adapters included."""
        adapters = self.trainable if self.lora else 0
        return self.frozen * self.sizes.parameters + FULL * adapters

    # activations

    def layer_kept(self) -> float:
        """What autograd keeps of one decoder layer."""
        d, b, c, r = self.sizes.decoder, self.batch, self.compute, self.stream
        casts = 3 if self.autocast else 1  # each linear layer casts its own copy of its input
        # float32 input of each norm, and its output before the weight unless that is frozen
        norms = 2 * (FULL + (0 if self.lora else r)) * d.hidden
        inputs = (casts + min(casts, 2)) * c * d.hidden
        per_token = norms + inputs + 4 * c * d.inner + c * d.queries
        if d.normed_queries:
            per_token += (FULL + c) * (d.queries + d.keys)
        if self.cuda:
            per_token += c * d.queries + FULL * d.heads
            attention = 2 * c * d.keys * b.keys
        else:  # SDPA: padded blocks, keys repeated for all heads
            per_token += 2 * c * d.queries
            attention = 2 * c * d.queries * b.keys
        if self.lora:
            per_token += 7 * c * self.config.model.lora_rank
            if self.casts_adapters:  # each adapter casts its own copy of its input
                per_token += c * (5 * d.hidden + d.queries + d.inner)
        return per_token * b.tokens + attention

    def block_kept(self) -> float:
        """What autograd keeps of one vision block."""
        v, c = self.sizes.vision, self.compute
        normed = c if v.rms_norm and not self.lora else 0
        inputs = 2 * c * (2 if self.autocast and v.rms_norm else 1)
        per_patch = (2 * (FULL + normed) + inputs + 7 * c) * v.hidden + v.inner_saved * c * v.inner
        return per_patch * self.batch.patches

    def units(self) -> Iterator[_Unit]:
        """The modules in the order of the forward pass."""
        s, b, c, model = self.sizes, self.batch, self.compute, self.config.model
        d, v = s.decoder, s.vision
        again = model.gradient_checkpointing
        if b.patches and model.train_vision:
            kept = self.block_kept()
            working = 3 * c * v.inner * b.patches
            inputs = c * v.hidden * b.patches
            unit = _Unit(
                inputs if again else kept,
                working + kept * again,
                FULL * self.trained(s.blocks, True),
            )
            rest = 0 if self.lora else s.vision_rest.parameters
            yield _Unit(c * v.pixels * b.patches, 0, 0)
            yield from [unit] * s.blocks.count
            merged = (2 * FULL + 3 * c) * v.hidden * b.patches * v.mergers
            yield _Unit(merged, c * v.hidden * b.patches, FULL * rest)
        embedding = 0 if self.lora else s.embedding.parameters
        # its gradient is made dense, beside what was accumulated
        yield _Unit(0, FULL * embedding * (2 if s.tied else 1), FULL * embedding * (not s.tied))
        kept = self.layer_kept()
        # two or three gradients of width `inner`, and that of the residual stream
        working = (3 * c * d.inner + 2 * self.stream * d.hidden) * b.tokens
        inputs = self.stream * d.hidden * b.tokens
        unit = _Unit(
            inputs if again else kept, working + kept * again, FULL * self.trained(s.layers)
        )
        yield from [unit] * s.layers.count
        yield _Unit((FULL + 2 * self.stream) * d.hidden * b.tokens, 0, 0)
        yield _Unit(
            2 * c * d.hidden * b.response_tokens * b.streams,
            self.head_working(),
            self.head_gradient,
        )

    @property
    def head_gradient(self) -> int:
        # a tied one's stays in the engine until the embedding's is there
        return 0 if self.lora else FULL * (self.sizes.vocab * self.sizes.decoder.hidden)

    def head_working(self) -> float:
        """`token_stats`: logits of a chunk of rows, the gradient of its weight in float32."""
        s, b = self.sizes, self.batch
        columns = 0 if self.lora else FULL * s.vocab * s.decoder.hidden
        if self.compute == 2:
            columns += 2 * s.vocab * s.decoder.hidden
        if self.cuda:
            # products and their gradients of a chunk, or of a group's words beside their weights
            words = min(s.vocab, CHUNK_ELEMENTS // s.decoder.hidden)
            group = b.streams * min(b.response_tokens, GROUP_ROWS) * words
            each = FULL + self.compute
            most = each * max(b.streams * CHUNK_ELEMENTS, group + words * s.decoder.hidden)
            return columns + most + b.response_tokens / TILE_ROWS * s.vocab
        chunk = min(b.response_tokens, max(1, CHUNK_ELEMENTS // s.vocab)) * s.vocab
        return columns + 4 * FULL * chunk

    # moments

    def gathered(self) -> float:
        """FSDP: the root's weights and two units' in the compute dtype, a unit's gradients."""
        if not self.sharded:
            return 0.0
        s = self.sizes
        unit = max(s.layers.parameters, s.blocks.parameters)
        reduced = 0 if self.lora else (self.compute + FULL) * max(unit, s.root)
        return self.compute * (s.root + 2 * unit) + reduced

    def moments(self, gradients: float) -> Iterator[Bytes]:
        """Activations, gradients and the lm_head's working memory, moment by moment."""
        units = list(self.units())
        kept = sum(u.kept for u in units)
        cast = self.compute * self.sizes.parameters if self.autocast else 0
        stays = cast if self.autocast and not self.config.model.gradient_checkpointing else 0
        yield {"activations": kept, "bfloat16 weights": cast, "gradients": gradients}
        fresh = 0.0
        for unit in reversed(units):
            yield {
                "activations": kept + (unit.working if unit is not units[-1] else 0),
                "lm_head": unit.working if unit is units[-1] else 0,
                "bfloat16 weights": stays,
                "gradients": max(gradients, fresh),
            }
            kept -= unit.kept
            fresh += 0 if self.sharded else unit.gradient


def plan_memory(
    config: Config, sizes: ModelSizes, lengths: Lengths, layout: Layout | None = None
) -> MemoryPlan:
    """What one process holds at most, for prompts and responses of these lengths."""
    layout = layout or Layout()
    batch = micro_batch(config, lengths, sizes.vision.merge, layout.ranks)
    model = _Model(config, sizes, layout, batch)
    offload = config.parallel.offload and model.sharded
    shard = FULL / (model.shards if model.sharded else 1)
    needs_second = config.objective.needs_reference and not model.lora
    static: Bytes = {
        "weights": model.weights / model.shards,
        "reference": shard * sizes.parameters if needs_second else 0,
        "optimizer": 2 * shard * model.trainable,
    }
    gradients = shard * model.trainable
    host = 0.0
    if offload:
        host = sum(static.values()) + gradients
        static, gradients = {}, 0.0
    idle, sampling = sampling_bytes(config, sizes, lengths, model)
    standing = idle | {"weights gathered": model.gathered(), "reserve": 0.0}
    if layout.gpu_memory is not None:
        standing["reserve"] = RESERVE_BYTES + RESERVE_SHARE * layout.gpu_memory
    there = gradients if batch.accumulated or model.sharded else 0.0
    moments = [static | standing | moment for moment in model.moments(there)]
    # AdamW: one more tensor of each parameter's size; alone on a GPU, of all of them at once
    largest = max(sizes.embedding.parameters, sizes.layers.largest)
    step = model.trainable if model.cuda and not model.sharded else min(largest, model.trainable)
    moments.append(static | standing | {"gradients": gradients, "optimizer step": shard * step})
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
        loading=FULL * sizes.parameters,
        logits=2 * FULL * scored * sizes.vocab,
        batch=batch,
        problem=problem,
    )


def sampling_bytes(
    config: Config, sizes: ModelSizes, lengths: Lengths, model: _Model
) -> tuple[Bytes, Bytes]:
    """What the sampler holds during an update, and while it samples."""
    layout, rollout = model.layout, config.rollout
    if rollout.engine == "vllm_server":  # on GPUs of its own
        return {}, {}
    if rollout.engine == "vllm":  # asleep during an update
        return {}, {"vLLM": rollout.gpu_memory * (layout.gpu_memory or 0)}
    whole = {"sampler": model.weights} if model.sharded else {}
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
