"""Rewards: answers that would hang, or need too much memory, and workers that die."""

import gc
import re
import signal
import time
from pathlib import Path

import pytest

from papo_fast.config import RewardConfig
from papo_fast.rewards import answer_check
from papo_fast.rewards import scorer as scorer_module
from papo_fast.rewards.scorer import Scorer
from papo_fast.rewards.workers import LOWERED, PATIENCE
from support.scoring import LIMIT, boxed, cpu_seconds_of_ended_workers, is_right

pytestmark = pytest.mark.usefixtures("cpu_time_alone_is_limited")


PATHOLOGICAL = ["9^{9^{9^{9}}}", "10^{10^{10}}!", "\\sum_{i=1}^{10^{12}} i^{i}", "1+" * 20000 + "1"]
"""Answers that are too large for the parser."""
SLOW = [f"\\prod_{{n=1}}^{{{4000 - i}}} n^{{n}}" for i in range(8)]
"""Small answers that take for ever all the same."""


def test_answers_that_would_hang_are_cut_off_and_the_others_still_scored():
    config = RewardConfig(timeout=LIMIT, workers=2)
    with Scorer(config) as scorer:
        assert is_right(scorer, "0.5", "1/2")  # the workers' start is not what is timed below
        good = ["\\frac{2}{4}", "0.50", "1/2", "\\frac{3}{4}"]
        responses = [boxed(a) for pair in zip(PATHOLOGICAL, good, strict=True) for a in pair]
        started = cpu_seconds_of_ended_workers()
        scores = scorer.score(responses, ["\\frac12"] * 8)
        assert cpu_seconds_of_ended_workers() == started  # no worker had to end
        assert [s.accuracy for s in scores] == [0, 1, 0, 1, 0, 1, 0, 0]
        assert [s.timed_out for s in scores] == [True, False] * 4
        assert [s.format for s in scores] == [1] * 8
        assert scorer.timeouts == 4 and scorer.failures == 0
        assert is_right(scorer, "0.25", "\\frac14")


def test_answers_that_do_hang_are_cut_off_and_the_others_still_scored():
    with Scorer(RewardConfig(timeout=LIMIT, workers=2)) as scorer:
        assert is_right(scorer, "0.5", "1/2")
        good = ["\\frac{2}{4}", "0.50", "1/2", "\\frac{3}{4}"]
        responses = [boxed(a) for pair in zip(SLOW[:4], good, strict=True) for a in pair]
        started = cpu_seconds_of_ended_workers()
        scores = scorer.score(responses, ["\\frac12"] * 8)
        seconds = cpu_seconds_of_ended_workers() - started
        assert [s.accuracy for s in scores] == [0, 1, 0, 1, 0, 1, 0, 0]
        assert [s.timed_out for s in scores] == [True, False] * 4
        assert scorer.timeouts == 4 and scorer.failures == 0
        # Four workers ended: a limit each, and a second or two for starting and for good answers.
        assert 4 * LIMIT <= seconds < 4 * (LIMIT + 2)
        assert is_right(scorer, "0.25", "\\frac14")


def test_a_copied_pathological_answer_is_tried_once_and_counted_each_time():
    with Scorer(RewardConfig(timeout=LIMIT, workers=1)) as scorer:
        assert is_right(scorer, "0.5", "1/2")
        started = cpu_seconds_of_ended_workers()
        scores = scorer.score([boxed(SLOW[0])] * 5, ["7"] * 5)
        assert LIMIT <= cpu_seconds_of_ended_workers() - started < LIMIT + 2  # not 5 × LIMIT
        assert all(s.timed_out for s in scores) and scorer.timeouts == 5


def test_the_limit_is_lowered_after_repeated_timeouts_and_restored(monkeypatch):
    allowed = []

    def compare(self, reference, candidate):
        allowed.append(self.timeout)
        self.seconds = 0.5 if candidate == "slow" else 0.01
        return ("timeout" if candidate.startswith("\\prod") else "right"), ""

    monkeypatch.setattr(scorer_module._Worker, "compare", compare)
    for workers in (1, 2):
        with Scorer(RewardConfig(timeout=1.0, workers=workers)) as scorer:
            allowed.clear()
            answers = [*SLOW, "quick + x", "slow + x"]
            scores = scorer.score([boxed(a) for a in answers], ["x"] * len(answers))
            assert scores[-2].accuracy == 1
            assert sum(allowed) <= (PATIENCE + workers) * 1.0 + len(answers) * LOWERED
            assert allowed[-1] == LOWERED and scorer.timeouts == len(SLOW)
            allowed.clear()
            assert is_right(scorer, "x", "y + 1") and allowed == [1.0]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_slow_answer_scores_does_not_depend_on_the_number_of_workers(workers, monkeypatch):
    def compare(self, reference, candidate):
        self.seconds = 0.5
        return ("timeout" if candidate.startswith("\\prod") else "right"), ""

    monkeypatch.setattr(scorer_module._Worker, "compare", compare)
    with Scorer(RewardConfig(timeout=1.0, workers=workers)) as scorer:
        answers = ["a + x", *SLOW[:PATIENCE], "b + x"]  # half a second each: allowed first only
        scores = scorer.score([boxed(a) for a in answers], ["x"] * len(answers))
        assert [s.timed_out for s in scores] == [False, *[True] * PATIENCE, True]
        assert [s.accuracy for s in scores] == [1, *[0] * PATIENCE, 0]


@pytest.mark.parametrize(
    ("answer", "large"),
    [
        ("9^{9^{9}}", True),
        ("9^9^9", True),
        ("9**9**9", True),
        ("(9^{999})^{999}", True),
        ("(10^{6})!", True),
        ("\\binom{10^6}{10^5}", True),
        ("{" * 30 + "x" + "}" * 30, True),
        ("x + " * 300 + "1", True),
        ("2^{-10^{9}}", True),
        ("3^{2^{5}}", False),
        ("\\frac{1}{2^{99}}", False),
        ("6.02 \\times 10^{23}", False),
        ("e^{-x^{2}/2}", False),
        ("x^{2023} - 1", False),
        ("10!", False),
        ("\\sqrt{\\frac{\\sqrt{2 + \\sqrt{3}}}{4}}", False),
        ("\\begin{pmatrix}1 & 2\\\\3 & 4\\end{pmatrix}", False),
        ("[0, 1) \\cup (2, \\infty)", False),
    ],
)
def test_limits_of_size(answer, large):
    assert answer_check.too_large(answer) == large


def test_the_memory_of_the_workers_is_a_constant_for_planning():
    source = Path(answer_check.__file__).read_text(encoding="utf-8")
    assert answer_check.MEMORY_LIMIT == 2 << 30
    assert "papo_fast" not in re.sub(r'"""[\s\S]*?"""', "", source)  # plain, and quick to import


def test_a_worker_that_dies_is_a_counted_failure_and_is_replaced():
    with Scorer(RewardConfig(timeout=LIMIT, workers=1)) as scorer:
        assert is_right(scorer, "0.5", "1/2")
        scorer._workers[0].process.kill()
        score = scorer.score([boxed("2/4")], ["0.5"])[0]
        assert score.accuracy == 0 and not score.timed_out
        assert scorer.failures == 1 and "exit status" in scorer.last_failure
        assert is_right(scorer, "0.5", "2/4")


def test_an_answer_that_eats_all_memory_does_not_take_the_machine_with_it(scorer):
    score = scorer.score([boxed("2^{2^{40}}")], ["7.5"])[0]
    assert score.accuracy == 0
    assert is_right(scorer, "0.5", "1/2")


def test_a_worker_that_sleeps_is_killed_too(monkeypatch):
    with Scorer(RewardConfig(timeout=LIMIT, workers=1)) as scorer:
        assert is_right(scorer, "0.5", "1/2")
        scorer._workers[0].process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr("papo_fast.rewards.scorer.WALL_FACTOR", 0.2)
        assert scorer.score([boxed("2/4")], ["0.5"])[0].timed_out
        assert scorer.timeouts == 1


def test_closing_ends_the_processes():
    scorer = Scorer(RewardConfig(workers=2))
    with scorer:
        assert is_right(scorer, "0.5", "1/2")
        processes = [w.process for w in scorer._workers if w.process]
        assert processes and all(p.poll() is None for p in processes)
    assert all(p.poll() is not None for p in processes)


@pytest.mark.parametrize(
    "response",
    [
        "<think>" + "</think>" * 25_000,
        "<think>" + "</think>\\boxed{" * 15_000,
        "<think>" + "word " * 40_000 + "</think>\\boxed{7}",
        "\\boxed{" * 30_000,
        boxed("{" * 100_000 + "}" * 100_000),
    ],
    ids=["ends", "ends_and_boxes", "words", "boxes", "braces"],
)
def test_a_huge_response_costs_little(scorer, response):
    assert len(response) > 190_000
    is_right(scorer, "0.5", "1/2")
    gc.disable()  # the objects of all tests before this one are not what is timed
    try:
        started = time.process_time()
        scores = scorer.score([response], ["7"])
        seconds = time.process_time() - started
    finally:
        gc.enable()
    assert seconds < 0.5  # here; the worker has its limit
    assert scores[0].accuracy == ("boxed{7}" in response)
