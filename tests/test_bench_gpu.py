"""bench/gpu.sh without a GPU: its checks, its budgets, its launch table, and a run of it all."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from papo_kernels import token_stats

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "kernels")]

pytest.importorskip("triton")

import gpu  # noqa: E402
import gpu_check  # noqa: E402
import gpu_sweep  # noqa: E402

from papo_kernels.triton import launch as triton_launch  # noqa: E402


@pytest.fixture
def run(tmp_path):
    made = gpu.Run(SimpleNamespace(out=tmp_path, device="cpu", quick=True, seconds=1e-6))
    made.section("correctness")
    return made


def by_torch(scale):
    """token_stats as the Triton kernels would be called, by a backend that runs here."""

    def call(*args, backend, **options):
        assert backend == "triton"
        stats = token_stats(*args, backend="torch", **options)
        return stats._replace(entropy=stats.entropy * scale)

    return call


def test_right_kernels_pass_the_check(run, monkeypatch):
    monkeypatch.setattr(gpu_check, "token_stats", by_torch(1.0))
    assert gpu_check.check_kernels(run) == 0
    assert [c["failed"] for c in run.content["correctness"]] == [[]] * 3


def test_wrong_kernels_fail_it(run, monkeypatch):
    monkeypatch.setattr(gpu_check, "token_stats", by_torch(1.01))
    assert gpu_check.check_kernels(run) >= 3
    assert all("entropy" in c["failed"] for c in run.content["correctness"])


def test_what_the_time_does_not_suffice_for_is_said_and_kept(run, monkeypatch):
    monkeypatch.setattr(gpu_check, "token_stats", by_torch(1.0))
    small = dict.fromkeys(("first", "second"), gpu_check.TINY)
    monkeypatch.setattr(gpu_check, "CASES", small)
    run.tiny = False
    gpu_check.check_kernels(run)
    saved = json.loads((run.out / "gpu.json").read_text())
    dtypes = {c["case"].split(", ")[-1] for c in saved["correctness"]}
    assert dtypes == {"float32", "bfloat16", "float16"}, "every dtype is checked, however slow"
    assert {x["reason"] for x in saved["left_out"]} == {"out of time"}
    assert len(saved["left_out"]) == 3


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
    seconds, failure = gpu_sweep._try(key, launch, None, "forward", None)
    assert seconds == float("inf") and failure == "RuntimeError: out of resource: shared memory"
    assert key not in triton_launch.LAUNCHES


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = start(tmp_path)
    assert done.returncode == 1
    assert "torch sees no GPU here; --device cpu shows that the program works" in done.stderr


def test_the_folder_must_be_given():
    done = subprocess.run(["bash", str(ROOT / "bench" / "gpu.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr


@pytest.mark.slow
def test_all_of_it_runs_interpreted_and_its_winners_can_be_pasted(tmp_path):
    done = start(tmp_path, "--device", "cpu", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert len(saved["correctness"]) == 3 and not any(c["failed"] for c in saved["correctness"])
    ways = {r["way"] for r in saved["times"]}
    assert {"two bare matmuls", "forward, 2 streams", "forward, 1 stream", gpu.OURS} <= ways
    ours = next(r for r in saved["times"] if r["way"] == gpu.OURS)
    assert ours["errors"]["dW"] < 1e-2 and ours["seconds"] > 0
    assert {s["kernel"] for s in saved["sweep"] if "kernel" in s} == set(gpu_sweep.JUDGED_BY)
    assert "| / six matmuls |" in (tmp_path / "table.md").read_text()
    pasted = gpu_sweep.lines(saved).split("\n", 1)[1]
    table = ast.parse("{" + pasted + "}", mode="eval").body
    assert [ast.literal_eval(k) for k in table.keys] == [tuple(saved["winners"][0]["key"])]
    assert pasted in done.stdout


def start(out, *arguments, **variables):
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), str(out), *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
