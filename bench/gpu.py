"""The Triton kernels on a GPU: correctness, times, memory, block sizes. `bench/gpu.sh` starts it.

Nothing is timed before the kernels agree with float64. Every section has a share of the time and
stops where that is used up; what was left out is said. `--device cpu` runs the same on tiny shapes
in Triton's interpreter, to show that the program works: its times mean nothing.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import gpu_sweep
import torch
from gpu_check import check_kernels
from measure import Exact, PeakMemory, machine, size
from states import synthetic, take
from ways import DENSE, FLOOR, OURS, WAYS, WHOLE, Case, Way, cce, six_matmuls

from papo_kernels import token_stats

# (D, V) in order of importance.
SHAPES = [(3584, 152_064), (2048, 151_936), (5120, 152_064), (8192, 152_064)]
ROWS = [16_384, 4096, 65_536]
# Share of the time by section.
SHARES = {"correctness": 0.25, "times": 0.4, "sweep": 0.28, "winners": 0.07}
SECONDS = {False: 500, True: 100}
ERROR_ROWS = 128
WHOLE_ROWS = 4096


class Run:
    """The clock of the sections, and the results so far, written after each item."""

    def __init__(self, args):
        self.out, self.device, self.quick = Path(args.out), torch.device(args.device), args.quick
        self.tiny = self.device.type != "cuda"
        self.start, self.total = time.monotonic(), args.seconds or SECONDS[args.quick]
        self.content = {
            "machine": machine(self.device),
            "quick": args.quick,
            "correctness": [],
            "times": [],
            "sweep": [],
            "winners": [],
            "left_out": [],
        }

    def section(self, name):
        print(f"\n== {name} ({time.monotonic() - self.start:.0f} s so far)")
        before = sum(s for n, s in list(SHARES.items())[: list(SHARES).index(name) + 1])
        self.ends = self.start + before * self.total

    def over(self):
        return time.monotonic() > self.ends

    def leave_out(self, what, reason="out of time"):
        print(f"left out: {what}: {reason}")
        self.content["left_out"].append({"what": what, "reason": reason})
        self.write()

    def add(self, section, record):
        self.content[section].append(record)
        self.write()

    def write(self):
        path = self.out / "gpu.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(path)


def seconds_of(function, device, least=0.3, most=8):
    """Median seconds of repetitions after one to warm up."""
    function()
    times = []
    while len(times) < most and (len(times) < 3 or sum(times) < least):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
            most = 1
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def logits_alone(case, rows):
    """The forward's two products of N.V.D and nothing else."""
    w = case.states.weight
    z = w.new_empty(min(rows, len(case.targets)), len(w))
    for states in (case.states.hidden, case.states.aug_hidden):
        for x in states.split(len(z)):
            torch.mm(x, w.T, out=z[: len(x)])


@torch.no_grad()
def forward_alone(case, streams, backend):
    aug = case.states.aug_hidden if streams == 2 else None
    token_stats(
        case.states.hidden, case.states.weight, case.targets, aug_hidden=aug, backend=backend
    )


def ways_here(run, rows, main):
    """{name: Way} to time; peers on the main shape alone."""
    ours = {"backend": "triton"}
    found = {
        OURS: Way(WAYS[OURS].run, WAYS[OURS].computes, settings=ours),
        DENSE: Way(WAYS[OURS].run, WAYS[DENSE].computes, settings=ours | {"grad_budget": 0.0}),
    }
    if rows <= WHOLE_ROWS:
        found[WHOLE] = WAYS[WHOLE]
    if main and not run.quick and not run.tiny:
        found["CCE"] = Way(
            cce, "log-probs of both streams", upstream="log-probs", needs=("cut_cross_entropy",),
            settings={"impl": "cce"},
        )  # fmt: skip
        for name in ("Liger GRPO", "TRL chunked, five", "torch linear_cross_entropy"):
            found[name] = WAYS[name]
    return found


def time_case(run, states, main):
    """Times, memory and errors of one (N, D, V); True where the section's time is over."""
    case, chunk = Case(states), 4096
    n, d = states.hidden.shape
    v = len(states.weight)
    shape = {
        "states": states.name,
        "N": n,
        "D": d,
        "V": v,
        "dtype": str(states.weight.dtype).removeprefix("torch."),
    }
    shape |= {"entropy": states.entropy, "aug_entropy": states.aug_entropy, "kl": states.kl_prcp}
    print(states.describe())
    flops = 2.0 * n * v * d

    def note(name, seconds, products, **more):
        rate = products * flops / seconds / 1e12
        record = shape | {"way": name, "seconds": seconds, "tflops": rate} | more
        run.add("times", record)
        extra = f"  extra {more['extra_bytes'] / 2**20:.0f} MiB" if "extra_bytes" in more else ""
        print(f"  {name:32s} {1e3 * seconds:9.2f} ms  {rate:7.1f} TFLOP/s nominal{extra}")
        return seconds

    floor = None
    try:
        two = seconds_of(lambda: logits_alone(case, chunk), run.device)
        note("two bare matmuls", two, 2)
        for streams in (2, 1):
            seconds = seconds_of(lambda s=streams: forward_alone(case, s, "triton"), run.device)
            note(f"forward, {streams} stream{'s' * (streams > 1)}", seconds, streams)
            if streams == 2:
                print(f"  forward at {two / seconds:.0%} of the matmuls' rate")
        floor = note(FLOOR, seconds_of(lambda: six_matmuls(case, chunk), run.device), 6)
    except torch.cuda.OutOfMemoryError as error:
        run.leave_out(f"{states.describe()}, matmuls and forward", str(error).split(".")[0])
    exact = None
    try:
        exact = Exact(Case(take(states, min(n, ERROR_ROWS)))) if main else None
    except torch.cuda.OutOfMemoryError as error:
        run.leave_out(f"errors against float64, D = {d}", str(error).split(".")[0])
    for name, way in ways_here(run, n, main).items():
        reason = way.cannot(case) or ("out of time" if run.over() else "")
        if reason:
            run.leave_out(f"{name}, N = {n}, D = {d}", reason)
            continue
        try:
            errors, kept = exact.errors(way) if exact else ({}, None)
            seconds = seconds_of(lambda w=way: w(case), run.device)
            probe = PeakMemory(run.device)
            probe.start()
            # Kept until the peak is read: the gradients are part of it, and taken off again.
            results = way(case)
            extra = probe.read() - size(case.leaves)
            del results
        except torch.cuda.OutOfMemoryError as error:
            run.leave_out(f"{name}, N = {n}, D = {d}", str(error).split(".")[0])
            continue
        except Exception as error:
            # A peer that does not fit this machine's versions ends neither the run nor unsaid.
            if name in (OURS, DENSE):
                raise
            run.leave_out(f"{name}, N = {n}, D = {d}", f"{type(error).__name__}: {error}"[:200])
            continue
        note(name, seconds, 6, extra_bytes=extra, errors=errors, kept=kept)
        if floor:
            print(f"    {seconds / floor:.2f} of the six matmuls")
        if errors:
            print("    " + "  ".join(f"{o} {e:.0e}" for o, e in errors.items()))
    return run.over()


def time_shapes(run):
    run.section("times")
    shapes, rows = (SHAPES[:1], ROWS[:2]) if run.quick else (SHAPES, ROWS)
    if run.tiny:
        shapes, rows = [(64, 1000)], [64]
    order = [(shape, n) for n in rows for shape in shapes]
    for i, ((d, v), n) in enumerate(order):
        if run.over():
            run.leave_out(f"N = {n}, D = {d}, V = {v}")
            continue
        try:
            states = synthetic(n, v, d, 0.6, run.device).map(lambda x: x.to(torch.bfloat16))
            time_case(run, states, main=i == 0)
        except torch.cuda.OutOfMemoryError as error:
            run.leave_out(f"N = {n}, D = {d}, V = {v}", str(error).split(".")[0])


def table(content):
    """Markdown of the times, relative to the six matmuls of the same inputs."""
    lines = [
        "| states | N | D | V | | ms | / six matmuls | TFLOP/s nominal | peak extra, MiB |",
        "|---|---|---|---|---|---:|---:|---:|---:|",
    ]
    keys = ("states", "N", "D", "V")
    floors = {
        tuple(r[k] for k in keys): r["seconds"] for r in content["times"] if r["way"] == FLOOR
    }
    for r in content["times"]:
        floor = floors.get(tuple(r[k] for k in keys))
        ratio = f"{r['seconds'] / floor:.2f}" if floor else "–"
        extra = f"{r['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in r else "–"
        known = [r["states"], r["N"], r["D"], r["V"], r["way"], f"{1e3 * r['seconds']:.2f}"]
        cells = [*known, ratio, f"{r['tflops']:.0f}", extra]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="folder for gpu.json and table.md")
    parser.add_argument("--quick", action="store_true", help="under 2 minutes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, help="time for everything")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU here; --device cpu shows that the program works")
    run = Run(args)
    print(", ".join(f"{k} {v}" for k, v in run.content["machine"].items()))
    run.section("correctness")
    wrong = check_kernels(run)
    if wrong:
        print(f"\nNothing was timed: {wrong} checks failed. The results so far: gpu.json")
        sys.exit(1)
    time_shapes(run)
    run.section("sweep")
    gpu_sweep.sweep(run, seconds_of)
    run.section("winners")
    gpu_sweep.with_winners(run, time_case)
    text = table(run.content)
    (run.out / "table.md").write_text(text + "\n")
    print(f"\n{text}\n\n{gpu_sweep.lines(run.content)}")
    print(f"\n{time.monotonic() - run.start:.0f} s; gpu.json and table.md are in the folder given")


if __name__ == "__main__":
    main()
