"""The comparison: what its arms are, which of their runs are made, and one of them made in full."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import sys

import pytest
from rich.console import Console

from support import TESTS

sys.path.insert(0, str(TESTS.parent))

from bench.evidence import protocol
from bench.evidence.arms import ADDED, ARMS, BASE_OF_ADDED
from bench.evidence.one_run import configure, train
from bench.evidence.outcomes import Outcome, differences
from bench.evidence.protocol import Cell, cells
from bench.evidence.runner import Plan, result_of, work
from papo_fast.digits import warmstart
from papo_fast.rewards.scorer import Scorer
from support.evidence_results import cell, kinds, write


def test_every_arm_has_the_same_budget_and_test_seeds_are_fresh():
    found = list(cells("development", (), (), (), {}))
    budget = {name: sum(c.arm.name == name for c in found) for name in ARMS}
    assert set(budget.values()) == {4 * len(protocol.DEVELOPMENT_SEEDS)}
    assert {c.task for c in found} == {"digits"}
    assert all("--digits.held-out" in c.words for c in found)
    looked_at = {*range(4), *protocol.DEVELOPMENT_SEEDS, *protocol.SWEEP_SEEDS}
    assert len(protocol.TEST_SEEDS) >= 8 and not looked_at & set(protocol.TEST_SEEDS)
    assert "--digits.held-out" not in cell().words


def test_all_arms_reach_a_seed_before_the_next_one_starts():
    chosen = {name: arm.settings[0].name for name, arm in ARMS.items()}
    found = list(cells("test", (), (), (), chosen))
    both = [name for name in ARMS if not name.endswith("-entropy")]
    assert len(found) == (len(ARMS) + len(both)) * len(protocol.TEST_SEEDS)
    assert {c.arm.name for c in found if c.task == "digits-shortcut"} == set(both)
    assert [seed for seed, _ in itertools.groupby(c.seed for c in found)] == list(
        protocol.TEST_SEEDS
    )
    assert len({c.path for c in found}) == len(found)


FORMS = {
    "official": ("sampled", "stored"),
    "paper": ("sampled", "trained"),
    "both": ("exact", "trained"),
    "forward": ("exact", "frozen"),
    "reverse": ("exact", "frozen"),
    # of token weights alone, which are measured after sampling
    "vppo": ("exact", "none"),
    "pgpo": ("exact", "none"),
}


def base_of(arm):
    return arm.name.partition("-")[0]


def test_arms_and_settings_are_options_that_the_command_line_knows(tmp_path):
    for arm in ARMS.values():
        if arm.missing():
            assert arm.missing().startswith("this version has no objective.")
            continue
        for setting in (*arm.settings, *arm.beyond):
            config = configure(Cell("development", "digits", arm, setting, 10), tmp_path)
            goal = config.objective
            assert goal.needs_aug == (arm.name not in ("grpo", "dapo"))
            assert (goal.entropy_coef > 0) == arm.name.endswith("-entropy")
            assert (goal.kl_prcp_clip == 2) == arm.name.startswith("both-clip")
            if goal.needs_aug:
                assert (goal.kl_prcp_estimator, goal.aug_stream) == FORMS[base_of(arm)]
            assert config.digits.held_out == "dev" and config.seed == 10


def test_the_arms_of_the_addendum_are_dapo_with_a_token_weight(tmp_path):
    def config(name):
        arm = ARMS[name]
        return configure(Cell("test", "digits", arm, arm.settings[0], 100), tmp_path)

    assert ADDED == ("vppo", "pgpo") and list(ARMS)[-2:] == list(ADDED)
    dapo = config(BASE_OF_ADDED)
    for name in ADDED:
        goal = config(name).objective
        assert goal.weight_names == (name,) and goal.dependency == "sampled-k3"
        assert goal.kl_prcp_coef == 0 and not goal.has_aug_terms
        plain = dataclasses.replace(goal, token_weights="", dependency="exact")
        assert plain == dapo.objective
        assert ARMS[name].settings == ARMS["grpo"].settings and not ARMS[name].beyond
    assert (config("vppo").corruption.kind, config("vppo").corruption.ratio) == ("patch", 0.5)
    assert config("pgpo").corruption.kind == "attention"


def test_every_arm_is_measured_with_the_same_corruption(tmp_path):
    from bench.evidence.one_run import MEASURED_WITH, shared_file

    files = set()
    for arm in ARMS.values():
        config = configure(Cell("test", "digits", arm, arm.settings[0], 100), tmp_path)
        files.add(shared_file(config, tmp_path))
        if arm.name not in ADDED:
            assert config.corruption == MEASURED_WITH  # as before the addendum
    assert len(files) == 1


def test_the_addendum_leaves_what_other_arms_say(tmp_path):
    """p of the fourteen is corrected over them alone, and the addendum's over its two."""

    def of(names):
        found = {}
        for i, name in enumerate(names):
            for seed in range(6):
                share = 0.5 + 0.01 * i + 0.003 * ((seed * (i + 2)) % 5)
                found.setdefault(name, {})[seed] = share
        return found

    outcome = Outcome("x", lambda share: share, 1)
    before = differences(outcome, of(["grpo", "dapo", "official"]))
    after = differences(outcome, of(["grpo", "dapo", "official", "vppo", "pgpo"]))
    assert {name: after[name] for name in before} == before
    assert after["vppo"].adjusted == pytest.approx(min(1, 2 * after["vppo"].p), rel=1e-9) or (
        after["vppo"].adjusted == pytest.approx(max(after["vppo"].p, 2 * after["pgpo"].p))
    )
    against_dapo = differences(outcome, of(["grpo", "dapo", "official", "vppo"]), "dapo")
    assert against_dapo["vppo"].adjusted == against_dapo["vppo"].p
    assert "dapo" not in against_dapo


def test_seeds_of_another_stage_are_refused(capsys):
    from bench.evidence.__main__ import main

    assert main(["run", "--stage", "development", "--seeds", "100"]) == 2
    assert "seeds [100]" in capsys.readouterr().err


def test_the_sweep_leaves_out_arms_that_collapsed_already(monkeypatch, tmp_path):
    from bench.evidence import __main__ as command

    monkeypatch.setattr(command, "RESULTS", tmp_path)
    for arm, collapsed in (("paper", True), ("official", False)):
        write(tmp_path, cell(arm, "gamma-0.04", 10, stage="development"), collapsed=collapsed)
    words = ["run", "--stage", "sweep", "--arms", "paper", "official", "reverse"]
    plan = command.asked(command.command_line().parse_args(words))
    assert [c.arm.name for c in plan.cells] == ["official"] * 2 + ["reverse"] * 2


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Settings of a run of two steps whose warm start is six steps long."""
    monkeypatch.setattr(warmstart, "CHECK_FROM", 6)
    monkeypatch.setattr(warmstart, "BATCH", 16)
    monkeypatch.setattr(warmstart, "DEV_QUESTIONS", 8)

    def settings(of):
        config = configure(of, tmp_path / "scratch")
        return dataclasses.replace(
            config,
            rollout=dataclasses.replace(config.rollout, prompts=4, group_size=4, filter_prompts=4),
            train=dataclasses.replace(config.train, steps=2, update_prompts=4),
            eval=dataclasses.replace(config.eval, samples=2),
            reward=dataclasses.replace(config.reward, workers=1),
            digits=dataclasses.replace(
                config.digits, train_questions=64, test_questions=24, warm_accuracy=0.0
            ),
        )

    return settings


def test_a_real_run_is_that_of_the_command_line_and_shares_what_comes_before(small, tmp_path):
    from papo_fast.launch import train as train_as_the_command_does

    scratch, records = tmp_path / "scratch", {}
    with Scorer(small(cell()).reward) as scorer:
        for arm, setting in (("grpo", "lr-5e-4"), ("both", "gamma-0.02")):
            of = cell(arm, setting, task="digits-shortcut")
            plan = Plan.of([of])

            def one(of):
                return train(of, small(of), scratch, scorer)

            assert work(plan, tmp_path / "results", scratch, one, lambda line: None) == 0
            records[arm] = result_of(of, tmp_path / "results")
    grpo, both = records["grpo"], records["both"]
    assert len(list((scratch / "before").glob("*.json"))) == 1
    assert grpo["measures"]["before"] == both["measures"]["before"]
    assert set(grpo["measures"]["after"]["by_kind"]) == set(kinds("digits-shortcut"))
    assert both["kl_prcp_last"] > 0 and grpo["kl_prcp_last"] is None
    assert both["measures"]["after"]["ruler"]["kl_prcp"] > 0
    assert 0 <= both["measures"]["after"]["swapped"]["read"] <= 1
    assert both["command"] == "papo-fast train " + " ".join(both["words"])
    assert not list((tmp_path / "results").rglob("*.partial"))

    # the same words on the command line, from the same warm start: nothing was shared or left out
    of = cell("both", "gamma-0.02", task="digits-shortcut")
    config = dataclasses.replace(small(of), out=str(tmp_path / "out"))
    folder = train_as_the_command_does(config, Console(file=io.StringIO()))
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("seconds", "git_commit"):
        summary.pop(name)
    assert both["summary"] == summary
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert both["curves"]["reward"] == [round(sum(r["reward"] for r in rows) / 2, 5)]
