"""bench/gpu.sh without a GPU: its checks, its guards, its launch table, and a run of it all."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from papo_kernels import token_stats

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "kernels")]

pytest.importorskip("triton")

import carry_states  # noqa: E402
import gpu  # noqa: E402
import gpu_check  # noqa: E402
import gpu_run  # noqa: E402
import gpu_sweep  # noqa: E402
import gpu_table  # noqa: E402
import gpu_tools  # noqa: E402
import states  # noqa: E402
import ways  # noqa: E402


@pytest.fixture
def run(tmp_path):
    return gpu_run.Run(tmp_path, "first", time.monotonic() + 1000, "cpu")


def by_torch(scale):
    """token_stats as the Triton kernels would be called, by a backend that runs here."""

    def call(*args, backend, **options):
        assert backend == "triton"
        stats = token_stats(*args, backend="torch", **options)
        return stats._replace(entropy=stats.entropy * scale)

    return call


def test_wrong_kernels_fail_and_the_next_checks_run(run, monkeypatch):
    monkeypatch.setattr(gpu_check, "token_stats", by_torch(1.01))
    gpu_check.first(run)
    saved = json.loads((run.path).read_text())
    wrong = [c for c in saved["checks"] if "entropy" in c["failed"]]
    assert len(wrong) == 6 and len(saved["checks"]) == 9
    assert "**odd sizes, ignored rows, float32: entropy" in gpu_table.table(saved)


def test_an_exception_is_a_failure_and_the_next_item_runs(run):
    def out_of_resources():
        raise RuntimeError("out of resource: shared memory")

    assert run.attempt("first", out_of_resources) is None
    assert run.attempt("second", lambda: 2) == 2
    assert run.attempt("a peer", out_of_resources, optional=True) is None
    saved = json.loads(run.path.read_text())
    assert [(f["what"], f["error"]) for f in saved["failures"]] == [
        ("first", "RuntimeError: out of resource: shared memory")
    ]
    assert [x["what"] for x in saved["left_out"]] == ["a peer"]


def test_a_broken_context_ends_the_process_and_the_error_is_kept(run, monkeypatch):
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    run.interpreted = False
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(gpu_run.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        run.attempt("a kernel", lambda: None)
    assert ended.value.code == gpu_run.BROKEN
    saved = json.loads(run.path.read_text())
    assert "illegal memory access" in saved["failures"][0]["error"]
    assert saved["current"] is None and saved["tried"] == {"first": ["a kernel"]}


def test_what_the_time_does_not_suffice_for_is_said_and_kept(run):
    run.ends = 0
    run.check("late", lambda: {"error": (1, 0)})
    saved = json.loads(run.path.read_text())
    assert [(x["what"], x["reason"]) for x in saved["left_out"]] == [("late", "out of time")]
    assert saved["checks"] == []


def test_nan_is_an_error(run):
    run.judge("some", {"entropy": (float("nan"), 1e-5), "kl_prcp": (1e-6, 1e-5)})
    assert json.loads(run.path.read_text())["checks"][0]["failed"] == ["entropy"]


DYING = """
import os, signal, time
import gpu_run

def section(run):
    gpu_run.ITEM_SECONDS = {"cpu": 1.0}
    shared = run.attempt("states", lambda: 0, again=True)
    run.attempt("breaks", lambda: os._exit(9))
    run.attempt("crashes", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    run.attempt("hangs", lambda: time.sleep(300))
    run.judge("after", {"error": (shared, 0)})

def overruns(run):
    run.judge("in time", {"error": (0, 0)})
    time.sleep(300)

def ordinary(run):
    run.judge("the next section", {"error": (0, 0)})
"""


@pytest.mark.slow
def test_what_ends_a_process_costs_one_item(tmp_path, monkeypatch, capfd):
    (tmp_path / "dying.py").write_text(DYING)
    path = f"{tmp_path}:{ROOT / 'bench'}:{os.environ.get('PYTHONPATH', '')}"
    monkeypatch.setenv("PYTHONPATH", path)
    sections = {
        "dying": (0.5, "dying:section"),
        "late": (0.5, "dying:overruns"),
        "next": (0.1, "dying:ordinary"),
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    monkeypatch.setattr(gpu, "GRACE", 1)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    args = SimpleNamespace(out=str(tmp_path), device="cpu", carried="", peers="")
    gpu.Results(tmp_path, fresh=True).write()
    # Far more than the first section needs, so that a busy machine does not decide.
    monkeypatch.setattr(gpu, "ends_of", lambda began, chosen, total: dict(
        zip(chosen, (began + 600, 0, began + 600), strict=True)
    ))  # fmt: skip
    assert gpu.run_all(args, list(sections), 0) == 1
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert [c["what"] for c in saved["checks"]] == ["after", "in time", "the next section"]
    whats = [f["what"] for f in saved["failures"]]
    assert whats == ["breaks", "crashes", "hangs"]
    assert [(x["what"], x["reason"]) for x in saved["left_out"]] == [("the section", gpu.LATE)]
    assert [s["name"] for s in saved["sections"]] == list(sections)
    assert "**hangs: its process: exit status 71**" in (tmp_path / "table.md").read_text()


def test_sections_share_the_seconds_and_the_first_gets_what_it_needs():
    names = list(gpu.SECTIONS)
    ends = gpu.ends_of(1000.0, names, 250)
    assert ends["first"] == 1040 and ends[names[-1]] == pytest.approx(1250)
    assert ends["main"] == pytest.approx(1040 + 210 * 0.22 / 0.9)
    assert gpu.ends_of(0.0, names, 1000)["first"] == pytest.approx(100)
    assert sorted(ends.values()) == list(ends.values())
    assert gpu.ends_of(0.0, ["main", "real"], 100) == {"main": 50, "real": 100}


def test_the_page_names_the_sections_and_their_shares():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \| (\d+) %", page, re.MULTILINE)
    assert named == [(name, f"{100 * share:.0f}") for name, (share, _) in gpu.SECTIONS.items()]
    assert sum(share for share, _ in gpu.SECTIONS.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("tool", "said", "count"),
    [
        ("memcheck", "========= ERROR SUMMARY: 0 errors", 0),
        ("memcheck", "========= Invalid write\n========= ERROR SUMMARY: 3 errors", 3),
        ("racecheck", "========= RACECHECK SUMMARY: 2 hazards displayed (1 error)", 2),
        ("memcheck", "========= Error: Target application terminated", None),
    ],
)
def test_faults_that_a_tool_found_are_counted(tool, said, count):
    summary = gpu_tools.TOOLS[f"compute-sanitizer {tool}"].summary
    assert gpu_tools.faults(said, summary) == count


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = start(tmp_path)
    assert done.returncode == 1
    assert "torch sees no GPU here; --device cpu shows that the program works" in done.stderr


def test_the_folder_must_be_given():
    done = subprocess.run(["bash", str(ROOT / "bench" / "gpu.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr


def test_an_unknown_section_is_refused(tmp_path):
    done = start(tmp_path, "--only", "main,sweeep")
    assert done.returncode == 2
    assert "--only sweeep: expected some of first,main,real" in done.stderr


def interpreted(folder, carried, names, *more):
    """What a run of these sections leaves behind and prints."""
    words = ("--device", "cpu", "--seconds", "1500", "--carried", str(carried), *more)
    done = start(folder, *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    saved = json.loads((folder / "gpu.json").read_text())
    assert [(s["name"], s["ended"]) for s in saved["sections"]] == [(n, "done") for n in names]
    assert gpu_table.failed(saved) == []
    assert "out of time" not in {x["reason"] for x in saved["left_out"]}
    return saved, done.stdout


@pytest.mark.slow
def test_a_section_runs_interpreted(tmp_path, small_carried):
    saved, printed = interpreted(tmp_path, small_carried, ["shapes"], "--only", "shapes")
    timed = {r["way"] for r in saved["times"] if r["seconds"] > 0}
    assert timed >= {ways.OURS, ways.FLOOR, "backward alone"}
    ours = [r for r in saved["times"] if r["way"] == ways.OURS]
    assert all(0 < r["kept"] <= 1 and r["rows"] == r["N"] for r in ours)
    assert (tmp_path / "table.md").read_text() in printed


@pytest.mark.slow
@pytest.mark.exhaustive
def test_all_of_it_runs_interpreted(tmp_path, small_carried):
    saved, printed = interpreted(tmp_path, small_carried, gpu.SECTIONS)
    checked = {c["what"] for c in saved["checks"]}
    assert {f"{case}, float32" for case in gpu_check.CASES} <= checked
    assert {"NaN in other rows, float16", "odd sizes, ignored rows, bfloat16"} <= checked
    names = ("synthetic-0.6", "smollm2-0.6-wide")
    timed = {(r["states"], r["way"]) for r in saved["times"] if r["seconds"] > 0}
    assert timed >= {(s, w) for s in names for w in (ways.OURS, ways.FLOOR, "backward alone")}
    ours = [r for r in saved["times"] if r["way"] == ways.OURS]
    assert all(0 < r["kept"] <= 1 and r["rows"] == r["N"] for r in ours)
    profiled = {p["what"].split(", ")[0] + p["what"].split(":")[-1] for p in saved["profiles"]}
    assert profiled == {f"{s} {way}" for s in names for way in ("forward", "backward")}
    assert all(s["failure"] == "" for s in saved["sweep"])
    assert {s["what"] for s in saved["sweep"]} >= {*gpu_sweep.CANDIDATES, "TILE", "GROUP_ROWS"}
    written = (tmp_path / "table.md").read_text()
    assert "| / six matmuls |" in written and written in printed
    if not saved["winners"]:  # which noise decides here
        return
    pasted = written.split("```python\n")[1].split("```")[0]
    table = ast.parse("{" + pasted + "}", mode="eval").body
    assert [ast.literal_eval(k) for k in table.keys] == [w["kernel"] for w in saved["winners"]]


@pytest.fixture
def small_carried(tmp_path):
    """A file of the form that real states are carried in, with few words."""
    made = states.synthetic(64, 700, 24, 0.6)
    path = tmp_path / "carried.pt"
    carry_states.save(path, [replace(made, name=n) for n in carry_states.NAMES])
    return path


def test_carried_states_are_the_states_but_for_int8_and_bfloat16(small_carried):
    made = states.synthetic(64, 700, 24, 0.6)
    found = carry_states.load(small_carried, "smollm2-1.1")
    assert found.name == "smollm2-1.1" and torch.equal(found.targets, made.targets)
    largest = made.weight.abs().amax(1, keepdim=True)
    assert ((found.weight - made.weight).abs() <= largest / 254 * 1.001).all()
    torch.testing.assert_close(found.hidden, made.hidden, atol=0, rtol=2**-8)
    torch.testing.assert_close(found.aug_hidden, made.aug_hidden, atol=0, rtol=2**-8)


def test_repeated_rows_differ_and_keep_their_order_and_entropy(small_carried):
    few = carry_states.carried(small_carried, "smollm2-0.6", 64, 96, "cpu")
    many = carry_states.carried(small_carried, "smollm2-0.6", 200, 96, "cpu")
    assert many.hidden.shape == (200, 96) and many.weight.shape == (700, 96)
    assert torch.equal(many.targets, few.targets[torch.arange(200) % 64])
    assert len(many.hidden.unique(dim=0)) == 200
    near = (many.hidden[64:128] - many.hidden[:64]).float().norm() / many.hidden[:64].float().norm()
    assert 0 < near < 0.1
    assert many.entropy == pytest.approx(few.entropy, rel=0.1)


def test_the_appended_tail_has_the_mass_that_is_said_and_leaves_the_words_as_they_were():
    made = states.synthetic(64, 700, 24, 0.6)
    wide = carry_states.extend(made, 2000)
    assert wide.name == "synthetic-0.6-wide" and wide.weight.shape == (2000, 25)
    logits = wide.hidden @ wide.weight.T
    torch.testing.assert_close(logits[:, :700], made.hidden @ made.weight.T, atol=1e-4, rtol=1e-4)
    mass = logits.softmax(-1)[:, 700:].sum(1).mean()
    assert mass.item() == pytest.approx(carry_states.TAIL_MASS, rel=0.02)


def test_the_profiler_of_counters_looks_at_our_kernels_alone():
    named = gpu_tools.our_kernels()
    assert "reduce_kernel" not in named and len(named) >= 2
    assert all(name.isidentifier() for name in named)


def start(out, *arguments, **variables):
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), str(out), *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
