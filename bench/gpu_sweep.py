"""Block sizes of the Triton kernels, tried on the machine; the winners as lines to paste."""

from dataclasses import astuple, replace

import gpu_check
import torch
from gpu_check import CASES, TINY, errors_of
from gpu_times import VARIANTS, made, time_states
from states import synthetic
from ways import OURS, Case

from papo_kernels.triton import launch as triton_launch
from papo_kernels.triton.launch import Blocks

# Which time a kernel's blocks are judged by.
JUDGED_BY = {"forward": "forward", "dz": "sparse", "d_hidden": "sparse", "d_weight": "sparse"}
CANDIDATES = {
    "forward": [
        Blocks(128, 64, 8, 4), Blocks(64, 64, 4, 3), Blocks(64, 64, 8, 4), Blocks(128, 128, 8, 2),
        Blocks(256, 64, 8, 3), Blocks(128, 64, 4, 3), Blocks(64, 128, 4, 3), Blocks(256, 32, 8, 4),
        Blocks(128, 32, 8, 4), Blocks(64, 64, 4, 4),
    ],
    "dz": [
        Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(64, 128, 8, 2), Blocks(32, 64, 4, 3),
        Blocks(64, 64, 8, 4), Blocks(128, 64, 4, 3),
    ],
    "d_hidden": [
        Blocks(64, 128, 4, 3), Blocks(64, 256, 8, 3), Blocks(32, 128, 4, 3), Blocks(64, 64, 4, 3),
        Blocks(32, 256, 8, 4),
    ],
    "d_weight": [
        Blocks(64, 128, 4, 3), Blocks(64, 256, 8, 3), Blocks(64, 64, 4, 3), Blocks(64, 256, 8, 2),
    ],
}  # fmt: skip
TILES = (32, 128)


def sweep(run):
    """The section: candidates one kernel after the other, each on top of the winners so far."""
    shapes = [(torch.bfloat16, 3584), (torch.bfloat16, 2048), (torch.float32, 3584)]
    rows, vocab = 4096, 152_064
    if run.interpreted:
        shapes, rows, vocab = [(torch.float32, 64)], 64, 1024
    for dtype, width in shapes:
        shown = f"sweep: {gpu_check.shown(dtype)}, D = {width}"
        if run.left <= 0:
            run.leave_out(shown, "out of time")
            continue
        states = made(
            run,
            shown,
            lambda t=dtype, d=width: synthetic(rows, vocab, d, 0.6, run.device).map(
                lambda x: x.to(t)
            ),
        )
        if states is not None:
            _one_shape(run, Case(states))
    with_winners(run)


def _one_shape(run, case):
    device, size = case.weight.device, case.weight.element_size()
    width = case.weight.shape[1]
    key = (triton_launch.architecture(device), size, width >= triton_launch.WIDE)
    shown = f"{key[0]}, {gpu_check.shown(case.weight.dtype)}, D = {width}"
    best = triton_launch.launch_of(device, size, width)
    for kernel, what in JUDGED_BY.items():
        candidates = CANDIDATES[kernel]
        # The interpreter knows one size of block; two show that the program works.
        if run.interpreted:
            candidates = [Blocks(1024, 64, 4, 1)] if kernel in ("forward", "dz") else []
        found = []
        for blocks in (getattr(best, kernel), *candidates):
            launch = _with(best, kernel, blocks)
            tried = run.attempt(
                f"sweep: {shown}, {kernel} {astuple(blocks)}",
                lambda at=launch, w=what: _try(run, key, at, case, w),
            )
            if tried is None:
                continue
            seconds, failure = tried
            found.append((blocks, seconds))
            print(
                f"  {shown}: {kernel:9s} v {blocks.v:4d} d {blocks.d:4d} warps {blocks.warps} "
                f"stages {blocks.stages}: {failure or f'{1e3 * seconds:9.2f} ms'}"
            )
            run.add(
                "sweep",
                {"key": list(key), "kernel": kernel, "blocks": astuple(blocks),
                 "seconds": None if failure else seconds, "failure": failure},
            )  # fmt: skip
        if found:
            best = _with(best, kernel, min(found, key=lambda f: f[1])[0])
    _tiles(run, key, best, case, shown)
    run.attempt(
        f"winners of {shown}",
        lambda: _keep_if_right(run, key, best, shown, case.weight.dtype, device),
    )


def _with(launch, kernel, blocks):
    """`launch` with one kernel's blocks; those of d_weight have the `v` of dz."""
    launch = replace(launch, **{kernel: blocks})
    return replace(launch, d_weight=replace(launch.d_weight, v=launch.dz.v))


def _try(run, key, launch, case, what):
    """(seconds, why it failed): of the forward, or of the sparse backward."""
    before = triton_launch.LAUNCHES.get(key)
    triton_launch.LAUNCHES[key] = launch
    try:
        return _seconds(run, case, what), ""
    except Exception as error:
        # A block that does not fit is a result; the types differ from one triton to the next.
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return float("inf"), f"{type(error).__name__}: {error}".split("\n")[0][:120]
    finally:
        triton_launch.LAUNCHES.pop(key)
        if before is not None:
            triton_launch.LAUNCHES[key] = before


def _seconds(run, case, what):
    variant = VARIANTS[OURS]
    if what == "forward":
        return run.seconds_of(lambda: variant.forward(case), least=0.1, most=5)["seconds"]
    graph = variant.graph(case)
    return run.seconds_of(lambda: variant.backward(graph), least=0.1, most=5)["seconds"]


def _tiles(run, key, best, case, shown):
    """What other heights of a tile would give: one number for all lines of the table."""
    usual = triton_launch.TILE
    for tile in (usual, *TILES):
        if run.interpreted and tile != usual:
            run.leave_out(f"sweep: {shown}, TILE = {tile}", "interpreted")
            continue
        run.attempt(
            f"sweep: {shown}, TILE = {tile}",
            lambda at=tile: _tile(run, key, best, case, shown, at, usual),
        )


def _tile(run, key, best, case, shown, tile, usual):
    triton_launch.TILE = tile
    try:
        parts = [_try(run, key, best, case, what) for what in ("forward", "sparse")]
    finally:
        triton_launch.TILE = usual
    failure = parts[0][1] or parts[1][1]
    times = None if failure else [s for s, _ in parts]
    run.add("sweep", {"key": list(key), "tile": tile, "seconds": times, "failure": failure})
    said = failure or "forward {:.2f} ms, sparse backward {:.2f} ms".format(
        *(1e3 * s for s in times)
    )
    print(f"  {shown}: TILE = {tile}: {said}")


def _keep_if_right(run, key, best, shown, dtype, device):
    """Winners count only if the kernels are right with them."""
    before = triton_launch.LAUNCHES.get(key)
    triton_launch.LAUNCHES[key] = best
    wide = {"d": 3592} if key[2] else {}
    case = (TINY if run.interpreted else CASES["odd sizes, ignored rows"])(dtype=dtype, **wide)
    errors = errors_of(case, device)
    bad = {n: e for n, (e, bound) in errors.items() if not e <= bound}
    if bad:
        triton_launch.LAUNCHES.pop(key)
        if before is not None:
            triton_launch.LAUNCHES[key] = before
        run.leave_out(f"winners of {shown}", f"wrong with them: {bad}")
        return
    run.add("winners", {"key": list(key), "line": _line(key, best)})


def _line(key, launch):
    """What stands for the winners in LAUNCHES of papo_kernels/triton/launch.py."""
    blocks = ", ".join(
        "Blocks({}, {}, {}, {})".format(*astuple(getattr(launch, k))) for k in JUDGED_BY
    )
    return f'("{key[0]}", {key[1]}, {key[2]}): Launch(\n    {blocks}\n),'


def with_winners(run):
    """The main shape again, with the winners in the table."""
    if not run.content["winners"]:
        run.leave_out("times with the winners", "the sweep has none")
        return
    width, vocab, rows = (64, 1000, 64) if run.interpreted else (3584, 152_064, 16_384)
    states = made(
        run,
        "with the winners",
        lambda: synthetic(rows, vocab, width, 0.6, run.device).map(lambda x: x.bfloat16()),
    )
    if states is not None:
        states.name += " with the winners"
        time_states(run, states)
