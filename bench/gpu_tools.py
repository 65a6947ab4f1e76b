"""NVIDIA's tools on a tiny call: does any kernel touch memory that is not its own, or race?"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

TINY = [sys.executable, str(Path(__file__).with_name("gpu_robust.py"))]
# What each tool is run as, and the line of its output that says how many faults it found.
TOOLS = {
    "compute-sanitizer memcheck": (
        ["compute-sanitizer", "--tool", "memcheck", "--print-limit", "20"],
        re.compile(r"ERROR SUMMARY: (\d+) error"),
    ),
    "compute-sanitizer racecheck": (
        ["compute-sanitizer", "--tool", "racecheck", "--print-limit", "20"],
        re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
    ),
}
# One item of a section has little more.
MOST_SECONDS = 40
# Of a tool's output, what gpu.json keeps.
KEPT_CHARACTERS = 4000


def tools(run):
    for name, (command, summary) in TOOLS.items():
        if run.interpreted:
            run.leave_out(name, "needs a GPU")
        elif shutil.which(command[0]) is None:
            run.leave_out(name, f"{command[0]} is not on the PATH")
        else:
            run.attempt(name, lambda n=name, c=command, s=summary: _tool(run, n, c, s))


def _tool(run, name, command, summary):
    """Runs a tool on `gpu_robust.tiny`. Where the tool itself does not run, it is left out."""
    try:
        done = subprocess.run(
            [*command, *TINY], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=min(MOST_SECONDS, max(5, run.left)),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        run.add("tools", {"tool": name, "said": said[-KEPT_CHARACTERS:]})
        run.leave_out(name, "out of time")
        return
    run.add("tools", {"tool": name, "said": done.stdout[-KEPT_CHARACTERS:]})
    counted = faults(done.stdout, summary)
    if counted is None:
        run.leave_out(name, f"it did not say what it found; exit status {done.returncode}")
        return
    run.judge(name, {"faults": (counted, 0)})


def faults(said, summary):
    """How many faults a tool found, by its output; None where that says nothing of it."""
    found = summary.findall(said)
    return int(found[-1]) if found else None
