"""The Triton backend without a GPU: interpreted against float64, and compiled ahead of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Those of one line share a process, which takes seconds to start.
SUITES = (
    ("test_account.py", "test_contract.py", "test_properties.py"),
    ("test_edges.py", "test_option_values.py", "test_sparse.py", "test_strides.py"),
    ("test_groups.py", "test_reverse.py", "test_saved.py", "test_weight_sum.py"),
    ("test_lists.py", "test_launches.py"),
)


@pytest.mark.skipif(INTERPRETED, reason="runs the suite that this process is part of")
@pytest.mark.parametrize("suites", SUITES, ids=" ".join)
def test_suites_pass_in_the_interpreter(suites):
    """The same tests as of the other backends, in a process that interprets the kernels."""
    files = [str(HERE / suite) for suite in suites]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    print(result.stdout[-4000:], result.stderr[-2000:])
    assert result.returncode == 0
    assert " passed" in result.stdout


@pytest.mark.skipif(INTERPRETED, reason="the compiler does not run in an interpreting process")
def test_kernels_compile_for_every_gpu_and_use_no_more_than_before():
    import aot

    committed = json.loads(aot.TABLE.read_text())
    found = aot.measure()
    assert found.keys() == committed["kernels"].keys()
    for name, row in found.items():
        print(f"{name:36s}", *(f"{k} {v:6d}" for k, v in row.items()))
    if triton.__version__ != committed["triton"]:
        return  # Another compiler allocates differently; that it compiles is then what is shown.
    worse = {
        name: (row, committed["kernels"][name])
        for name, row in found.items()
        if any(row[k] > committed["kernels"][name][k] for k in row)
    }
    assert not worse, worse


@pytest.mark.skipif(INTERPRETED, reason="the compiler does not run in an interpreting process")
@pytest.mark.parametrize(("name", "most"), [("stats two streams", 42), ("levels two streams", 30)])
def test_a_pair_of_logits_takes_few_instructions(name, most):
    """Of a Hopper GPU. With a running maximum statistics took 72 to 94, and half the speed."""
    import aot

    from papo_kernels.triton.stats_kernels import WIDE

    [(kernel, c, types, warps)] = [rest for n, *rest in aot.variants() if n == name]
    compiled = aot.compile_one(kernel, c, types, "sm_90", warps)
    pairs = c["STEPS"] * c["LANES"] * WIDE.value if "STEPS" in c else c["TILE"] * c["BLOCK_V"]
    found = aot.longest_loop(compiled, "sm_90") * 32 * warps / pairs
    print(f"  {name}: {found:.1f} instructions a pair")
    assert found <= most


@pytest.mark.skipif(INTERPRETED, reason="the compiler does not run in an interpreting process")
def test_the_cost_model_counts_the_instructions_that_loops_have():
    """As this compiler makes them: within a tenth of those that `bench/cost_model.py` reads."""
    import aot

    committed = json.loads(aot.LOOPS.read_text())
    if triton.__version__ != committed["triton"]:
        pytest.skip(f"the counts are of Triton {committed['triton']}")
    longest = {name: counts[0] for name, counts in aot.loops().items()}
    assert longest == pytest.approx({k: v[0] for k, v in committed["kernels"].items()}, rel=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_matches_float64(dtype):
    from kernel_oracle import (
        GRADS,
        Case,
        Oracle,
        check,
        gradient_error,
        make_case,
        random_upstream,
        statistic_error,
    )

    from papo_kernels import token_stats

    case = make_case(300, 136, 5003, peak=6, ignored=0.2, dtype=dtype, bias=True, softcap=20.0)
    upstream = random_upstream(case)
    oracle = Oracle(case)
    want, exact = oracle.statistics(), oracle.gradients(upstream)
    rounded = oracle.gradients(upstream, rounded=dtype)
    on_gpu = Case(
        *(x.cuda() for x in (case.hidden, case.weight, case.targets, case.aug_hidden, case.bias)),
        softcap=20.0,
    )
    stats = on_gpu.call(token_stats, backend="triton")
    bound = 1e-5 if dtype == torch.float32 else 1e-4
    check({o: statistic_error(getattr(stats, o).cpu(), want[o]) for o in case.outputs}, bound)
    upstream = {o: u.cuda() for o, u in upstream.items()}
    got = on_gpu.gradients(token_stats, upstream, backend="triton", grad_budget=0.0)
    bounds = {g: max(1e-5, 1.5 * gradient_error(rounded[g], exact[g])) for g in GRADS}
    check({g: gradient_error(got[g].cpu(), exact[g]) for g in got}, bounds)


@pytest.mark.skipif(INTERPRETED, reason="changes settings that the suites go by")
def test_mixed_dtypes_are_said_once(caplog):
    from papo_kernels.rows import Options, make_call
    from papo_kernels.triton.launch import kernel_operands

    options = Options(1.0, None, -100, 0.0, "triton", "", True, False, "call")
    hidden, weight = torch.randn(2, 3).bfloat16(), torch.randn(5, 3)
    for _ in range(2):
        call = make_call(hidden, None, weight, None, torch.tensor([0, 1]), options)
        assert kernel_operands(call).full.dtype == torch.float32
    (message,) = [r.getMessage() for r in caplog.records if "dtype" in r.getMessage()]
    assert "are bfloat16, float32;" in message and "to float32" in message


@pytest.mark.skipif(INTERPRETED, reason="needs no kernel")
def test_float16_gradients_are_scaled_into_its_range():
    """Of what float16 holds, the largest upstream gradient is brought to 1/2 to 1."""
    from papo_kernels.rows import Options, make_call, make_upstream
    from papo_kernels.triton.backward import _scale

    options = Options(1.0, None, -100, 0.0, "triton", "", True, False, "call")
    for dtype in (torch.float16, torch.bfloat16):
        states = torch.randn(4, 3).to(dtype)
        call = make_call(states, states, states, None, torch.arange(4), options)
        for size in (1 / 65_536, 3e-3, 65_536.0):
            given = torch.tensor([0.0, -size, size / 8, 0.0])
            scale = _scale(call, make_upstream(given, None, None, None, given / 4, None))
            if dtype == torch.bfloat16:
                assert scale == 1.0
                continue
            assert 0.5 <= size * float(scale) < 1
            assert float(scale).hex().startswith("0x1.0000")  # rounds nothing
