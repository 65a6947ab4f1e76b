"""Bytes of a model's parts under a configuration: weights, what its layers keep, moment by moment.

What autograd keeps of a layer is counted tensor by tensor, as transformers' modules and
`papo_fast.model.attention` make them; the moments of a backward pass are walked through one by one,
since activations go as gradients come.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from papo_fast.blockwise import BLOCK_8, bytes_4
from papo_fast.config import Config
from papo_fast.errors import InputError
from papo_fast.optimizer import PIECE, TEMPORARIES, is_compact
from papo_fast.planning.sizes import ModelSizes, Part
from papo_fast.planning.workload import MicroBatch
from papo_kernels.rows import CHUNK_ELEMENTS

FULL = 4  # bytes of master weights, gradients and moments

Bytes = dict[str, float]

# Rows of a tile, which have a byte for each word, and of a group of tiles; chunks of logits that
# the forward takes at once; words for which a row has room in its list, which are at most one in
# LIST_SPARSITY. `papo_kernels.triton` has these numbers, and cannot be imported where triton is
# not installed.
TILE_ROWS, GROUP_ROWS, CHUNKS = 32, 2048, 2
LIST_WORDS, LIST_SPARSITY = 768, 64


@dataclass(frozen=True)
class Layout:
    """`ranks` processes with one GPU of `gpu_memory` bytes each; None: they run on the CPU."""

    ranks: int = 1
    gpu_memory: int | None = None


@dataclass(frozen=True)
class Unit:
    """One module of the forward pass, in bytes.

    kept: what stays of its forward until its backward; working: what its backward needs besides;
    gradient: what it leaves behind; offloads: what is kept may wait in the CPU's memory.
    """

    kept: float
    working: float
    gradient: float
    offloads: bool = False


class ModelBytes:
    """The sizes in bytes under one configuration and layout."""

    def __init__(self, config: Config, sizes: ModelSizes, layout: Layout, batch: MicroBatch):
        self.config, self.sizes, self.layout, self.batch = config, sizes, layout, batch
        replicas = config.parallel.replicas
        if layout.ranks % replicas:
            raise InputError(
                f"parallel.replicas is {replicas}, but there are {layout.ranks} GPUs: it must "
                "divide them"
            )
        # offload shards too, over one process where there are no more
        self.sharded = layout.ranks > 1 or config.parallel.offload
        self.shards = layout.ranks // replicas
        half = config.model.dtype != "float32"
        self.compute = 2 if half else 4
        # one process computes in bfloat16 by autocast, on float32 weights; FSDP gathers bfloat16,
        # and LoRA keeps frozen weights so
        self.lora = config.model.lora_rank > 0
        self.width = 2 if config.model.weights_dtype == "bfloat16" else FULL
        wide = not self.sharded and not self.lora and self.width == FULL
        self.autocast = half and wide
        self.casts_adapters = half and not self.sharded and self.lora
        self.stream = 2 if half and not wide else 4
        self.frozen = self.compute if self.lora else self.width
        self.four_bits = config.model.quantize == "nf4"
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
        small = self.codes_numbers if self.four_bits else 0
        return self.frozen * (self.sizes.parameters - small) + FULL * adapters

    @property
    def codes_numbers(self) -> int:
        """Weights that `model.quantize` puts into 4 bits."""
        return sum(part.count * part.in_linear for part in (self.sizes.layers, self.sizes.blocks))

    @property
    def codes(self) -> int:
        """Bytes of these, which every process holds whole."""
        return bytes_4(self.codes_numbers) if self.four_bits else 0

    def dequantized(self, part: Part) -> int:
        """Bytes of the weight that a layer in 4 bits makes of it while it is used."""
        return self.compute * part.largest if self.four_bits else 0

    def state(self, numbers: float) -> float:
        """Bytes of the optimizer's state of so many parameters."""
        each = 2.0 * FULL
        if self.config.train.optimizer == "adamw_8bit":
            each = 2 * (1 + FULL / BLOCK_8)
        if self.config.train.master_weights:
            each += FULL
        return each * numbers

    def step(self) -> float:
        """Bytes that the optimizer takes while it steps."""
        s = self.sizes
        largest = min(self.trainable, max(s.embedding.parameters, s.layers.largest)) / self.shards
        if is_compact(self.config):
            return FULL * TEMPORARIES * min(PIECE, largest)
        fused = self.cuda if self.config.train.fused == "auto" else self.config.train.fused == "on"
        if fused:
            return 0.0
        # one more tensor of each parameter's size; alone on a GPU, of all of them at once
        return FULL * (self.trainable if self.cuda and not self.sharded else largest)

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

    def units(self) -> Iterator[Unit]:
        """The modules in the order of the forward pass."""
        s, b, c, model = self.sizes, self.batch, self.compute, self.config.model
        d, v = s.decoder, s.vision
        again = model.gradient_checkpointing
        if b.patches and model.train_vision:
            kept = self.block_kept()
            working = 3 * c * v.inner * b.patches
            inputs = c * v.hidden * b.patches
            unit = Unit(
                inputs if again else kept,
                working + kept * again + self.dequantized(s.blocks),
                FULL * self.trained(s.blocks, True),
                offloads=again,
            )
            rest = 0 if self.lora else s.vision_rest.parameters
            yield Unit(c * v.pixels * b.patches, 0, 0)
            yield from [unit] * s.blocks.count
            merged = (2 * FULL + 3 * c) * v.hidden * b.patches * v.mergers
            yield Unit(merged, c * v.hidden * b.patches, FULL * rest)
        embedding = 0 if self.lora else s.embedding.parameters
        # its gradient is made dense, beside what was accumulated
        yield Unit(0, FULL * embedding * (2 if s.tied else 1), FULL * embedding * (not s.tied))
        kept = self.layer_kept()
        # two or three gradients of width `inner`, and that of the residual stream
        working = (3 * c * d.inner + 2 * self.stream * d.hidden) * b.tokens
        inputs = self.stream * d.hidden * b.tokens
        unit = Unit(
            inputs if again else kept,
            working + kept * again + self.dequantized(s.layers),
            FULL * self.trained(s.layers),
            offloads=again,
        )
        yield from [unit] * s.layers.count
        yield Unit((FULL + 2 * self.stream) * d.hidden * b.tokens, 0, 0)
        yield Unit(
            2 * c * d.hidden * b.response_tokens * b.streams,
            self.head_working(),
            self.head_gradient,
        )

    @property
    def head_gradient(self) -> int:
        # a tied one's stays in the engine until the embedding's is there
        return 0 if self.lora else FULL * (self.sizes.vocab * self.sizes.decoder.hidden)

    def head_working(self) -> float:
        """`token_stats`: logits of a chunk of rows, or the sum of its weight's gradient."""
        s, b = self.sizes, self.batch
        # in float32, or on a GPU in bfloat16 and one byte more
        summed = 3 if self.cuda and self.compute == 2 else FULL
        columns = 0 if self.lora else summed * s.vocab * s.decoder.hidden
        if self.compute == 2:
            columns += 2 * s.vocab * s.decoder.hidden
        if self.cuda:
            # products and their gradients of a chunk, or of some words of a group beside their
            # weights
            words = min(s.vocab, CHUNK_ELEMENTS // s.decoder.hidden)
            group = b.streams * min(b.response_tokens, GROUP_ROWS) * words
            most = max(
                (FULL + self.compute) * b.streams * CHUNK_ELEMENTS,
                (FULL + self.compute) * group + self.compute * words * s.decoder.hidden,
            )
            before = FULL * b.streams * CHUNKS * CHUNK_ELEMENTS
            lists = FULL * (1 + b.streams) * min(s.vocab // LIST_SPARSITY, LIST_WORDS)
            saved = b.response_tokens * (s.vocab / TILE_ROWS + lists)
            return saved + max(columns + most, before)
        chunk = min(b.response_tokens, max(1, CHUNK_ELEMENTS // s.vocab)) * s.vocab
        return columns + 4 * FULL * chunk

    # moments

    @property
    def offloads_activations(self) -> bool:
        return self.config.parallel.offload_activations and self.cuda

    def waiting(self) -> float:
        """Activations of a micro-batch that wait in the CPU's memory."""
        return sum(u.kept for u in self.units() if u.offloads) * self.offloads_activations

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
        units = [
            replace(unit, kept=0.0) if unit.offloads and self.offloads_activations else unit
            for unit in self.units()
        ]
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
