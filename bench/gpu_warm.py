"""Fills Triton's cache on all cores, so that no section waits for one compiler after the other.

`gpu.py` starts several of these processes beside the first section and ends them before anything is
timed. What they compute is thrown away; what fails here fails again, and is told, in its section.
"""

import argparse
import contextlib
import functools
import time

import torch
from gpu_check import CASES, STATISTICS, WANTED, errors_of
from gpu_times import MAIN_WIDTH, VARIANTS
from kernel_oracle import GRADS
from states import synthetic
from ways import Case

# Sizes of the main shape in all that a compiler asks of them: its width, and multiples of 16.
ROWS, VOCAB = 256, 32_768


def items(device):
    """Functions that compile what the sections need, what is needed first at the front."""
    made = functools.cache(
        lambda: Case(synthetic(ROWS, VOCAB, MAIN_WIDTH, 0.6, device).map(lambda x: x.bfloat16()))
    )
    checks = [
        functools.partial(_check, make, dtype, WANTED.get(name, GRADS), device)
        for name, make in CASES.items()
        for dtype in STATISTICS
    ]
    variants = [functools.partial(_variant, v, made) for v in VARIANTS.values()]
    early = 2 * len(STATISTICS)
    return checks[:early] + variants + checks[early:]


def _check(make, dtype, wanted, device):
    errors_of(make(dtype=dtype), device, wanted)


def _variant(variant, made):
    with torch.no_grad():
        variant.forward(made())
    variant(made())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("job", type=int)
    parser.add_argument("jobs", type=int)
    args = parser.parse_args()
    began = time.monotonic()
    for item in items(torch.device("cuda"))[args.job :: args.jobs]:
        # The section that needs it says what is wrong with it.
        with contextlib.suppress(Exception):
            item()
            torch.cuda.synchronize()
    print(f"  compiled, job {args.job}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
