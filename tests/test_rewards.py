"""Rewards: format, answers that need no parser, math-verify, and answers that would hang."""

import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo_fast.config import RewardConfig
from papo_fast.errors import InputError
from papo_fast.rewards.scorer import Scorer, equal_as_text, has_format, last_boxed

LIMIT = 1.0
"""Seconds of CPU time per answer."""


@pytest.fixture(scope="module", autouse=True)
def cpu_time_alone_is_limited():
    """On a busy machine a second of CPU time can take longer than the clock's own limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("papo_fast.rewards.scorer.WALL_FACTOR", 600.0)
        yield


@pytest.fixture(scope="module")
def scorer():
    with Scorer(RewardConfig(timeout=LIMIT, workers=2)) as scorer:
        yield scorer


def cpu_seconds_of_ended_workers():
    """Does not depend on how busy the machine is, unlike the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def boxed(answer):
    return f"<think>Let me look.</think> The answer is \\boxed{{{answer}}}."


def is_right(scorer, reference, candidate):
    return scorer.score([boxed(candidate)], [reference])[0].accuracy == 1


# --- format ---------------------------------------------------------------------------------------

AUTHORS_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
PIECES = ["<think>", "</think>", "\\boxed{", "}", "{", "x", "\n", "boxed"]


@given(st.lists(st.sampled_from(PIECES), max_size=9))
@settings(max_examples=500)
def test_format_agrees_with_the_authors_expression(pieces):
    text = "".join(pieces).strip()
    assert has_format(text) == bool(AUTHORS_FORMAT.fullmatch(text))


def test_format_of_plain_examples():
    assert has_format(boxed("3"))
    assert has_format("\n" + boxed("3") + "\n")
    assert has_format("<think>a\nb</think>\n\\boxed{\\frac{1}{2}}")
    assert not has_format("\\boxed{3}")
    assert not has_format("<think>\\boxed{3}</think>")
    assert not has_format("<think>no end \\boxed{3}")
    assert not has_format("Well. <think>a</think>\\boxed{3}")


# --- the box --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{1} no, \\boxed{ 2 }", "2"),
        ("\\boxed{\\frac{1}{2}} {}", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{1, 2\\right\\}}", "\\left\\{1, 2\\right\\}"),
        ("\\boxed{\\{}", "\\{"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed{}", ""),
        ("\\boxed{1} then \\boxed{2", None),
        ("\\boxed{{3}", None),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_last_boxed(response, answer):
    assert last_boxed(response) == answer


# --- no parser needed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "candidate", "equal"),
    [
        ("42", "42", True),
        ("42", "+042", True),
        ("42", "43", False),
        ("-3", "3", False),
        ("0", "-0", True),
        ("1" + "0" * 9000, "1" + "0" * 9000 + "1", False),  # beyond what int() accepts
        ("0" + "7" * 9000, "7" * 9000, True),
        ("B", "\\text{B}", True),
        ("B", "(b)", True),
        ("B", "\\textbf{B. } ", True),
        ("B", "B) 12 cm", True),
        ("B", "C", False),
        ("B", "Because", False),
        ("\\text{B}", "$B$", True),
        ("listen", "silent", False),
        ("red ball", "\\text{Red  ball.}", True),
        ("red ball", "\\text{ball}", False),
        ("1/2", "0.5", None),
        ("42", "42.0", None),
        ("x", "y", None),
        ("ABC", "BCA", None),
    ],
)
def test_answers_decided_by_reading(reference, candidate, equal):
    assert equal_as_text(reference, candidate) is equal


def test_no_process_starts_until_an_answer_needs_one():
    with Scorer(RewardConfig()) as scorer:
        scores = scorer.score(
            [boxed("7"), boxed("8"), "no box", boxed("A"), "\\boxed{}"], ["7", "7", "7", "A", "7"]
        )
        assert [s.accuracy for s in scores] == [1, 0, 0, 1, 0]
        assert scorer._workers == []


# --- math-verify ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "candidate", "right"),
    [
        ("0.5", "\\frac{1}{2}", True),
        ("\\frac{1}{2}", "0.5", True),
        ("$\\frac12$", "1/2", True),
        ("\\boxed{\\frac{3}{4}}", "0.75", True),
        ("50\\%", "0.5", True),
        ("1234", "1,234", True),
        ("12", "12.0", True),
        ("12", "12.5", False),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("(1,2)", "(2,1)", False),
        ("12", "\\frac{}{", False),
        ("12", "\\\\left(((", False),
        ("12", "\x00\ud83d\ude00日本", False),
    ],
)
def test_answers_compared_by_math_verify(scorer, reference, candidate, right):
    assert is_right(scorer, reference, candidate) == right


def test_reward_weighs_accuracy_and_format():
    config = RewardConfig(accuracy_weight=0.9, format_weight=0.1)
    with Scorer(config) as scorer:
        scores = scorer.score([boxed("5"), boxed("6"), "\\boxed{5}", "five"], ["5", "5", "5", "5"])
    assert [s.reward for s in scores] == pytest.approx([1.0, 0.1, 0.9, 0.0])
    assert [(s.accuracy, s.format) for s in scores] == [(1, 1), (0, 1), (1, 0), (0, 0)]


# --- answers that would hang ----------------------------------------------------------------------

PATHOLOGICAL = ["9^{9^{9^{9}}}", "10^{10^{10}}!", "\\sum_{i=1}^{10^{12}} i^{i}", "1+" * 20000 + "1"]


def test_answers_that_would_hang_are_cut_off_and_the_others_still_scored():
    config = RewardConfig(timeout=LIMIT, workers=2)
    with Scorer(config) as scorer:
        assert is_right(scorer, "0.5", "1/2")  # the workers' start is not what is timed below
        good = ["\\frac{2}{4}", "0.50", "1/2", "\\frac{3}{4}"]
        responses = [boxed(a) for pair in zip(PATHOLOGICAL, good, strict=True) for a in pair]
        started = cpu_seconds_of_ended_workers()
        scores = scorer.score(responses, ["\\frac12"] * 8)
        seconds = cpu_seconds_of_ended_workers() - started
        assert [s.accuracy for s in scores] == [0, 1, 0, 1, 0, 1, 0, 0]
        assert [s.timed_out for s in scores] == [True, False] * 4
        assert [s.format for s in scores] == [1] * 8
        assert scorer.timeouts == 4 and scorer.failures == 0
        # Four workers ended: a limit each, and a second or two for starting and for good answers.
        assert 4 * LIMIT <= seconds < 4 * (LIMIT + 2)
        assert is_right(scorer, "0.25", "\\frac14")


def test_a_copied_pathological_answer_is_tried_once_and_counted_each_time():
    with Scorer(RewardConfig(timeout=LIMIT, workers=1)) as scorer:
        assert is_right(scorer, "0.5", "1/2")
        started = cpu_seconds_of_ended_workers()
        scores = scorer.score([boxed("9^{9^{9^{9}}}")] * 5, ["7"] * 5)
        assert LIMIT <= cpu_seconds_of_ended_workers() - started < LIMIT + 2  # not 5 × LIMIT
        assert all(s.timed_out for s in scores) and scorer.timeouts == 5


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
    started = time.process_time()
    scores = scorer.score([response], ["7"])
    assert time.process_time() - started < 0.5  # here; the worker has its limit
    assert scores[0].accuracy == ("boxed{7}" in response)


# --- the rest -------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_workers_or_order(scorer):
    references = ["0.5", "\\sqrt{8}", "x^2-1", "\\{1,2,3\\}", "12", "A"]
    candidates = ["1/2", "2\\sqrt2", "(x-1)(x+1)", "\\{3,1,2\\}", "12.0", "B"]
    forward = scorer.score([boxed(c) for c in candidates], references)
    with Scorer(RewardConfig(timeout=LIMIT, workers=1)) as single:
        backward = single.score([boxed(c) for c in candidates[::-1]], references[::-1])
    assert forward == backward[::-1]
    assert [s.accuracy for s in forward] == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("empty", ["", "  \n", "\\boxed{ }"])
def test_an_empty_reference_is_refused(scorer, empty):
    with pytest.raises(InputError, match="reference answer 1 is"):
        scorer.score(["\\boxed{1}", "\\boxed{2}"], ["1", empty])


def test_numbers_of_responses_and_answers_must_agree(scorer):
    with pytest.raises(InputError, match="2 responses and 1 answers"):
        scorer.score(["a", "b"], ["1"])


def test_workers_load_neither_torch_nor_transformers(scorer):
    # The trainer's script is not run in the workers either, as a spawned pool would do.
    import torch  # noqa: F401  # loaded here, as in the trainer

    assert is_right(scorer, "0.5", "1/2")
    for worker in scorer._workers:
        if worker.process is not None:
            maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
            assert "python" in maps
            assert "torch" not in maps


def test_scorer_itself_imports_neither_torch_nor_math_verify():
    code = (
        "import sys, papo_fast.rewards.scorer; "
        "print(sorted({'torch', 'transformers', 'math_verify', 'sympy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
