"""Runs one section of `bench/gpu.sh` in this process; `gpu.py` starts it.

It imports everything, then waits for the line on its standard input that says when the section has
to end (`time.monotonic`): so the next section's imports cost no time. CUDA is not touched before.
"""

import argparse
import importlib
import sys

import torch
from gpu_results import NO_GPU
from gpu_run import Run
from measure import machine


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("section")
    parser.add_argument("function", help="module:function that takes a Run")
    parser.add_argument("device")
    parser.add_argument("carried")
    args = parser.parse_args()
    module, function = args.function.split(":")
    function = getattr(importlib.import_module(module), function)
    line = sys.stdin.readline()
    if not line:
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    run = Run(args.out, args.section, float(line), args.device, args.carried)
    if not run.content["machine"]:
        run.content["machine"] = machine(run.device)
        run.write()
        print(", ".join(f"{k} {v}" for k, v in run.content["machine"].items()))
    # One section's end is the next one's start.
    run.clocks("at the start")
    function(run)


if __name__ == "__main__":
    main()
