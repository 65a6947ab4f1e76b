"""Compiles the Triton kernels for GPUs that are not here and reports what they use.

`python tests/kernels/aot.py` prints the table; `--write` also makes it the committed one.
"""

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
    """(name, kernel, dtype, constants, warps, stages) of every shape that is launched."""
    from papo_kernels import triton_gradients, triton_kernels
    from papo_kernels import triton_launch as host

    for size, dtype in ((2, "bf16"), (4, "fp32")):
        rows, hidden, weight = host.BLOCKS[size], host.D_HIDDEN[size], host.D_WEIGHT[size]
        block = dict(BLOCK_N=rows.n, BLOCK_V=rows.v, BLOCK_D=rows.d, UPCAST=False)
        head = dict(HAS_BIAS=False, CAP=False)
        for two in (False, True):
            yield (
                f"forward {dtype} {'two streams' if two else 'one stream'}",
                triton_kernels.forward_kernel,
                dtype,
                dict(TWO=two, LEVELS=True, **head, **block),
                rows.warps,
                rows.stages,
            )
        dz = host.DZ[size]
        block = dict(BLOCK_N=dz.n, BLOCK_V=dz.v, BLOCK_D=dz.d, UPCAST=False)
        for gather in (False, True):
            outputs = dict.fromkeys(
                ("TWO", "FULL", "AUG", "LOGPROB", "ENTROPY", "LOGPROB_AUG", "ENTROPY_AUG", "KL"),
                True,
            )
            yield (
                f"dz {dtype} {'gathered' if gather else 'dense'}",
                triton_gradients.dz_kernel,
                dtype,
                dict(GATHER=gather, NET=gather, **outputs, **head, **block),
                dz.warps,
                dz.stages,
            )
        block = dict(BLOCK_N=host.TILE, BLOCK_V=hidden.v, BLOCK_D=hidden.d, UPCAST=False)
        yield (
            f"d_hidden {dtype}",
            triton_gradients.d_hidden_kernel,
            dtype,
            block,
            hidden.warps,
            hidden.stages,
        )
        block = dict(
            BLOCK_N=host.TILE,
            BLOCK_V=dz.v,
            BLOCK_D=weight.d,
            UPCAST=False,
            WEIGHT=True,
            BIAS=True,
        )
        yield (
            f"d_weight {dtype}",
            triton_gradients.d_weight_kernel,
            dtype,
            block,
            weight.warps,
            weight.stages,
        )


FIXED = {
    "y_ptr": "*i64", "rows_ptr": "*i64", "count_ptr": "*i64", "part_ptr": "*fp32",
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
    for name, kernel, dtype, constants, warps, stages in variants():
        for target in TARGETS:
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
