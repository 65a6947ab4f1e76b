"""What the Triton kernels should take on a GPU, from counts of work and a machine's rates.

    python bench/cost_model.py --machine h200    # beside what an H200 took
    python bench/cost_model.py --machine h100    # a prediction; nothing was measured on one

A kernel takes as long as the slowest of what it does: FLOP of products, bytes of memory,
instructions of threads, or loads that wait for one another. Beside that each kernel takes a while
to start and to end, and each launch leaves a gap. How much work there is was counted without a GPU:
bench/results/h200/workloads.json (`bench/kernel_workloads.py`) has lists and groups of the states,
tests/kernels/triton_loops.json (`tests/kernels/aot.py --loops`) the instructions of loops, and
`cost_kernels.py` says what each kernel does.

What a part of the machine reaches under our kernels is in `Efficiency`: seven numbers, all taken
from one profile, that of `smollm2-0.6-wide` on an H200. The other states are predicted with the
same numbers. Knows neither torch nor a GPU.
"""

import argparse
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from cost_kernels import MEASURED, NOW, Group, Workload, backward, extra_bytes, forward

ROOT = Path(__file__).parents[1]
H200_RESULTS = ROOT / "bench" / "results" / "h200"
LOOPS = ROOT / "tests" / "kernels" / "triton_loops.json"
CALIBRATED_ON = "smollm2-0.6-wide"


@dataclass(frozen=True)
class Machine:
    """Rates of a GPU, as simple programs reach them."""

    name: str
    product_flops: float  # FLOP/s of a bfloat16 product of 8192 x 8192 matrices
    copied_bytes: float  # bytes/s of a large copy, read and written
    clock: float  # Hz
    processors: int = 132
    issued: int = 4  # instructions of warps that a processor starts in a clock
    cache: float = 50e6  # bytes of the second-level cache
    # Bytes/s from there to the processors: published figures are 5.5e12, and Triton's own tutorial
    # of products must draw 7.9e12.
    cached_bytes: float = 7.9e12


@dataclass(frozen=True)
class Efficiency:
    """Shares of those rates that our kernels reach, and times of waiting.

    All from the profile of CALIBRATED_ON in gpu.json.
    """

    # The forward's products, which write float32, beside the square product.
    products: float = 0.95
    # Nothing but products, two or six of them: the GPU lowers its clock.
    bare: float = 0.90
    # Reads of kernels that work on what they read, beside a copy: `stats_kernel`, which reads all
    # logits once. Kernels that only move numbers reach the copy's rate.
    reads: float = 0.79
    # Instructions beside the most that could be started: `dz_kernel`.
    issued: float = 0.5
    # Seconds of a load whose address another load brought: `list_kernel` with its helpers.
    wait: float = 1.1e-6
    # Seconds that a kernel takes which does next to nothing: the mean of 369 such.
    ramp: float = 1.7e-6
    # Seconds between two kernels: what a pass takes beyond its kernels, over their number.
    gap: float = 5.9e-6


@dataclass(frozen=True)
class Prediction:
    """Of one state on one machine: times of kernels, by pass, and bytes of memory."""

    workload: Workload
    passes: dict  # {"forward" or "backward": [(Kernel, seconds, bound)]}
    gap: float
    bare_flops: float  # FLOP/s of bare products
    extra_bytes: int

    def total(self, name):
        """Seconds of a pass."""
        return sum(s for _, s, _ in self.passes[name]) + self.gap * self.launches(name)

    def launches(self, name):
        """How many kernels a pass has."""
        return sum(k.launches for k, _, _ in self.passes[name])

    def bare(self, products):
        """Seconds of so many products of N·V·D alone."""
        w = self.workload
        return products * 2 * w.N * w.V * w.D / self.bare_flops


def predict(workload, machine, design, efficiency=None, loops=None):
    efficiency, loops = efficiency or Efficiency(), loops or read_loops()
    kernels = {
        "forward": forward(workload, loops, design),
        "backward": backward(workload, loops, design),
    }
    timed = {
        name: [(k, *k.seconds(machine, efficiency)) for k in found]
        for name, found in kernels.items()
    }
    bare = machine.product_flops * efficiency.bare
    return Prediction(workload, timed, efficiency.gap, bare, extra_bytes(workload, design))


# ---- What there is


def read_loops():
    """{kernel: instructions for one element, of its loops}: see `tests/kernels/aot.py`."""
    return json.loads(LOOPS.read_text())["kernels"]


def read_workloads():
    """{name: Workload} of workloads.json."""
    content = json.loads((H200_RESULTS / "workloads.json").read_text())
    fields = Workload.__dataclass_fields__
    return {
        name: Workload(
            name,
            gathered_entries=tuple(counts["gathered_entries"]),
            groups=tuple(tuple(Group(**g) for g in groups) for groups in counts["groups"]),
            **{k: v for k, v in counts.items() if k in fields and isinstance(v, int | str)},
        )
        for name, counts in content["states"].items()
    }


def machines():
    """{name: Machine}: the H200 as it was measured, and an H100 by its memory and other reports."""
    measured = json.loads((H200_RESULTS / "gpu.json").read_text())["ceilings"]
    flops = next(1e12 * c["tflops"] for c in measured if "tflops" in c)
    copied = next(1e12 * c["tbytes"] for c in measured if "tbytes" in c)
    h200 = Machine("H200", flops, copied, clock=1.98e9)
    # Both have the same processors and clock. Of its memory's 4.8 TB/s the H200 copied a share, and
    # the H100 has 3.35. Others report 790 TFLOP/s of cuBLAS on an H100, more than was measured on
    # this H200; the faster products are, the more weighs what is beside them.
    h100 = replace(h200, name="H100", product_flops=790e12, copied_bytes=copied * 3.35 / 4.8)
    return {"h200": h200, "h100": h100}


@dataclass(frozen=True)
class Measured:
    """What gpu.json says of one state: milliseconds of kernels and seconds of passes."""

    kernels: dict  # {pass: {Kernel.name: milliseconds}}
    seconds: dict  # {"forward" | "backward" | "all" | "two products" | "six products": seconds}
    extra_bytes: int


def measured(prediction):
    """`Measured` of the prediction's state, its kernels by the names of the prediction's."""
    content, w = json.loads((H200_RESULTS / "gpu.json").read_text()), prediction.workload
    kernels = {}
    for name, timed in prediction.passes.items():
        what = f"{w.name}, N = {w.N}, D = {w.D}, V = {w.V}: {name}"
        [profile] = [p for p in content["profiles"] if p["what"] == what]
        found = dict.fromkeys((k.name for k, _, _ in timed), 0.0)
        for row in profile["kernels"]:
            first = next(k for k, _, _ in timed if re.search(k.profiled, row["name"]))
            found[first.name] += row["ms"]
        kernels[name] = found
    ways = {
        "forward, with levels": "forward", "backward alone": "backward", "papo_kernels": "all",
        "two bare matmuls": "two products", "six bare matmuls": "six products",
    }  # fmt: skip
    times = {t["way"]: t for t in content["times"] if t["states"] == w.name}
    seconds = {ours: times[theirs]["seconds"] for theirs, ours in ways.items()}
    return Measured(kernels, seconds, times["papo_kernels"]["extra_bytes"])


# ---- What is printed


def kernel_rows(found, seen=None):
    """Rows of a table: pass and kernel, what bounds it, predicted ms; measured, and the ratio."""
    for name, timed in found.passes.items():
        for kernel, seconds, bound in timed:
            cells = [f"{name}: {kernel.name}", bound, f"{1e3 * seconds:.2f}"]
            if seen is not None:
                ms = seen.kernels[name][kernel.name]
                cells += [f"{ms:.2f}", f"{1e3 * seconds / ms:.2f}" if ms else "–"]
            yield cells
        gaps = found.gap * found.launches(name)
        cells = [f"{name}: gaps between kernels", "launches", f"{1e3 * gaps:.2f}"]
        if seen is not None:
            ms = 1e3 * seen.seconds[name] - sum(seen.kernels[name].values())
            cells += [f"{ms:.2f}", f"{1e3 * gaps / ms:.2f}"]
        yield cells


def kernel_heads(seen):
    return ("", "bound by", "predicted, ms", *(("measured, ms", "ratio") if seen else ()))


TOTAL_HEADS = (
    "", "forward, ms", "/ two products", "backward, ms", "both, / six products",
    "TFLOP/s of six", "extra memory, MB", "of whole logits",
)  # fmt: skip


def total_row(name, found, seen=None):
    """A row of a table of totals, as predicted; as measured where `seen` is given."""
    w = found.workload
    if seen is None:
        forward, backward = (found.total(x) for x in ("forward", "backward"))
        both, two, six, extra = forward + backward, found.bare(2), found.bare(6), found.extra_bytes
    else:
        times, extra = seen.seconds, seen.extra_bytes
        forward, backward, both = (times[x] for x in ("forward", "backward", "all"))
        two, six = times["two products"], times["six products"]
    return (
        name, f"{1e3 * forward:.1f}", f"{forward / two:.2f}", f"{1e3 * backward:.1f}",
        f"{both / six:.2f}", f"{12e-12 * w.N * w.V * w.D / both:.0f}", f"{extra / 1e6:.0f}",
        f"{100 * extra / whole_logits(w):.1f} %",
    )  # fmt: skip


def whole_logits(w):
    """Bytes that whole logits take, by those that 4096 rows took on the H200; in proportion."""
    content = json.loads((H200_RESULTS / "gpu_peers.json").read_text())["times"]
    [whole] = [t for t in content if t["way"] == "whole logits"]
    return whole["extra_bytes"] * (w.N * w.V) / (whole["N"] * whole["V"])


def text_table(heads, rows):
    """Prints rows of cells, the first aligned to the left."""
    rows = [heads, *rows]
    first, *others = (max(map(len, cells)) for cells in zip(*rows, strict=True))
    for name, *cells in rows:
        numbers = (x.rjust(n) for x, n in zip(cells, others, strict=True))
        print("  ", name.ljust(first), *numbers)


def main():
    workloads = read_workloads()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", choices=["h200", "h100"], default="h200")
    parser.add_argument("--states", nargs="+", choices=workloads, default=list(workloads))
    arguments = parser.parse_args()
    machine = machines()[arguments.machine]
    for name in arguments.states:
        w = workloads[name]
        as_measured, now = (predict(w, machine, design) for design in (MEASURED, NOW))
        seen = measured(as_measured) if arguments.machine == "h200" else None
        used = ", which the efficiencies are taken from" if name == CALIBRATED_ON else ""
        print(f"\n{name}{used}: N = {w.N}, D = {w.D}, V = {w.V}, {machine.name}, bfloat16")
        if w.inferred:
            print(f"  {w.inferred}")
        print("\n  The code that was measured (0019bf5):")
        text_table(kernel_heads(seen), list(kernel_rows(as_measured, seen)))
        totals = [total_row("predicted for 0019bf5", as_measured)]
        totals += [total_row("measured", as_measured, seen)] if seen else []
        totals += [total_row("predicted for the code now", now)]
        print()
        text_table(TOTAL_HEADS, totals)
        forward, backward, then = (
            f"{x.launches(name):.0f}"
            for x, name in (
                (as_measured, "forward"), (as_measured, "backward"), (now, "backward"),
            )
        )  # fmt: skip
        print(f"\n  Kernels: {forward} of a forward, {backward} of a backward; now {then}.")


if __name__ == "__main__":
    main()
