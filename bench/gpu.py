"""The Triton kernels on a GPU: correctness, times, memory, block sizes. `bench/gpu.sh` starts it.

Each section is a process of its own with a share of the seconds, so that nothing that one of them
breaks is lost to the next. What was measured so far is in gpu.json at any time, and table.md is
written after every section. A failed check is reported and stops nothing; it makes the exit status
1. `--device cpu` runs the same in Triton's interpreter, with the same checks and on small shapes,
to show that the program works: its times mean nothing.
"""

import argparse
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_results import BROKEN, NO_GPU, Results
from gpu_table import failed, table

HERE = Path(__file__).parent
# In the order of their worth: the share of the seconds, and what runs. What a section leaves of its
# time is the next ones'.
SECTIONS = {
    "first": (0.10, "gpu_check:first"),
    "main": (0.22, "gpu_times:main_shape"),
    "real": (0.22, "gpu_times:real_states"),
    "checks": (0.14, "gpu_robust:checks"),
    "peers": (0.06, "gpu_times:peers"),
    "shapes": (0.10, "gpu_times:other_shapes"),
    "tools": (0.12, "gpu_tools:tools"),
    "sweep": (0.04, "gpu_sweep:sweep"),
}
SECONDS, QUICK_SECONDS = 500, 100
# What the first checks take where torch has to be read from a slow disk and kernels be compiled.
FIRST_SECONDS = 40
# A process that is this much over its section's time is killed.
GRACE = 10
LATE = "killed: out of time"
# Less is not worth a process.
LEAST_SECONDS = 3
# Processes that compile ahead; each has a context of its own on the GPU.
MOST_COMPILERS = 12
# Of the section that switches deterministic algorithms on, for which cuBLAS wants the first, and
# that compiles one small function, for which no pool of processes has to be started.
VARIABLES = {
    "checks": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
}


def start(args, name):
    """The process of a section, which waits to be told its seconds."""
    environment = os.environ | VARIABLES.get(name, {})
    if name == "peers" and args.peers:
        # Other people's packages reach this section alone.
        environment["PYTHONPATH"] += f":{args.peers}"
    if args.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen(
        [sys.executable, str(HERE / "gpu_section.py"), args.out, name, SECTIONS[name][1],
         args.device, args.carried],
        env=environment, stdin=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def warm(args, chosen):
    """Processes that compile for the sections while the first one runs; none without a GPU."""
    if args.device == "cpu" or chosen[0] != "first":
        return []
    jobs = max(1, min(MOST_COMPILERS, (os.cpu_count() or 1) - 2))
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "gpu_warm.py"), str(job), str(jobs)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for job in range(jobs)
    ]  # fmt: skip


def kill(process):
    """Ends a process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def finish(compilers, ends):
    """Waits for the compilers until the first section's end: what they leave, others do alone."""
    while compilers:
        process = compilers[-1]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, ends - time.monotonic()))
        kill(process)
        compilers.pop()


def go(process, ends):
    """Lets a section run until `ends`, by the clock that all processes share.

    Returns its exit status, or None where it had to be killed.
    """
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{ends}\n")
            process.stdin.flush()
        return process.wait(max(1.0, ends - time.monotonic()) + GRACE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also what it started and left.
        kill(process)


def run_section(args, name, process, ends):
    """Runs a section to its end, with a fresh process for what a broken one left."""
    began = time.monotonic()
    while True:
        before = Results(args.out).content["tried"].get(name, [])
        status = go(process, ends)
        if status == NO_GPU:
            return status
        results = Results(args.out)
        content = results.content
        ended = {0: "", None: LATE}.get(status, f"exit status {status}")
        what = content["current"] or "the section"
        content["current"] = None
        if status is None:
            results.add("left_out", {"section": name, "what": what, "reason": LATE})
            print(f"  left out: {what}: {LATE}")
        elif status not in (0, BROKEN):
            error = f"its process: {ended}"
            results.add("failures", {"section": name, "what": what, "error": error})
            print(f"  FAILED: {what}: {error}")
        got_on = len(content["tried"].get(name, [])) > len(before)
        if not status or not got_on or ends - time.monotonic() < LEAST_SECONDS:
            seconds = round(time.monotonic() - began, 1)
            results.add("sections", {"name": name, "seconds": seconds, "ended": ended or "done"})
            return status
        results.write()
        process = start(args, name)


def write_table(args):
    text = table(Results(args.out).content)
    (Path(args.out) / "table.md").write_text(text + "\n")
    return text


def ends_of(began, chosen, total):
    """{section: when it has to end}: by their shares of `total` seconds, the first checks no less
    than they need."""
    shares = {name: SECTIONS[name][0] / sum(SECTIONS[n][0] for n in chosen) for name in chosen}
    if chosen[0] == "first" and len(chosen) > 1:
        least = max(shares.pop("first"), min(FIRST_SECONDS / total, 1 / 2))
        whole = sum(shares.values())
        shares = {"first": least} | {n: (1 - least) * s / whole for n, s in shares.items()}
    ends = itertools.accumulate(shares.values())
    return {name: began + total * end for name, end in zip(shares, ends, strict=True)}


def run_all(args, chosen, total):
    """Runs the chosen sections in turn; the exit status."""
    began = time.monotonic()
    ends = ends_of(began, chosen, total)
    waiting = start(args, chosen[0])
    compilers = warm(args, chosen)
    try:
        for i, name in enumerate(chosen):
            process, waiting = waiting, None
            if i + 1 < len(chosen):
                waiting = start(args, chosen[i + 1])
            print(f"\n== {name} ({time.monotonic() - began:.0f} s so far)", flush=True)
            status = run_section(args, name, process, ends[name])
            finish(compilers, ends[name])
            if status == NO_GPU:
                print(
                    "error: torch sees no GPU here; --device cpu shows that the program works",
                    file=sys.stderr,
                )
                return 1
            write_table(args)
    except KeyboardInterrupt:
        Results(args.out).add(
            "failures", {"section": name, "what": "everything", "error": "interrupted"}
        )
    finally:
        for process in (*compilers, *([waiting] if waiting else [])):
            kill(process)
    print(f"\n{write_table(args)}")
    print(f"\n{time.monotonic() - began:.0f} s; gpu.json and table.md are in the folder given")
    wrong = failed(Results(args.out).content)
    # Once more at the very end, where it is seen.
    print("\n".join(["Failed:", *wrong]) if wrong else "Nothing failed.")
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="folder for gpu.json and table.md")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS} seconds")
    parser.add_argument("--seconds", type=float, help=f"for everything; else {SECONDS}")
    parser.add_argument("--only", help=f"some of: {','.join(SECTIONS)}")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--carried", default=str(HERE.parent / "carried" / "states.pt"),
        help="the file that bench/carry_states.py wrote",
    )  # fmt: skip
    parser.add_argument("--peers", default="", help="folder with the peers' packages")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(SECTIONS)
    unknown = [name for name in chosen if name not in SECTIONS]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected some of {','.join(SECTIONS)}")
    # As for ctrl-C: what is running is ended, and what is measured is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Results(args.out, fresh=True).write()
    total = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    sys.exit(run_all(args, chosen, total))


if __name__ == "__main__":
    main()
