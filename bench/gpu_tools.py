"""NVIDIA's tools: does a kernel touch memory that is not its own, or race; what limits it?

They run side by side, each on a program of its own: the sanitizers on a tiny call, and the profiler
of hardware counters on one of the main width. Where a tool may not run, that is left out.
"""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from gpu_times import MAIN_VOCAB, MAIN_WIDTH, OURS, VARIANTS
from states import synthetic
from ways import Case

import papo_kernels.triton

HERE = Path(__file__).parent
# Of a tool's output, what gpu.json keeps.
KEPT_CHARACTERS = 20_000
# One item of a section has little more.
MOST_SECONDS = 40
COUNTED_ROWS = 2048
# Each allocation for itself, so that what lies behind a tensor is nobody's.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Tool:
    """A command, the program it watches, and what of its output says how many faults it found."""

    command: tuple
    program: str
    summary: re.Pattern | None = None
    variables: tuple = ()


def _sanitizer(tool, summary):
    command = ("compute-sanitizer", "--tool", tool, "--print-limit", "20")
    return Tool(command, "gpu_robust.py", re.compile(summary), tuple(UNCACHED.items()))


TOOLS = {
    "compute-sanitizer memcheck": _sanitizer("memcheck", r"ERROR SUMMARY: (\d+) error"),
    "compute-sanitizer racecheck": _sanitizer("racecheck", r"RACECHECK SUMMARY: (\d+) hazard"),
    # The clocks stay as they are found.
    "ncu": Tool(
        ("ncu", "--clock-control", "none", "--launch-count", "12", "--section", "SpeedOfLight",
         "--section", "LaunchStats", "--section", "Occupancy",
         "--section", "MemoryWorkloadAnalysis"),
        "gpu_tools.py",
    ),
}  # fmt: skip


def our_kernels():
    """The names of all Triton functions of papo_kernels."""
    found = set()
    for info in pkgutil.iter_modules(papo_kernels.triton.__path__, "papo_kernels.triton."):
        functions = vars(importlib.import_module(info.name)).values()
        found |= {f.__name__ for f in functions if isinstance(f, triton.runtime.KernelInterface)}
    return sorted(found)


def tools(run):
    """The section."""
    started = {}
    for name, tool in TOOLS.items():
        if run.interpreted:
            run.leave_out(name, "needs a GPU")
        elif shutil.which(tool.command[0]) is None:
            run.leave_out(name, f"{tool.command[0]} is not on the PATH")
        else:
            started[name] = _start(tool)
    for name, (process, output) in started.items():
        run.attempt(name, lambda n=name, p=process, o=output: _end(run, n, p, o))


def _start(tool):
    # A file, so that what a tool said before it was killed is not lost; `_end` reads it.
    output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
    chosen = ["--kernel-name", f"regex:^({'|'.join(our_kernels())})$"] if not tool.summary else []
    process = subprocess.Popen(
        [*tool.command, *chosen, sys.executable, str(HERE / tool.program)],
        stdout=output, stderr=subprocess.STDOUT, env=os.environ | dict(tool.variables),
    )  # fmt: skip
    return process, output


def _end(run, name, process, output):
    """Waits for a tool, keeps what it said, and judges what it found."""
    late = False
    try:
        process.wait(min(MOST_SECONDS, max(1, run.left)))
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
        process.wait(5)
    output.seek(0)
    said = output.read().replace(str(HERE.parent), ".")
    run.add("tools", {"tool": name, "said": said[-KEPT_CHARACTERS:]})
    summary = TOOLS[name].summary
    counted = faults(said, summary) if summary else None
    if counted is not None:
        run.judge(name, {"faults": (counted, 0)})
    elif late or summary or process.returncode:
        why = "out of time" if late else f"exit status {process.returncode}"
        run.leave_out(name, f"{why}; gpu.json has what it said")
    else:
        print(f"  {name}: gpu.json has what it said", flush=True)


def faults(said, summary):
    """How many faults a tool found, by its output; None where that says nothing of it."""
    found = summary.findall(said)
    return int(found[-1]) if found else None


def main():
    """What the profiler of counters watches: one forward and backward of the main width."""
    began = time.monotonic()
    states = synthetic(COUNTED_ROWS, MAIN_VOCAB, MAIN_WIDTH, 0.6, "cuda")
    VARIANTS[OURS](Case(states.map(lambda x: x.bfloat16())))
    torch.cuda.synchronize()
    print(f"{time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
