"""The work of each Triton kernel of a call: bytes, FLOP, instructions and loads that wait.

Counts of words and rows come from `bench/kernel_workloads.py`, the rest follows from sizes and from
what kernels/papo_kernels/triton does. `bench/cost_model.py` makes times of it. Knows neither torch
nor a GPU.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Design:
    """What may change in the host side of the backward without the kernels' work changing."""

    # Elements of a chunk of one stream's logits, and tiles of which it has a multiple.
    chunk_elements: int
    chunk_tiles: int
    # Whether listed words are counted by a kernel of its own.
    counted_apart: bool
    # Bytes of an element of the weight's sum, and those read and written to round it at last.
    sum_bytes: int
    rounding_bytes: int
    # Whether the rounded gradient is a tensor of its own, beside the sum.
    rounded_apart: bool
    # Whether a block's logits and rows of the weight are held until its products are added.
    held_to_end: bool
    # Bytes that norms of an element of the states take: copied to float64 and read, or read once.
    norm_bytes: int
    # Kernels that do next to nothing: of a forward, of a backward, and of each time that groups ask
    # for words.
    small_kernels_forward: int
    small_kernels: int
    small_kernels_asking: int


# Commit 0019bf5, which gpu.json profiles. Its small kernels are counted there, in all three states.
MEASURED = Design(
    chunk_elements=1 << 25, chunk_tiles=4, counted_apart=True, sum_bytes=4, rounding_bytes=6,
    rounded_apart=True, held_to_end=True, norm_bytes=18, small_kernels_forward=180,
    small_kernels=295, small_kernels_asking=140,
)  # fmt: skip
# The weight's sum as bfloat16 and a byte, which needs no rounding; row statistics, the certificate,
# norms and the choice of levels as a few kernels. Of small ones about so many are left of a
# backward under the bound that tests/kernels/test_launches.py has: 65 beside what blocks of words
# take.
NOW = Design(
    chunk_elements=1 << 26, chunk_tiles=8, counted_apart=False, sum_bytes=3, rounding_bytes=0,
    rounded_apart=False, held_to_end=False, norm_bytes=2, small_kernels_forward=80,
    small_kernels=40, small_kernels_asking=10,
)  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Rows of a group, and words that they get at one time."""

    rows: int
    words: int


@dataclass(frozen=True)
class Workload:
    """What a forward and a backward have to do; what each count is stands in workloads.json.

    Entries are words in rows' lists: `listed` by the forward, the others what is left after small
    ones were dropped. Those in columns are multiplied as a matrix, the rest word by word.
    """

    name: str
    N: int
    D: int
    V: int
    streams: int
    listed: int
    # Of short lists, and of each 2048 long ones those without a column.
    gathered_entries: tuple[int, ...]
    column_rows: int
    column_entries: int
    entries: int  # of all lists
    weight_entries: int
    weight_words: int
    groups: tuple[tuple[Group, ...], ...]  # each time that groups got words
    # What was not counted on all rows, and where it is from.
    inferred: str = ""
    # Sizes of the code, see papo_kernels/triton: rows of a tile, of columns and of a group at a
    # time, words that become columns, elements of the weight that a group gathers at a time, and
    # bounds of lists.
    tile: int = 32
    rows_at_once: int = 2048
    columns: int = 8192
    gathered_elements: int = 1 << 25
    mean_listed: int = 768
    longest_list: int = 4096

    def chunk_rows(self, design):
        about = design.chunk_elements / self.V
        step = self.tile * (design.chunk_tiles if about > design.chunk_tiles * self.tile else 1)
        return max(1, round(about / step)) * step

    @property
    def words_at_once(self):
        return self.gathered_elements // self.D // 64 * 64

    @property
    def list_places(self):
        return self.N * min(max(self.V // 64, 16), self.mean_listed)


@dataclass(frozen=True)
class Kernel:
    """One kernel, or several of a kind, of a pass."""

    name: str
    launches: float
    flop: float = 0.0
    moved: float = 0.0  # bytes that are copied, zeroed or added
    read: float = 0.0  # bytes that much is computed of
    gathered: float = 0.0  # bytes of rows here and there of a table
    table: float = 0.0  # bytes of that table that programs gather from at one time
    instructions: float = 0.0  # of threads
    full_rate: bool = False  # whether as many of them are started as can be
    waits: float = 0.0  # loads that wait for one another, of all launches
    profiled: str = ""  # a regular expression of what a profiler calls it

    def seconds(self, machine, efficiency):
        """(seconds, what bounds them): "products", "memory", "cache", "instructions", "waiting"."""
        at_once = machine.processors * machine.issued * 32
        at_once *= 1 if self.full_rate else efficiency.issued
        missing = self.gathered * max(0.0, 1 - machine.cache / max(self.table, 1.0))
        parts = {
            "products": self.flop / (machine.product_flops * efficiency.products),
            "memory": (self.moved + (self.read + missing) / efficiency.reads)
            / machine.copied_bytes,
            "cache": self.gathered / machine.cached_bytes,
            "instructions": self.instructions / (machine.clock * at_once),
            "waiting": self.waits * efficiency.wait + self.launches * efficiency.ramp,
        }
        bound = max(parts, key=parts.get)
        ramp = 0 if bound == "waiting" else self.launches * efficiency.ramp
        return parts[bound] + ramp, bound


PRODUCTS = r"nvjet|gemm"
GATHERS = r"vectorized_gather_kernel"
# Features that all programs of a gathering kernel are about at one time: its blocks of rows run on.
FEATURES = 1024


def forward(w, loops, design):
    """The kernels of a forward that prepares a sparse backward."""
    pairs, logits = w.N * w.V, w.streams * w.N * w.V
    chunk_rows = w.chunk_rows(design)
    chunks, marks = math.ceil(w.N / chunk_rows), w.V / 32
    longest = min(w.longest_list, w.V // 16)
    # One row's block: of sort, rows of the chunk; of count and list, marks; of list, words and
    # then logits of both streams.
    waits = chunk_rows / 32 + (3 + design.counted_apart) * math.ceil(marks / 2048)
    waits += 2 * w.streams * math.ceil(longest / 1024)
    listed = 4 * w.listed * (1 + 2 * w.streams) + pairs / 8 * (1 + design.counted_apart)
    return [
        Kernel("products", chunks, flop=2 * logits * w.D, profiled=PRODUCTS),
        Kernel(
            "stats_kernel", chunks, read=4 * logits, profiled="stats_kernel",
            instructions=pairs * loops["stats two streams"][0],
        ),
        Kernel(
            "levels_kernel", chunks, read=4 * logits + pairs / w.tile + pairs / 8,
            instructions=pairs * loops["levels two streams"][0], profiled="levels_kernel",
        ),
        Kernel(
            "sort_kernel, count_kernel, list_kernel", (2 + design.counted_apart) * chunks,
            read=listed, waits=chunks * waits, profiled="^(sort|count|list)_kernel",
        ),
        Kernel("rows gathered", 2 * chunks, moved=4 * w.streams * w.N * w.D, profiled=GATHERS),
        Kernel("small ones", design.small_kernels_forward, profiled="."),
    ]  # fmt: skip


def backward(w, loops, design):
    """The kernels of a backward with gradients of the states of both streams and of the weight."""
    weight, states = w.V * w.D, w.N * w.D
    asked = [group for groups in w.groups for group in groups]
    pieces = [
        Group(g.rows, min(w.words_at_once, g.words - n))
        for g in asked
        for n in range(0, g.words, w.words_at_once)
    ]
    pairs = sum(p.rows * p.words for p in pieces)
    words = sum(p.words for p in pieces)
    times = len(w.groups) + 1
    chunks = math.ceil(w.column_rows / w.rows_at_once)
    columns = w.columns if w.column_rows else 0
    entries = sum(w.gathered_entries)
    rows = sum(g.rows for g in asked) + w.column_rows
    in_tiles = w.N / w.tile * w.V
    groups = max(map(len, w.groups), default=0)
    return [
        Kernel(
            "products of groups and columns", 3 * len(pieces) + 2 * chunks, profiled=PRODUCTS,
            flop=2 * w.streams * w.D * (3 * pairs + 2 * w.column_rows * columns),
        ),
        Kernel(
            "dz_kernel", len(pieces) + 1, profiled="^dz_kernel",
            read=pairs * w.streams * 6 + w.listed * (4 + 8 * w.streams),
            instructions=pairs * loops["dz listed"][0] + w.listed * loops["dz_listed"][0],
        ),
        Kernel(
            "d_hidden_kernel", 1 + max(1, chunks), gathered=2 * entries * w.D,
            table=2 * w.V * FEATURES,
            moved=2 * w.streams * states + 4 * w.streams * w.column_rows * w.D,
            instructions=entries * w.D * loops["d_hidden"][0], profiled="d_hidden",
        ),
        Kernel(
            "d_weight_kernel", 1, gathered=2 * w.streams * w.weight_entries * w.D,
            table=2 * w.streams * w.N * FEATURES,
            moved=2 * design.sum_bytes * w.weight_words * w.D,
            # With rows of two streams on their way, its threads wait less than those of others.
            instructions=w.weight_entries * w.D * loops["d_weight"][0], full_rate=True,
            profiled="d_weight",
        ),
        Kernel(
            "add_rows_kernel", len(pieces) + 2 * len(asked) + 1, profiled="add_rows_kernel",
            moved=(words + columns) * w.D * (4 + 2 * design.sum_bytes)
            + sum(g.rows for g in asked) * w.streams * w.D * 8,
        ),
        Kernel(
            "rows gathered", len(pieces) + 2 * len(asked) + 3 * chunks, profiled=GATHERS,
            moved=4 * w.D * (words + columns + w.streams * rows),
        ),
        Kernel(
            "zeros of sums, last rounding", 4,
            profiled=r"FillFunctor<(float|c10::BF)|bfloat16_copy",
            moved=weight * (design.sum_bytes + design.rounding_bytes) + 2 * w.streams * states
            + 2 * w.streams * w.column_rows * columns,
        ),
        Kernel(
            "norms of states", 6 if design.norm_bytes > 2 else 2,
            moved=3 * states * design.norm_bytes,
            profiled=r"NormTwoOps|direct_copy_kernel_cuda.*lambda\(double\)#1",
        ),
        Kernel(
            "choice of words", times + 1, profiled="count_levels_kernel|choose_words_kernel",
            moved=in_tiles,
            instructions=in_tiles
            * (loops["count_levels"][0] + times * groups * loops["choose_words"][0]),
        ),
        Kernel(
            "drop_kernel", 1, read=w.listed * (4 + 4 * w.streams), profiled="drop_kernel",
            instructions=w.listed * (loops["drop"][0] + 12 * loops["drop"][1]),
        ),
        Kernel(
            "entries sorted by word", 9, read=w.entries * (4 * 24 + (1 + w.streams) * 36 + 16),
            # Four passes over words and places, and then rows and gradients in that order, each
            # from a sector of 32 bytes of its own.
            profiled=r"radix_sort.*policy_hub<int|flatten|index_kernel_impl<.*OpaqueType<4>",
        ),
        Kernel(
            "entries counted and put into columns", 1 + chunks, profiled="tally|spread",
            # Blocks of 512 entries of a list, of each a few loads by two kernels; so many rows are
            # done at once.
            waits=math.ceil(w.column_rows / 1056) * 6 * 5 * 2,
        ),
        Kernel(
            "small ones", design.small_kernels + times * design.small_kernels_asking, profiled=".",
        ),
    ]  # fmt: skip


def extra_bytes(w, design):
    """Bytes at the peak beside the gradients of all operands: the largest of four moments."""
    weight, gradients = w.V * w.D, 2 * (w.V * w.D + w.streams * w.N * w.D)
    lists = 4 * (2 * w.N + (1 + w.streams) * w.list_places)
    saved = math.ceil(w.N / w.tile) * w.V + lists + 4 * 14 * w.N
    entries = 4 * (1 + w.streams) * w.list_places
    rows, group = w.streams * w.rows_at_once, Group(0, 0)
    for groups in w.groups:
        group = max(group, *groups, key=lambda g: g.rows * g.words)
    # States of some rows, what products with their words leave for them, and a block of words.
    columns = rows * (6 * w.D + 2 * w.columns) + 6 * w.columns * w.D
    words = min(w.words_at_once, group.words)
    of_rows = w.streams * group.rows
    logits, sums_of_words = 4 * of_rows * words + 2 * words * w.D, 4 * words * w.D
    held = logits + sums_of_words if design.held_to_end else max(logits, sums_of_words)
    of_group = of_rows * (6 * w.D + 2 * words) + held
    during = saved + entries + max(columns if w.column_rows else 0, of_group)
    sums = weight * design.sum_bytes + 2 * w.streams * w.N * w.D
    end = saved + sums + (2 * weight if design.rounded_apart else 0)
    chunk = 4 * w.streams * w.V * min(w.N, w.chunk_rows(design))
    return max(max(during + sums, end) - gradients, saved + chunk)
