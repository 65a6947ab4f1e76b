"""Launch sizes of the Triton kernels, tried on the machine; the winners as lines to paste."""

import contextlib
from dataclasses import dataclass

import gpu_check
import torch
from gpu_check import CASES, TINY, errors_of
from gpu_times import VARIANTS, made, time_states
from states import synthetic
from ways import OURS, Case

from papo_kernels.triton import columns, forward, groups, launch, lists


def _sizes(*names):
    return lambda *values: dict(zip(names, values, strict=True))


_stats = _sizes("STEPS", "LANES", "num_warps")
_block = _sizes("BLOCK_N", "BLOCK_V", "num_warps")
_levels = _sizes("BLOCK_V", "num_warps")
_add = _sizes("BLOCK_N", "BLOCK_D", "num_warps")
_entries = _sizes("BLOCK_K", "BLOCK_D", "num_warps")
# Of each kernel: which time it is judged by, and what is tried beside what it has.
CANDIDATES = {
    "stats": ("forward", [_stats(2, 256, 8), _stats(4, 256, 8), _stats(1, 256, 8),
                          _stats(2, 128, 4), _stats(2, 512, 16)]),
    "levels": ("both", [_levels(32, 2), _levels(32, 4), _levels(64, 8), _levels(128, 8)]),
    "dz": ("sparse", [_block(1, 1024, 4), _block(1, 512, 4), _block(1, 2048, 8),
                      _block(1, 512, 2)]),
    # The narrowest block gathers from a part of the weight that nearly fits the cache.
    "d_hidden": ("sparse", [_entries(8, 1024, 4), _entries(4, 512, 2), _entries(4, 256, 1)]),
    "d_weight": ("sparse", [_entries(8, 1024, 4), _entries(4, 512, 2)]),
    "add_rows": ("sparse", [_add(1, 1024, 4), _add(1, 4096, 8), _add(4, 1024, 8)]),
}  # fmt: skip


@dataclass(frozen=True)
class Constant:
    """A number of one module that all kernels go by."""

    module: object
    name: str
    judged_by: str
    tried: tuple


CONSTANTS = [
    Constant(launch, "TILE", "both", (16, 64)),
    Constant(forward, "CHUNKS", "forward", (1, 4)),
    Constant(groups, "GROUP_ROWS", "sparse", (512, 1024, 4096)),
    Constant(groups, "GATHERED_ELEMENTS", "sparse", (1 << 24, 1 << 26)),
    Constant(lists, "NATS", "both", (9.2, 8.2)),
    Constant(lists, "MOST_KEPT", "sparse", (1500, 2000)),
    Constant(columns, "LONG", "sparse", (64, 512)),
    Constant(columns, "WORDS", "sparse", (4096, 16384)),
    Constant(groups, "ASSUMED_TIGHTNESS", "sparse", (1.0, 1 / 16, 1 / 64)),
]


def sweep(run):
    """The section: the kernels' sizes on top of the winners so far, then each constant alone."""
    rows_, vocab, width = (64, 1024, 64) if run.interpreted else (4096, 152_064, 3584)
    dtype = torch.float32 if run.interpreted else torch.bfloat16
    states = made(
        run,
        "sweep",
        lambda: synthetic(rows_, vocab, width, 0.6, run.device).map(lambda x: x.to(dtype)),
    )
    if states is None:
        return
    case, winners = Case(states), {}
    for kernel, (judged_by, candidates) in CANDIDATES.items():
        usual = launch.LAUNCHES[kernel]
        # The interpreter knows one size of block: another shows that the program works.
        tried = [usual, *(usual | c for c in candidates[: 1 if run.interpreted else None])]
        found = [_try(run, case, kernel, sizes, judged_by) for sizes in tried]
        best = min(range(len(tried)), key=found.__getitem__)
        if best and found[best] < float("inf"):
            winners[kernel] = tried[best]
    for constant in CONSTANTS:
        for value in constant.tried[: 1 if run.interpreted else None]:
            with _changed(constant, value):
                _note(run, case, constant.name, value, constant.judged_by)
    run.attempt("winners", lambda: _keep_if_right(run, winners, dtype))
    if not run.interpreted:
        _with_winners(run)


def _try(run, case, kernel, sizes, judged_by):
    """Seconds with one kernel's sizes; infinite where they do not fit."""
    before = launch.LAUNCHES[kernel]
    launch.LAUNCHES[kernel] = sizes
    try:
        return _note(run, case, kernel, sizes, judged_by)
    finally:
        launch.LAUNCHES[kernel] = before


@contextlib.contextmanager
def _changed(constant, value):
    before = getattr(constant.module, constant.name)
    setattr(constant.module, constant.name, value)
    try:
        yield
    finally:
        setattr(constant.module, constant.name, before)


def _note(run, case, what, tried, judged_by):
    seconds, failure = float("inf"), ""
    found = run.attempt(f"sweep: {what} {tried}", lambda: _seconds_or_why(run, case, judged_by))
    if found is not None:
        seconds, failure = found
        print(f"  {what:18s} {tried!s:58s} {failure or f'{1e3 * seconds:9.2f} ms'}")
        record = {"what": what, "tried": tried, "seconds": None if failure else seconds}
        run.add("sweep", record | {"failure": failure})
    return seconds


def _seconds_or_why(run, case, judged_by):
    try:
        return _seconds(run, case, judged_by), ""
    except Exception as error:
        # A block that does not fit is a result; the types differ from one triton to the next.
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return float("inf"), f"{type(error).__name__}: {error}".split("\n")[0][:120]


def _seconds(run, case, judged_by):
    variant, seconds = VARIANTS[OURS], 0.0
    if judged_by != "sparse":
        seconds += run.seconds_of(lambda: variant.forward(case), least=0.1, most=5)["seconds"]
    if judged_by != "forward":
        graph = variant.graph(case)
        seconds += run.seconds_of(lambda: variant.backward(graph), least=0.1, most=5)["seconds"]
    return seconds


def _keep_if_right(run, winners, dtype):
    """Winners count only if the kernels are right with them."""
    launch.LAUNCHES.update(winners)
    case = TINY if run.interpreted else CASES["odd sizes, ignored rows"]
    errors = errors_of(case(dtype=dtype), run.device)
    bad = {n: e for n, (e, bound) in errors.items() if not e <= bound}
    if bad:
        run.leave_out("winners", f"wrong with them in {gpu_check.shown(dtype)}: {bad}")
        return
    for kernel, sizes in winners.items():
        run.add("winners", {"kernel": kernel, "line": _line(kernel, sizes)})


def _line(kernel, sizes):
    """What stands for a winner in LAUNCHES of papo_kernels/triton/launch.py."""
    return f'"{kernel}": dict({", ".join(f"{k}={v}" for k, v in sizes.items())}),'


def _with_winners(run):
    """The main shape again, with the winners in the table."""
    if not run.content["winners"]:
        run.leave_out("times with the winners", "the sweep has none")
        return
    states = made(
        run,
        "with the winners",
        lambda: synthetic(16_384, 152_064, 3584, 0.6, run.device).map(lambda x: x.bfloat16()),
    )
    if states is not None:
        states.name += " with the winners"
        time_states(run, states)
