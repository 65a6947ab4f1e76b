"""The comparison: runs are skipped, shared and kept whole, and its numbers are right."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.evidence import choice, protocol, report  # noqa: E402
from bench.evidence.arms import ADDED, ARMS, BASE_OF_ADDED, BASELINE  # noqa: E402
from bench.evidence.one_run import configure, train  # noqa: E402
from bench.evidence.outcomes import OUTCOMES, Outcome, differences, results_of_test  # noqa: E402
from bench.evidence.protocol import Cell, cells, collapse, largest_kl  # noqa: E402
from bench.evidence.runner import Plan, result_of, work  # noqa: E402
from bench.evidence.statistics import bootstrap, difference, holm, paired_p  # noqa: E402
from papo_fast.digits import warmstart  # noqa: E402
from papo_fast.errors import InputError  # noqa: E402
from papo_fast.rewards.scorer import Scorer  # noqa: E402


def cell(arm="grpo", setting=None, seed=100, task="digits", stage="test"):
    of = ARMS[arm]
    return Cell(stage, task, of, of.setting(setting) if setting else of.settings[0], seed)


def kinds(task):
    hints = [""] if task == "digits" else [f", hint {h}" for h in ("right", "absent", "misleading")]
    return [f"{kind}{hint}" for hint in hints for kind in ("vision_dependent", "text_leaning")]


def result(of, accuracy=0.7, collapsed=False, honesty=0.1):
    """What the runner keeps of a run, with these figures."""
    shares = {"accuracy": accuracy, "read": 0.6, "misread": 0.2, "miscalculated": 0.1}
    by_kind = {kind: {"questions": 128, **shares, "followed": 0.5} for kind in kinds(of.task)}
    ruler = {"kl_prcp": 1.0, "kl_first_token": 0.1, "entropy": 0.2, "aug_entropy": 0.9}
    corrupted = {"accuracy": dict.fromkeys(by_kind, honesty), "given": 0.3}
    swapped = {"accuracy": {}, "given": 0.8, "read": 0.6}
    measures = {"by_kind": by_kind, "corrupted": corrupted, "swapped": swapped, "ruler": ruler}
    return {
        "words": list(of.words),
        "summary": {"accuracy_after": dict.fromkeys(by_kind, accuracy)},
        "measures": {"before": measures, "after": measures},
        "collapsed": collapsed,
        "why": "it did" if collapsed else None,
        "kl_prcp_largest": None if of.arm.name in ("grpo", "dapo") else 2.5,
        "alarms": [[3, "a sign"]] if collapsed else [],
        "seconds": {"all": 240.0},
        "git_commit": "0123456789abcdef",
        "machine": {"cpu": "a processor", "capability": "AVX2"},
    }


def write(results, of, **figures):
    path = results / of.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result(of, **figures)))


# --- the plan -------------------------------------------------------------------------------------


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


# --- the runner -----------------------------------------------------------------------------------


def stub(of, **figures):
    return result(of, **figures)


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(tmp_path):
    plan, results = Plan.of([cell(seed=s) for s in (100, 101, 102)]), tmp_path / "results"
    made, lines = [], []

    def failing(of):
        if of.seed == 101:
            raise InputError("no luck")
        made.append(of.seed)
        return stub(of)

    assert work(plan, results, tmp_path, failing, lines.append) == 1
    assert made == [100, 102]
    assert any("failed" in line and "no luck" in line for line in lines)
    assert any(line.startswith(("2/3", "1/3")) for line in lines)
    again = []
    assert work(plan, results, tmp_path, lambda of: again.append(of) or stub(of), print) == 0
    assert again == [plan.cells[1]]


def test_an_arm_that_was_changed_does_not_pass_for_done(tmp_path):
    of = cell("official", "gamma-0.02")
    write(tmp_path, of)
    assert result_of(of, tmp_path)
    other = dataclasses.replace(of.arm, words=(*of.arm.words, "--objective.clip-high", "0.4"))
    with pytest.raises(InputError, match=r"clip-high 0\.4.*delete the file"):
        result_of(dataclasses.replace(of, arm=other), tmp_path)


def test_an_arm_that_this_version_lacks_is_named_and_left_out():
    arm = dataclasses.replace(ARMS["grpo"], name="later", needs=("no_such_field",))
    plan = Plan.of([cell(), dataclasses.replace(cell(), arm=arm)])
    assert [c.arm.name for c in plan.cells] == ["grpo"]
    assert plan.impossible == ("skipped: arm later, this version has no objective.no_such_field",)


def slow(of):
    with (LOG / f"{of.seed}-{os.getpid()}").open("x"):
        time.sleep(0.2)
    return stub(of)


LOG = Path()


def worker(folder):
    global LOG
    LOG = folder / "log"
    plan = Plan.of([cell(seed=s) for s in range(100, 108)])
    work(plan, folder / "results", folder, slow, lambda line: None)


def test_two_processes_make_every_run_once_and_a_killed_one_leaves_nothing_half_done(tmp_path):
    (tmp_path / "log").mkdir()
    context = multiprocessing.get_context("fork")
    first, second = (context.Process(target=worker, args=(tmp_path,)) for _ in range(2))
    first.start(), second.start()
    while not list((tmp_path / "log").iterdir()):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join(), second.join()
    files = sorted((tmp_path / "results").rglob("*.*"))
    assert all(json.loads(file.read_text()) for file in files)
    third = context.Process(target=worker, args=(tmp_path,))  # what the killed one held is free
    third.start(), third.join()
    files = [p for p in (tmp_path / "results").rglob("*") if p.is_file()]
    assert sorted(p.name for p in files) == [f"seed{s}.json" for s in range(100, 108)]
    starts = [p.name.partition("-")[0] for p in (tmp_path / "log").iterdir()]
    assert len(starts) <= 9  # at most the run that was killed started twice


# --- numbers --------------------------------------------------------------------------------------


def test_holm_against_values_by_hand():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})
    assert found["a"] == pytest.approx(0.03)  # 3 × .01
    assert found["c"] == pytest.approx(0.06)  # 2 × .03
    assert found["b"] == pytest.approx(0.06)  # 1 × .04, and no smaller than the one before
    assert math.isnan(found["d"])
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_the_paired_test_against_a_value_by_hand():
    # mean 2, standard deviation 2, n 4: t = 2, and with 3 degrees of freedom p = .1394
    values = [0.0, 1.0, 2.0, 5.0]
    values = [v - sum(values) / 4 for v in values]
    scale = math.sqrt(sum(v * v for v in values) / 3)
    values = [2 + 2 * v / scale for v in values]
    assert paired_p(values) == pytest.approx(0.1394, abs=1e-4)
    assert paired_p([1.0, 1.0]) == 0.0 and paired_p([0.0, 0.0]) == 1.0
    assert math.isnan(paired_p([1.0]))


def test_the_bootstrap_against_all_resamples_of_two_values():
    # of 0 and 1 the mean of two draws is 0, ½, ½, 1: its 2.5 % and 97.5 % quantiles are 0 and 1
    assert bootstrap([0.0, 1.0], 10_000) == (0.0, 1.0)
    assert bootstrap([3.0, 3.0, 3.0], 100) == (3.0, 3.0)
    low, high = bootstrap(list(range(100)), 20_000)  # the normal interval: 49.5 ± 1.96 × 2.887
    assert low == pytest.approx(49.5 - 5.66, abs=0.3)
    assert high == pytest.approx(49.5 + 5.66, abs=0.3)
    assert bootstrap([0.0, 1.0, 5.0], 999) == bootstrap([0.0, 1.0, 5.0], 999)


def test_differences_are_taken_on_the_seeds_that_both_have():
    found = difference({1: 0.5, 2: 0.7, 9: 0.0}, {1: 0.4, 2: 0.5, 7: 1.0})
    assert found.seeds == 2 and found.mean == pytest.approx(0.15)
    assert difference({1: 0.5}, {2: 0.5}) is None


def test_a_run_collapses_by_its_reward_or_by_its_kl():
    calm = [{"reward": 0.4 + 0.01 * i, "kl_prcp": 1.0} for i in range(40)]
    assert collapse(calm) is None
    assert "final reward" in collapse([*calm, *({"reward": 0.1, "kl_prcp": 1.0},) * 20])
    high = [row | {"kl_prcp": 6.0 if 20 <= i < 30 else 1.0} for i, row in enumerate(calm)]
    assert "6.00 nats" in collapse(high)
    assert largest_kl(
        [row | {"kl_prcp": 6.0 if i == 20 else 1.0} for i, row in enumerate(calm)]
    ) == (
        pytest.approx(1.5)  # one step in ten
    )
    assert largest_kl([{"reward": 0.1}]) is None


def test_the_best_setting_that_stands_is_chosen_and_stays_chosen(tmp_path):
    accuracy = {"gamma-0.005": 0.70, "gamma-0.01": 0.74, "gamma-0.02": 0.72, "gamma-0.04": 0.90}
    for setting, seed in itertools.product(accuracy, protocol.DEVELOPMENT_SEEDS):
        of = cell("official", setting, seed, stage="development")
        last = seed == protocol.DEVELOPMENT_SEEDS[-1]
        gone = setting == "gamma-0.04" and last  # the highest, and it collapsed once
        write(tmp_path, of, accuracy=accuracy[setting], collapsed=gone)
    said = choice.choose(tmp_path)
    assert "official: gamma-0.01" in said and "grpo: none yet" in said
    assert choice.chosen_settings(tmp_path) == {"official": "gamma-0.01"}
    of = cell("official", "gamma-0.02", 10, stage="development")
    write(tmp_path, of, accuracy=0.99)
    assert "as chosen before" in choice.choose(tmp_path)
    everywhere = {name: [{"collapsed": True, "summary": None}] for name in accuracy}
    runs = [result(of, collapsed=True)]
    assert choice.best(dict.fromkeys(everywhere, runs)) == "gamma-0.005"


# --- the report -----------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "evidence.md"
    path.write_text((ROOT / "docs" / "evidence.md").read_text())
    return path


def test_the_report_of_nothing_says_so(tmp_path, page):
    report.write_report(tmp_path / "results", page, tmp_path / "images")
    text = page.read_text()
    assert "0 of 320 test runs" not in text and "0 of 160 test runs are there" in text
    assert "No development run yet." in text and "compared when all of them" in text


def test_the_report_compares_when_all_is_there_and_names_what_is_missing(
    tmp_path, page, monkeypatch
):
    results = tmp_path / "results"
    chosen = {"grpo": "lr-5e-4", "official": "gamma-0.02", "reverse": "gamma-0.04"}
    results.mkdir()
    (results / "chosen.json").write_text(
        json.dumps({name: {"setting": setting} for name, setting in chosen.items()})
    )
    for seed in (100, 101, 102):
        for task in protocol.TASKS:
            write(results, cell("grpo", "lr-5e-4", seed, task), accuracy=0.70 + 0.01 * (seed - 100))
            write(results, cell("official", "gamma-0.02", seed, task), accuracy=0.75, honesty=0.05)
            rises = 0.77 + 0.01 * (seed - 100)
            write(results, cell("reverse", "gamma-0.04", seed, task), accuracy=rises)
    write(results, cell("both", "gamma-0.04", 10, stage="development"), collapsed=True)
    report.write_report(results, page, tmp_path / "images")
    text = page.read_text()
    assert "9 of 160 test runs are there; 0 of 16 arms have all 10 seeds." in text
    assert "9 of 100 test runs are there; 0 of 10 arms have all 10 seeds." in text
    assert "`dapo`: 0 of 10 seeds (it has no setting yet)" in text
    assert "points more or fewer" not in text and "compared when all of them" in text
    monkeypatch.setattr(report, "TEST_SEEDS", (100, 101, 102))
    monkeypatch.setattr(report, "arms_of", lambda task: ("grpo", "official", "reverse"))
    for _ in range(2):  # and again: what was written is replaced
        said = report.write_report(results, page, tmp_path / "images")
    text = page.read_text()
    assert "9 of 9 test runs are there; 3 of 3 arms have all 3 seeds." in text
    assert text.count("+4.0 [+3.0, +5.0] p 0.02") >= 1
    # 2, 3 and 4 points: t = 3 √3 with 2 degrees of freedom, and a pair alone is not corrected
    assert "| `reverse` − `official` | 3 | +3.0 [+2.0, +4.0] p 0.035 |" in text
    assert "`reverse` − `forward`" not in text
    assert "with AVX2 (seeds 100, 101, 102)" in text
    assert (
        "| `official` | 5.0 | 3 of 3 |" in text
    )  # five points below GRPO's honesty check, on every seed
    assert "| `both` | gamma-0.04 | 1 | 70.0 | 10.0 | 2.50 | 1 of 1 |" in text
    assert said.count(".png") == 3
    assert all(Path(line).stat().st_size > 5000 for line in said.splitlines()[1:])


def test_outcomes_of_the_shortcut_are_those_of_its_hints(tmp_path):
    of = cell("grpo", task="digits-shortcut")
    found = result(of)
    found["measures"]["after"]["by_kind"]["vision_dependent, hint misleading"]["accuracy"] = 0.2
    values = {name: o.of(found) for name, o in OUTCOMES["digits-shortcut"].items()}
    others = {"alone": 0.7, "hinted": 0.7, "text": 0.7, "followed": 0.5, "misread": 0.2}
    assert values == pytest.approx({"misled": 0.2, "honesty": 0.1, **others})
    assert differences(OUTCOMES["digits"]["vision"], {BASELINE: {100: found}}) == {}
    assert results_of_test(tmp_path, "digits", {"grpo": "lr-5e-4"}) == {}


# --- one real run ---------------------------------------------------------------------------------


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
