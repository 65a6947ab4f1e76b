"""What the benchmarks rest on: inputs, memory, errors, and the tables made of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import plan  # noqa: E402
import report  # noqa: E402
import states  # noqa: E402
from measure import Exact, PeakMemory  # noqa: E402
from ways import DENSE, ESSENTIAL, FLOOR, OURS, WAYS, WHOLE, Case  # noqa: E402

MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
@pytest.mark.parametrize(("count", "each"), [(1, 96 * MIB), (96, MIB), (3000, 32 * 1024)])
def test_peak_memory_is_what_was_allocated(count, each):
    # Freed before the measurement: the heap must not hand it out again unseen.
    old = [torch.ones(each, dtype=torch.uint8) for _ in range(count)]
    del old
    probe = PeakMemory()
    probe.start()
    new = [torch.ones(each, dtype=torch.uint8) for _ in range(count)]
    del new
    assert probe.read() == pytest.approx(count * each, rel=0.03)


@LINUX
def test_peak_memory_of_nothing_is_nothing():
    probe = PeakMemory()
    probe.start()
    assert probe.read() < MIB


@pytest.fixture(scope="module")
def case():
    return Case(states.synthetic(64, 2000, 48, 0.6))


@pytest.mark.parametrize("entropy", [0.3, 0.6, 2.0])
def test_synthetic_states_have_the_entropy_asked_for(entropy):
    made = states.synthetic(256, 4000, 64, entropy)
    assert made.entropy == pytest.approx(entropy, rel=0.05)
    assert made.aug_entropy > 0 and made.kl_prcp > 0
    log_p = (made.hidden.double() @ made.weight.double().T).log_softmax(-1)
    sampled = -log_p.gather(1, made.targets[:, None]).mean()
    assert sampled.item() == pytest.approx(entropy, rel=0.35), "targets are samples of the policy"


def test_a_wider_model_has_the_same_logits():
    made = states.synthetic(16, 500, 24, 0.6)
    wide = states.widen(made, 100)
    assert wide.weight.shape == (500, 100)
    torch.testing.assert_close(
        wide.hidden @ wide.weight.T, made.hidden @ made.weight.T, atol=1e-4, rtol=1e-5
    )


def test_states_say_what_is_wrong_with_a_request():
    with pytest.raises(ValueError, match="no states are called 'gpt'; known: smollm2"):
        states.load("gpt", 8)
    with pytest.raises(ValueError, match="has 8 rows; 9 were asked for"):
        states.take(states.synthetic(8, 100, 16), 9)


QUICK_TO_START = [w for w in WAYS if not WAYS[w].compiles or w == OURS]


@pytest.mark.parametrize("name", QUICK_TO_START)
def test_a_way_computes_what_it_is_said_to(case, name):
    way = WAYS[name]
    if way.cannot(case):
        pytest.skip(way.cannot(case))
    if way.upstream is None:
        assert way(case) == ({}, ())
        return
    errors, kept = Exact(case).errors(way)
    print(name, errors, kept)
    assert {"dH", "dH_aug", "dW"} <= errors.keys()
    sparse = name == OURS
    for what, error in errors.items():
        assert error < (1e-2 if sparse and what.startswith("d") else 3e-5), (what, errors)


def test_an_error_is_noticed(case):
    wrong = WAYS[DENSE]
    broken = type(wrong)(lambda c: _scaled(wrong(c)), "", upstream="papo")
    errors, _ = Exact(case).errors(broken)
    assert errors["dW"] == pytest.approx(0.01, rel=0.01)
    assert errors["logprobs"] > 1e-3


def _scaled(results):
    outputs, grads = results
    return {o: 1.01 * x for o, x in outputs.items()}, [1.01 * g for g in grads]


@pytest.mark.parametrize("size", plan.MINUTES)
def test_what_matters_most_is_measured_first(size):
    order = plan.make_plan(size)
    assert len(set(order)) == len(order)
    first = [(s, w) for s, w in order if s.states == "smollm2-0.6"][: len(ESSENTIAL)]
    assert tuple(w for _, w in order[: len(ESSENTIAL)]) == ESSENTIAL
    assert [s for s, _ in first] == [order[0][0]] * len(ESSENTIAL)
    # Whatever is timed has the matmuls of the same inputs to be divided by.
    for spec, name in order:
        assert (spec, FLOOR) in order[: order.index((spec, name)) + 1]
    if size == "full":
        wanted = {(width, d) for width in (576, 3584) for d in ("float32", "bfloat16")}
        early = {(s.width, s.dtype) for s, _ in order[: 4 * len(ESSENTIAL)] if s.rows == 2048}
        assert early == wanted


def made_up(way, seconds, mebibytes, rows=512):
    return {
        "states": "smollm2-0.6", "rows": rows, "width": 576, "dtype": "float32", "vocab": 49152,
        "entropy": 0.58, "aug_entropy": 0.9, "kl_prcp": 0.7, "way": way, "seconds": seconds,
        "extra_bytes": mebibytes * MIB, "errors": {"logprobs": 2e-6, "dH": 1e-3, "dW": 2e-3},
        "kept": None,
    }  # fmt: skip


@pytest.fixture
def content():
    records = [made_up(FLOOR, 2.0, 0), made_up(OURS, 1.5, 50), made_up(WHOLE, 6.0, 1000)]
    records += [r | {"rows": 1024, "seconds": 2 * r["seconds"]} for r in records]
    missing = made_up("Liger GRPO", 0, 0) | {"reason": "liger_kernel is not installed"}
    ways = {n: {"computes": w.computes, "logits": w.logits} for n, w in WAYS.items()}
    machine = {"processor": "a processor", "threads": 2, "torch": "2.13.0"}
    return {
        "size": "full", "machine": machine, "error_rows": 256, "ways": ways, "records": records,
        "not_run": [missing],
    }  # fmt: skip


def test_tables_divide_by_the_matmuls_and_by_whole_logits(content):
    first, second = (report.table(r) for r in report.cases(content).values())
    assert first != second
    cells = {
        row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]]
        for row in first.splitlines()[2:]
    }
    assert list(cells) == [FLOOR, f"**{OURS}**", WHOLE]
    assert cells[f"**{OURS}**"][:5] == ["1.500", "0.75", "0.25", "50", "5.0%"]
    assert cells[WHOLE][:5] == ["6.000", "3.00", "1.00", "1000", "100.0%"]


def test_a_peer_that_did_not_run_is_named_with_the_reason(content):
    assert "| Liger GRPO | **not run**: liger_kernel is not installed" in report.tables(content)


def test_only_the_pages_section_is_replaced(content):
    page = f"above\n{report.START}\nold\n{report.END}\nbelow\n"
    text = report.into_page(report.section(content, []), page)
    assert text.startswith(f"above\n{report.START}\n## ")
    assert text.endswith(f"\n{report.END}\nbelow\n")
    assert "old" not in text and "N = 1024" in text and "N = 512" not in text
    with pytest.raises(ValueError, match="lacks the markers"):
        report.into_page("new", "no markers")


def test_the_page_says_what_the_results_say():
    page, results = report.PAGE.read_text(), BENCH / "results" / "cpu" / "quick.json"
    report.into_page("", page)
    images = [report.IMAGES / name for name in ("kernels_rows.png", "kernels_entropy.png")]
    if report.into_page(report.section(json.loads(results.read_text()), images), page) != page:
        changed = subprocess.check_output(["git", "status", "--porcelain", results], cwd=BENCH)
        # `make bench` writes there, and is no reason for red tests
        assert changed, "the page is not that of the results: bench/report.py --write"
        pytest.skip("measured anew here; `python bench/report.py FILE --write` makes the page")


def test_plots_are_drawn_from_the_results(content, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    assert [p.name for p in report.plots(content)] == ["kernels_rows.png"]
    other = [r | {"states": "smollm2-own", "entropy": 2.0, "kept": 0.5} for r in content["records"]]
    content["records"] = [r | {"kept": 0.1} for r in content["records"]] + other
    drawn = report.plots(content)
    assert [p.name for p in drawn] == ["kernels_rows.png", "kernels_entropy.png"]
    assert all(p.stat().st_size > 10_000 for p in drawn)


def test_results_are_written_after_each(tmp_path, case):
    book = plan.Book("quick", tmp_path / "new" / "quick.json", minutes=1)
    spec = plan.Spec("synthetic-0.6", 64, 48, "float32", 2000)
    book.open(spec)
    assert book.errors(WAYS[FLOOR]) == ({}, None)
    book.add(spec, OURS, [0.2, 0.1], 7, {"dW": 1e-3}, 0.5)
    assert json.loads(book.path.read_text())["records"][0]["seconds"] == 0.1
    book.skip(spec, "Liger GRPO", "out of time")
    kept = json.loads(book.path.read_text())
    assert kept["not_run"][0]["reason"] == "out of time"
    text = book.path.read_text()
    assert "/home" not in text and "/work" not in text and "hostname" not in text
    assert not book.out_of_time()
    assert plan.Book("quick", book.path, minutes=0).out_of_time()
