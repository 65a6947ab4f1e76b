"""The comparison's numbers against values by hand, and the page that is made of them."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest

from support import TESTS

sys.path.insert(0, str(TESTS.parent))

from bench.evidence import choice, protocol, report
from bench.evidence.arms import BASELINE
from bench.evidence.outcomes import OUTCOMES, differences, results_of_test
from bench.evidence.protocol import collapse, largest_kl
from bench.evidence.statistics import bootstrap, difference, holm, paired_p
from support.evidence_results import cell, result, write

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
    path.write_text((TESTS.parent / "docs" / "evidence.md").read_text())
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
