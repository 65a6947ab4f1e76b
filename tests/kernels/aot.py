"""Compiles the Triton kernels for GPUs that are not here and reports what they use.

`python tests/kernels/aot.py` prints the table; `--write` also makes it the committed one. `--loops`
does the same for the instructions of kernels' loops, which `bench/cost_model.py` reads.
"""

import itertools
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TABLE = Path(__file__).with_name("triton_resources.json")
LOOPS = Path(__file__).with_name("triton_loops.json")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def variants():
    """(name, kernel, constants, pointers' types, warps) of every shape that is launched."""
    from papo_kernels.triton import launch as host

    for name, kernel, constants, types in _kernels(host.TILE):
        blocks = dict(host.LAUNCHES[name.split()[0]])
        warps = blocks.pop("num_warps")
        yield name, kernel, blocks | constants, types, warps


def _kernels(tile):
    from papo_kernels.triton import (
        account_kernels,
        columns,
        combine_kernels,
        gradients,
        kernels,
        list_kernels,
        plan_kernels,
        size_kernels,
        stats_kernels,
    )
    from papo_kernels.triton.launch import LAUNCHES

    # The trainer always bans words, by a bias.
    plain = dict(HAS_BIAS=True, CAP=False)
    for two, streams in ((False, "one stream"), (True, "two streams")):
        each = dict(TWO=two, **plain)
        yield f"stats {streams}", stats_kernels.stats_kernel, dict(OWN=1024) | each, {}
        yield f"levels {streams}", kernels.levels_kernel, dict(TILE=tile) | each, {}
        lists = dict(ROWS=512, LANES=LAUNCHES["levels"]["BLOCK_V"])
        yield f"combine {streams}", combine_kernels.combine_kernel, dict(TWO=two), {}
        yield f"list {streams}", list_kernels.list_kernel, lists | each, {}
    constants = dict(OWN=1024, TWO=True, HAS_BIAS=True, CAP=True)
    yield "stats capped", stats_kernels.stats_kernel, constants, {}
    on = dict.fromkeys(
        ("TWO", "FULL", "AUG", "LOGPROB", "ENTROPY", "LOGPROB_AUG", "ENTROPY_AUG", "KL"), True
    )
    for gather, reverse in itertools.product((False, True), (False, True)):
        name = f"dz {'listed' if gather else 'span'}{' reverse' if reverse else ''}"
        constants = dict(GATHER=gather, NET=gather, SKIP=not gather, KL_REVERSE=reverse)
        constants["OWN_WORDS"] = False
        yield name, gradients.dz_kernel, constants | on | plain, {"dz_ptr": "*bf16"}
    constants = dict(GATHER=False, OWN_WORDS=True, NET=True, SKIP=False, KL_REVERSE=True)
    yield "dz_listed", gradients.dz_kernel, constants | on | plain, {"done_ptr": "*i32"}
    both = dict(FULL=True, AUG=True)
    yield "drop", list_kernels.drop_kernel, dict(NET=True) | both, {"live_ptr": "*u8"}
    yield "flatten", list_kernels.flatten_kernel, dict(STREAMS=2), {}
    states = dict.fromkeys(("weight_ptr", "hidden_ptr", "aug_ptr", "out_aug_ptr"), "*bf16")
    # A launch finds out that features are contiguous.
    found = both | dict(stride_w_d=1)
    for some, what in ((False, ""), (True, " of some")):
        types = states | {"out_ptr": "*bf16"}
        yield f"d_hidden{what}", list_kernels.d_hidden_kernel, dict(SOME=some) | found, types
    yield "tally", columns.tally_kernel, {}, {}
    yield "spread", columns.spread_kernel, dict(STREAMS=2), {"out_ptr": "*bf16"}
    found = both | dict(WEIGHT=True, BIAS=True, stride_h_d=1, stride_aug_d=1)
    split = {"out_ptr": "*i16", "rest_ptr": "*i8"}
    yield "d_weight", list_kernels.d_weight_kernel, dict(SPLIT=True) | found, states | split
    yield "add_rows", gradients.add_rows_kernel, dict(SPLIT=False), {"out_ptr": "*bf16"}
    yield "add_rows split", gradients.add_rows_kernel, dict(SPLIT=True), split
    yield "sort", kernels.sort_kernel, dict(TWO=True), {}
    yield from _certificate(account_kernels, size_kernels, on | dict(KL_REVERSE=True))
    yield from _plan(plan_kernels, tile)


def _certificate(kernels, sizes, on):
    asked = dict(FULL=True, AUG=True, NET=True)
    states = {"hidden_ptr": "*bf16", "aug_ptr": "*bf16", "out_ptr": "*fp64"}
    yield "norms", sizes.norms_kernel, dict(stride_h_d=1, stride_aug_d=1), states
    for cap in (False, True):
        name = "least capped" if cap else "least"
        yield name, sizes.least_kernel, on | asked | dict(CAP=cap), {"out_ptr": "*fp64"}
    doubles = dict.fromkeys(
        ("mass_ptr", "information_ptr", "out_ptr", "norms_ptr", "least_ptr", "squares_ptr"), "*fp64"
    )
    outside = on | asked | dict(WEIGHT=True)
    yield "outside", kernels.outside_kernel, outside, doubles | {"tile_ptr": "*i32"}
    doubles = dict.fromkeys(
        ("norms_ptr", "squares_ptr", "bounds_ptr", "whole_ptr", "share_ptr"), "*fp64"
    )
    whole = asked | dict(OF_TOKEN=False, WEIGHT=True, PLAIN=True, PLAIN_AUG=True, PLAIN_NET=True)
    yield "whole", kernels.whole_kernel, whole, doubles | {"budget": "fp32"}


def _plan(kernels, tile):
    doubles = dict.fromkeys(("mass_ptr", "information_ptr", "share_ptr"), "*fp64")
    counted = {"tile_ptr": "*i32"}
    yield "count_levels", kernels.count_levels_kernel, {}, {}
    yield "begin", kernels.begin_kernel, dict(PARTS=16, TILE=tile), doubles | counted
    numbers = ("level_ptr", "limit_ptr", "wanted_ptr", "asked_ptr")
    types = doubles | counted | dict.fromkeys(numbers, "*i32")
    types |= {"few_ptr": "*u8", "budget": "fp32", "assumed": "fp32"}
    for known in (False, True):
        constants = dict(TWO=True, KNOWN=known, PARTS=16, TILE=tile)
        name = "choose again" if known else "choose"
        yield name, kernels.choose_kernel, constants, types
    types = {"tiles_ptr": "*i64", "row_ptr": "*i64", "here_ptr": "*u8"}
    yield "arrange", kernels.arrange_kernel, dict(TILE=tile), types
    masks = dict.fromkeys(("tiles_ptr", "is_target_ptr", "out_ptr"), "*u8")
    yield "mark", kernels.mark_kernel, {}, masks | counted
    types = masks | {"limit_ptr": "*i32", "asked_ptr": "*i32"}
    yield "choose_words", kernels.choose_words_kernel, {}, types


FIXED = {
    "targets_ptr": "*i64", "rows_ptr": "*i64", "at_ptr": "*i64", "cut_ptr": "*i64",
    "col_ptr": "*i32", "level_ptr": "*u8", "count_ptr": "*i32", "done_ptr": "*u8",
    "good_ptr": "*u8", "kept_ptr": "*i32", "mark_ptr": "*i32", "total_ptr": "*i32",
    "taken_ptr": "*i32", "start_ptr": "*i32", "starts_ptr": "*i32", "counts_ptr": "*i32",
    "word_ptr": "*i32", "out_start_ptr": "*i64", "out_word_ptr": "*i32", "out_row_ptr": "*i32",
    "row_ptr": "*i32", "order_ptr": "*i64", "often_ptr": "*i32", "column_ptr": "*i32",
    "short_ptr": "*i32", "left_ptr": "*u8", "numbers_ptr": "*i32",
    "listed_from": "fp32", "sharpness": "fp32", "softcap": "fp32",
}  # fmt: skip


def compile_one(kernel, constants, types, target, warps):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = (FIXED | types).get(name, "*fp32" if name.endswith("_ptr") else "i32")
        signature[name] = kind
        # What a launch finds out by itself: allocations and sizes of rows are multiples of 16.
        if kind.startswith("*") or name.startswith("stride") or name in ("V", "width"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": warps}
    return compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def resources(compiled, target):
    """Registers of a thread, bytes or registers spilled, bytes of shared memory of a block."""
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spills = (
            max(map(int, re.findall(rf"\.{field}:\s+(\d+)", text)), default=0)
            for field in ("vgpr_count", "vgpr_spill_count")
        )
        return {"registers": registers, "spills": spills, "shared": shared}
    with tempfile.TemporaryDirectory() as folder:
        _, said = assembled(compiled, target, folder)
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spills = int(re.search(r"(\d+) bytes spill stores", said)[1])
    return {"registers": registers, "spills": spills, "shared": shared}


def assembled(compiled, target, folder):
    """The file in `folder` that NVIDIA's assembler makes of a kernel, and what it says."""
    from triton.backends.nvidia.compiler import get_ptxas

    capability = TARGETS[target][1]
    suffix = "a" if capability >= 90 else ""
    ptx, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
    ptx.write_text(compiled.asm["ptx"])
    command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}{suffix}", ptx]
    done = subprocess.run([*command, "-o", binary], capture_output=True, text=True, check=True)
    return binary, done.stderr


# What one run of a kernel's innermost loops covers, as a product of its constants.
COVERED = {
    "stats two streams": ("STEPS", "LANES", "WIDE"),
    "levels two streams": ("TILE", "BLOCK_V"),
    "dz listed": ("BLOCK_N", "BLOCK_V"),
    "dz_listed": ("BLOCK_N", "BLOCK_V"),
    "drop": ("BLOCK_N", "BLOCK"),
    "d_hidden": ("BLOCK_K", "BLOCK_D"),
    "d_weight": ("BLOCK_K", "BLOCK_D"),
    "count_levels": ("BLOCK_V",),
    "choose_words": ("BLOCK_T", "BLOCK_V"),
}


def loops():
    """{kernel: instructions that each of its innermost loops takes for one element}, on sm_90.

    A thread's instructions, longest loop first, of kernels without a bias. An element is a pair of
    logits, an entry of a list, one of a list and a feature, or a level.
    """
    from papo_kernels.triton.stats_kernels import WIDE

    found = {}
    for name, kernel, constants, types, warps in variants():
        if name not in COVERED:
            continue
        off = {k: False for k in ("HAS_BIAS", "BIAS") if k in constants}
        compiled = compile_one(kernel, constants | off, types, "sm_90", warps)
        sizes = constants | {"WIDE": WIDE.value}
        threads = 32 * warps / math.prod(sizes[k] for k in COVERED[name])
        lengths = sorted(inner_loops(compiled, "sm_90"), reverse=True)
        found[name] = [round(n * threads, 2) for n in lengths]
    return found


def longest_loop(compiled, target):
    """Instructions of the longest innermost loop, as NVIDIA's assembler makes them."""
    return max(inner_loops(compiled, target))


def inner_loops(compiled, target):
    """Instructions of each innermost loop."""
    import triton

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        command = [disassembler, "-c", assembled(compiled, target, folder)[0]]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.strip() for line in text.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    jumps = [(i, re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)) for i, line in enumerate(lines)]
    loops = [(labels[m[1]], i) for i, m in jumps if m and labels.get(m[1], i) < i]
    inner = [x for x in loops if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return [sum(line.startswith("/*") for line in lines[a : b + 1]) for a, b in inner]


def measure():
    table = {}
    for name, kernel, constants, types, warps in variants():
        for target in TARGETS:
            compiled = compile_one(kernel, constants, types, target, warps)
            table[f"{name} {target}"] = resources(compiled, target)
    return table


def main():
    if "--loops" in sys.argv:
        table = loops()
        print(json.dumps(table, indent=1))
        if "--write" in sys.argv:
            write(LOOPS, table)
        return
    table = measure()
    for name, row in table.items():
        print(f"{name:36s}", *(f"{k} {v:6d}" for k, v in row.items()))
    if "--write" in sys.argv:
        write(TABLE, table)


def write(path, table):
    import triton

    content = {"triton": triton.__version__, "kernels": table}
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
