"""The launch table of the Triton kernels, and the sweep of block sizes that finds its lines."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "kernels")]

pytest.importorskip("triton")

import gpu_sweep  # noqa: E402

from papo_kernels.triton import launch as triton_launch  # noqa: E402


def test_a_line_of_the_launch_table_serves_its_architecture_and_width_alone(monkeypatch):
    usual = triton_launch.LAUNCHES["any", 2, None]
    line = triton_launch.Launch(*[triton_launch.Blocks(32, 32, 4, 2)] * 4)
    table = triton_launch.LAUNCHES | {("sm_90", 2, True): line}
    monkeypatch.setattr(triton_launch, "LAUNCHES", table)
    device = torch.device("cuda")
    monkeypatch.setattr(triton_launch, "architecture", lambda _: "sm_90")
    assert triton_launch.launch_of(device, 2, 3584) is line
    assert triton_launch.launch_of(device, 2, 2048) is usual
    assert triton_launch.launch_of(device, 4, 3584) is triton_launch.LAUNCHES["any", 4, None]
    monkeypatch.setattr(triton_launch, "architecture", lambda _: "sm_80")
    assert triton_launch.launch_of(device, 2, 3584) is usual


def test_a_candidate_that_does_not_fit_is_a_result(monkeypatch):
    def too_large(*_):
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    monkeypatch.setattr(gpu_sweep, "_seconds", too_large)
    key = ("sm_90", 2, True)
    launch = triton_launch.LAUNCHES["any", 2, None]
    seconds, failure = gpu_sweep._try(None, key, launch, None, "forward")
    assert seconds == float("inf") and failure == "RuntimeError: out of resource: shared memory"
    assert key not in triton_launch.LAUNCHES
