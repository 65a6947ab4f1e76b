"""bench/gpu_train.sh without a GPU: its steps on the CPU, and what becomes of steps that fail."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu_train
from gpu_train import Bench, Step, table
from gpu_train_attention import MOST, attention_errors, tree
from gpu_train_runs import largest_difference

from papo_fast.model import attention
from support.vllm_checks import needs_vllm

ROOT = Path(__file__).parents[1]


def fine(recorder, value):
    recorder.note("value", value)
    recorder.check("error", 1e-3, 1e-2)


def wrong(recorder):
    recorder.check("error", float("nan"), 1e-2)


def in_parts(recorder):
    with recorder.part("first"):
        raise ValueError("the first part is broken")
    with recorder.part("second"):
        recorder.note("second", 2)


def crash(recorder):
    recorder.note("before", 1)
    os.kill(os.getpid(), signal.SIGKILL)


def hang(recorder):
    time.sleep(60)


def absent(recorder):
    from gpu_train_record import LeftOut

    raise LeftOut("a package is missing")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    module = types.ModuleType("steps_of_this_test")
    for function in (fine, wrong, in_parts, crash, hang, absent):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Bench(tmp_path, "cpu", 100.0, 3, tmp_path / "scratch")


def run(bench, monkeypatch, *steps):
    bench.scratch.mkdir(exist_ok=True)
    made = [Step(name, "steps_of_this_test", name, *more) for name, *more in steps]
    monkeypatch.setattr(gpu_train, "STEPS", tuple(made))
    bench.run(made)
    saved = json.loads((bench.out / "gpu_train.json").read_text())
    return {s["name"]: s for s in saved["steps"]}


def test_no_step_stops_another(bench, monkeypatch):
    start = time.perf_counter()
    found = run(
        bench,
        monkeypatch,
        ("crash", 30.0),
        ("hang", 1.0, 0.0),
        ("wrong", 30.0),
        ("in_parts", 30.0),
        ("absent", 30.0),
        ("fine", 30.0, 10.0, True, (5,)),
    )
    assert {name: s["outcome"] for name, s in found.items()} == {
        "crash": "failed",
        "hang": "failed",
        "wrong": "failed",
        "in_parts": "failed",
        "absent": "left out",
        "fine": "ok",
    }
    assert "signal 9" in found["crash"]["errors"][0]
    assert found["crash"]["numbers"] == {"before": 1}, "what was known before the crash is kept"
    assert "limit of 1 s" in found["hang"]["errors"][0] and time.perf_counter() - start < 30
    assert "error is nan, more than 0.01" in found["wrong"]["errors"]
    assert found["in_parts"]["numbers"] == {"second": 2}
    assert "the first part is broken" in found["in_parts"]["errors"][0]
    assert found["absent"]["remarks"] == ["a package is missing"]
    assert found["fine"]["numbers"] == {"value": 5} and found["fine"]["checks"][0]["ok"]
    text = table(bench.content)
    assert "| crash | failed |" in text and "- error: 0.001 (at most 0.01)" in text
    assert "===== crash" in (bench.out / "gpu_train.log").read_text()


def test_what_the_time_does_not_suffice_for_is_left_out(bench, monkeypatch):
    bench.budget = 5.0
    found = run(bench, monkeypatch, ("fine", 30.0, 2.0, False, (1,)), ("wrong", 30.0, 50.0))
    assert found["fine"]["outcome"] == "ok"
    assert found["wrong"]["outcome"] == "left out" and "s were left" in found["wrong"]["remarks"][0]


def test_attention_that_sees_too_much_is_found():
    segments = tree((9, 5), (4, 1, 7))
    good = attention_errors(segments, 16, (4, 2), torch.float32, "cpu", attention._sdpa)
    assert max(good.values()) < MOST[torch.float32]

    def without_branches(q, k, v, layout, scale):
        total = sum(s.length for s in layout.segments)
        return attention._sdpa(q, k, v, attention.TreeLayout([attention.Segment(0, total)]), scale)

    bad = attention_errors(segments, 16, (4, 2), torch.float32, "cpu", without_branches)
    assert min(bad.values()) > 0.01


def test_runs_are_compared_without_their_times():
    row = {"step": 1, "seconds": 1.0, "update_seconds": 2.0, "loss": 0.5, "alarms": []}
    later = row | {"seconds": 9.0, "update_seconds": 8.0}
    assert largest_difference([row], [later]) == (0.0, None)
    worst, where = largest_difference([row], [later | {"loss": 0.4}])
    assert worst == pytest.approx(0.2) and where == "step 1, loss: 0.5 and 0.4"
    assert largest_difference([row], [later | {"alarms": ["KL"]}])[0] == 1.0


def test_unknown_steps_and_a_missing_folder_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_train.main([str(tmp_path), "--steps", "atention"])
    assert "names atention: known are doctor, attention" in capsys.readouterr().err
    done = subprocess.run(["bash", str(ROOT / "bench" / "gpu_train.sh")], capture_output=True)
    assert done.returncode == 2 and b"usage:" in done.stderr


def steps_on_the_cpu(folder, names):
    """What a run of these steps leaves behind, by name."""
    words = [str(folder), "--device", "cpu", "--seconds", "900", "--steps", ",".join(names)]
    environment = os.environ | {"PYTHON": sys.executable, "WHEELS": str(folder / "none")}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_train.sh"), *words],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = f"{1 + len(names)} ok, 0 failed, 0 left out"
    assert "no wheels in" in done.stdout and said in done.stdout
    saved = json.loads((folder / "gpu_train.json").read_text())
    steps = {s["name"]: s for s in saved["steps"]}
    assert list(steps) == ["machine", *names]
    errors = {name: {c["name"]: c["value"] for c in s["checks"]} for name, s in steps.items()}
    return steps, errors


@pytest.mark.slow
def test_a_step_runs_on_the_cpu(tmp_path):
    _, errors = steps_on_the_cpu(tmp_path, ["attention"])
    assert set(errors["attention"]) >= {"autocast"} and len(errors["attention"]) == 9


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_other_steps_run_on_the_cpu(tmp_path):
    steps, errors = steps_on_the_cpu(tmp_path, ["update-qwen3_vl", "fsdp", "rollout"])
    # bfloat16 must show: a device that silently computed in float32 would pass every bound
    update = steps["update-qwen3_vl"]["numbers"]
    assert 1e-3 < update["ours bfloat16: gradients"]["mlp"] < 0.1
    assert 0 < update["ours float32: gradients"]["mlp"] < 1e-4
    assert {"lm_head", "visual", "embed_tokens"} <= set(update["official float32: gradients"])
    assert errors["fsdp"]["weights after a checkpoint"] == 0
    assert "sharded, offload and checkpointing: loss" in errors["fsdp"]
    assert 0 < steps["rollout"]["numbers"]["qwen3_vl float32: mean difference"] < 1e-4


@needs_vllm
@pytest.mark.xdist_group("vllm")  # one process, one engine at a time
@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_step_with_a_server_runs_on_the_cpu(tmp_path):
    steps, errors = steps_on_the_cpu(tmp_path, ["servers"])
    assert errors["servers"] == {"disk: weights unlike those of files": 0}
    assert steps["servers"]["numbers"]["disk: responses sampled with them"] == 8
