"""Compiles the Triton kernels for GPUs that are not here and reports what they use.

`python tests/kernels/aot.py` prints the table; `--write` also makes it the committed one.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TABLE = Path(__file__).with_name("triton_resources.json")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def variants():
    """(name, kernel, dtype, constants, warps, stages, targets) of every shape that is launched."""
    from papo_kernels.triton import launch as host

    for (architecture, size, wide), launch in host.LAUNCHES.items():
        dtype = {2: "bf16", 4: "fp32"}[size]
        own = "" if architecture == "any" else {None: " all", True: " wide", False: " narrow"}[wide]
        targets = list(TARGETS) if architecture == "any" else [architecture]
        for name, kernel, constants, blocks in _kernels(launch):
            sizes = dict(BLOCK_N=host.TILE, BLOCK_V=blocks.v, BLOCK_D=blocks.d, UPCAST=False)
            if name == "d_weight":
                sizes["BLOCK_V"] = launch.dz.v
            kind, _, rest = name.partition(" ")
            name = f"{kind} {dtype} {rest}".rstrip() + own
            yield name, kernel, dtype, sizes | constants, blocks.warps, blocks.stages, targets


def _kernels(launch):
    from papo_kernels.triton import gradients, kernels

    head = dict(HAS_BIAS=False, CAP=False)
    for two in (False, True):
        name = f"forward {'two streams' if two else 'one stream'}"
        constants = dict(TWO=two, LEVELS=True, **head)
        yield name, kernels.forward_kernel, constants, launch.forward
    for gather, reverse in itertools.product((False, True), (False, True)):
        outputs = dict.fromkeys(
            ("TWO", "FULL", "AUG", "LOGPROB", "ENTROPY", "LOGPROB_AUG", "ENTROPY_AUG", "KL"), True
        )
        name = f"dz {'gathered' if gather else 'dense'}{' reverse' if reverse else ''}"
        constants = dict(GATHER=gather, NET=gather, KL_REVERSE=reverse, **outputs, **head)
        yield name, gradients.dz_kernel, constants, launch.dz
    yield "d_hidden", gradients.d_hidden_kernel, {}, launch.d_hidden
    constants = dict(WEIGHT=True, BIAS=True)
    yield "d_weight", gradients.d_weight_kernel, constants, launch.d_weight


FIXED = {
    "targets_ptr": "*i64", "rows_ptr": "*i64", "count_ptr": "*i64", "part_ptr": "*fp32",
    "level_ptr": "*u8", "stats_ptr": "*fp32", "up_ptr": "*fp32", "tile_ptr": "*i64",
    "first_ptr": "*i64", "last_ptr": "*i64", "col_ptr": "*i64", "offset_ptr": "*i64",
    "sums_ptr": "*fp32", "dw_ptr": "*fp32", "db_ptr": "*fp32", "temperature": "fp32",
    "softcap": "fp32",
}  # fmt: skip
UNIT_STRIDES = ("stride_xd", "stride_ad", "stride_wd", "stride_od")


def compile_one(kernel, dtype, constants, target, warps, stages):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = constants | {a: 1 for a in UNIT_STRIDES if a in kernel.arg_names}
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = FIXED.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        signature[name] = kind
        # What a launch finds out by itself: allocations and sizes of rows are multiples of 16.
        if kind.startswith("*") or name in (
            "D",
            "stride_xn",
            "stride_an",
            "stride_wv",
            "stride_on",
        ):
            attrs[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
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
    from triton.backends.nvidia.compiler import get_ptxas

    capability = TARGETS[target][1]
    ptxas = get_ptxas(capability)
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(compiled.asm["ptx"])
        command = [ptxas.path, "-v", f"--gpu-name=sm_{capability}{suffix}", str(path)]
        result = subprocess.run(
            [*command, "-o", str(path.with_suffix(".o"))],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = int(re.search(r"Used (\d+) registers", result.stderr)[1])
    spills = int(re.search(r"(\d+) bytes spill stores", result.stderr)[1])
    return {"registers": registers, "spills": spills, "shared": shared}


def measure():
    table = {}
    for name, kernel, dtype, constants, warps, stages, targets in variants():
        for target in targets:
            compiled = compile_one(kernel, dtype, constants, target, warps, stages)
            table[f"{name} {target}"] = resources(compiled, target)
    return table


def main():
    table = measure()
    for name, row in table.items():
        print(f"{name:36s}", *(f"{k} {v:6d}" for k, v in row.items()))
    if "--write" in sys.argv:
        import triton

        content = {"triton": triton.__version__, "kernels": table}
        TABLE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
