"""The sweep of launch sizes that `bench/gpu.sh` ends with."""

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "kernels")]

pytest.importorskip("triton")

import gpu_sweep  # noqa: E402

from papo_kernels.triton import launch  # noqa: E402


@pytest.fixture
def run():
    kept = []
    return SimpleNamespace(
        attempt=lambda what, function: function(),
        add=lambda section, record: kept.append((section, record)),
        kept=kept,
    )


def test_a_candidate_that_does_not_fit_is_a_result(run, monkeypatch):
    def too_large(*_):
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    monkeypatch.setattr(gpu_sweep, "_seconds", too_large)
    usual = launch.LAUNCHES["stats"]
    assert gpu_sweep._try(run, None, "stats", usual | {"STEPS": 64}, "forward") == float("inf")
    ((section, record),) = run.kept
    assert section == "sweep" and record["seconds"] is None
    assert record["failure"] == "RuntimeError: out of resource: shared memory"
    assert launch.LAUNCHES["stats"] is usual


def test_every_candidate_names_sizes_that_its_kernel_has():
    for kernel, (_, candidates) in gpu_sweep.CANDIDATES.items():
        for sizes in candidates:
            assert sizes.keys() <= launch.LAUNCHES[kernel].keys(), kernel
            assert sizes != launch.LAUNCHES[kernel]


def test_a_constant_is_what_it_was_after_it_was_tried():
    for constant in gpu_sweep.CONSTANTS:
        before = getattr(constant.module, constant.name)
        assert before not in constant.tried
        with contextlib.suppress(KeyError), gpu_sweep._changed(constant, constant.tried[0]):
            assert getattr(constant.module, constant.name) == constant.tried[0]
            raise KeyError
        assert getattr(constant.module, constant.name) == before


def test_a_winner_can_be_pasted_into_the_table():
    sizes = {"STEPS": 4, "LANES": 512, "num_warps": 4}
    line = gpu_sweep._line("stats", sizes)
    assert eval(f"{{{line.replace(': dict', ':dict')}}}") == {"stats": sizes}
