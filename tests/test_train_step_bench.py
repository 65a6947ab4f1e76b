"""What bench/train_step.py rests on: ways that agree, counts that are right, a report of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import train_step
import train_step_case
import train_step_report
from train_step_case import Size, make_case, write_checkpoint
from train_step_meter import counted
from train_step_trl import TRL
from train_step_ways import OURS, PADDED, UNSHARED, WAYS

SMALL = Size(64, 2, 2, 96, (8, 8), 6, 8, 200, 0.5)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tmp_path_factory.mktemp("train_step")
    write_checkpoint(SMALL, path)
    return make_case(SMALL, 5, path)


def way_called(name, objective=None):
    return next(w for w in WAYS if w.name == name and objective in (None, w.objective))


def test_all_ways_of_one_objective_give_the_same_loss_and_gradients(case):
    pytest.importorskip("trl", reason="pip install -e '.[bench]'")
    want, errors = {}, {}
    for way in [*WAYS, TRL()]:
        record, found = train_step.measured_once(way, case, want.get(way.objective))
        want.setdefault(way.objective, found)
        errors[way.objective, way.name] = record["gradient_error"]
    print(max(errors.items(), key=lambda e: e[1]))
    assert set(want) == {"both", "official", "grpo"}
    assert max(errors.values()) < 1e-5


def test_a_way_with_other_gradients_stops_the_benchmark(case):
    way = way_called(OURS["grpo"])
    loss = way(case)
    want = loss, {n: p.grad * 1.001 for n, p in case.policy.model.named_parameters()}
    with pytest.raises(SystemExit, match="nothing was timed"):
        train_step.measured_once(way, case, want)


@pytest.mark.parametrize("way", [WAYS[0], way_called("+ prompts once", "both")])
def test_counted_flops_are_those_that_torch_counts(case, way):
    counter = FlopCounterMode(display=False)
    with counter, counted([case.policy.model, case.reference.model]) as work:
        way(case)
    operations = counter.get_flop_counts()["Global"]
    want = sum(n for name, n in operations.items() if "attention" not in str(name))
    got = sum(work.flops.values()) - work.attention
    print("FLOPs counted by torch", want, "from the shape", got)
    assert got == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("shared", [True, False])
def test_every_token_is_counted_once_for_each_pass_that_it_is_in(case, shared):
    with counted([case.policy.model, case.reference.model]) as work:
        way_called(OURS["both"] if shared else UNSHARED)(case)
    copies = 1 if shared else 5
    passes, prompts = 3, 2  # reference, both streams
    assert work.tokens["vision"] == passes * prompts * copies * SMALL.image
    prompt_tokens = prompts * copies * (SMALL.image + SMALL.text)
    assert work.tokens["language"] == passes * (prompt_tokens + case.tokens)
    assert work.tokens["lm_head"] == passes * case.tokens


def test_padding_is_counted(case):
    with counted([case.policy.model, case.reference.model]) as work:
        way_called(PADDED["official"])(case)
    passes = 4  # old, reference, corrupted, update
    bare = 10 * (SMALL.image + SMALL.text) + case.tokens
    assert work.tokens["language"] > passes * bare
    assert work.tokens["lm_head"] == work.tokens["language"]


def test_the_policy_is_one_that_a_sparse_backward_may_meet(case):
    about = train_step.describe_policy(case)
    print(about)
    assert 0.1 < about["entropy"] < 2
    assert 0.001 < about["kl_prcp"] < 2


def test_small_models_have_the_shares_of_the_large_one():
    want = train_step_case.shares_of_3b()
    for size in train_step_case.SIZES.values():
        got = train_step_case.shares(train_step_case.model_config(size), size)
        print(got, want)
        assert all(abs(got[part] - want[part]) < 0.06 for part in want)


@pytest.mark.slow
def test_a_run_ends_in_tables_a_picture_and_a_section(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="pip install -e '.[bench]'")
    monkeypatch.setitem(train_step_case.SIZES, "quick", SMALL)
    monkeypatch.delitem(train_step_case.PROMPTS, 16)
    out = tmp_path / "result.json"
    train_step.main(["--rounds", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    for way in [*WAYS, TRL()]:
        assert way.name[:30] in printed
    for record in content["records"]:
        assert record["seconds"] > 0 and record["peak_bytes"] > 0
    assert "/" not in content["machine"]["processor"] and str(tmp_path) not in out.read_text()
    section = train_step_report.page_section(content)
    for target, g, ratio, _, _, met in train_step_report.ratios(content):
        assert f"{ratio:.2f}" in section
        if met is not None:
            assert met == ((ratio >= target.bound[g]) == target.at_least)
    train_step_report.show(content, Console(width=128))
    train_step_report.picture(content, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_page_says_what_the_results_say():
    content = json.loads(train_step_report.RESULT.read_text())
    page = train_step_report.PAGE.read_text()
    shown = page.split(train_step_report.BEGIN + "\n")[1].split(train_step_report.END)[0]
    assert shown == train_step_report.page_section(content)


def test_options_that_make_no_sense_are_refused(capsys):
    with pytest.raises(SystemExit):
        train_step.main(["--rounds", "0"])
    assert "--rounds at least 1" in capsys.readouterr().err
