"""Rewards: format, answers that need no parser, math-verify, and answers that would hang."""

import gc
import json
import random
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
from papo_fast.rewards import answer_check
from papo_fast.rewards import scorer as scorer_module
from papo_fast.rewards.answers import Algebra, judge
from papo_fast.rewards.reading import reading
from papo_fast.rewards.scorer import Scorer, equal_as_text, has_format, last_boxed
from papo_fast.rewards.workers import LOWERED, PATIENCE

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

AUTHORS_SPACES = re.compile(r"\s*(<|>|/)\s*")
AUTHORS_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
PIECES = [
    "< think >",
    "< / think>",
    " ",
    "<",
    "/",
    "<think>",
    "</think>",
    "\\boxed{",
    "}",
    "{",
    "x",
    "\n",
    "boxed",
]


@given(st.lists(st.sampled_from(PIECES), max_size=9))
@settings(max_examples=500)
def test_format_agrees_with_the_authors_expression(pieces):
    text = "".join(pieces).strip()
    as_they_read_it = AUTHORS_SPACES.sub(r"\1", text).strip()
    assert has_format(text) == bool(AUTHORS_FORMAT.fullmatch(as_they_read_it))


def test_format_of_plain_examples():
    assert has_format(boxed("3"))
    assert has_format("\n" + boxed("3") + "\n")
    assert has_format("<think>a\nb</think>\n\\boxed{\\frac{1}{2}}")
    assert not has_format("\\boxed{3}")
    assert not has_format("<think>\\boxed{3}</think>")
    assert not has_format("<think>no end \\boxed{3}")
    assert not has_format("Well. <think>a</think>\\boxed{3}")


@pytest.mark.parametrize("prompt", ["<|im_start|>assistant\n<think>\n", "a < think >"])
def test_format_where_the_template_opened_think(prompt):
    assert has_format("I look.</think> \\boxed{3}", prompt)
    assert has_format(boxed("3"), prompt)  # said again
    assert not has_format("I look. \\boxed{3}", prompt)
    assert not has_format("\\boxed{3}</think>", prompt)
    assert not has_format("I look.</think> \\boxed{3}", "Put it in <think></think>. Assistant:")
    assert reading("I look.</think> \\boxed{3}", prompt) == "I look."
    assert reading("I look.</think> \\boxed{3}") is None
    scorer = Scorer(RewardConfig())
    assert scorer.score(["I look.</think>\\boxed{3}"], ["3"])[0].format == 0
    scorer.prompt_end = prompt
    assert scorer.score(["I look.</think>\\boxed{3}"], ["3"])[0].format == 1


def test_reading_with_spaces_in_the_tags():
    assert reading("< think >I look.< /think > 3") == "I look."
    assert reading("<think>I look.") is None


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
        ("\\boxed {4}", "4"),
        ("\\boxed{1} no, \\boxed\n{ 2 }", "2"),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_last_boxed(response, answer):
    assert last_boxed(response) == answer


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("\\boxed{1} and \\boxed{-2}", "1, -2", True),
        ("$\\boxed{1}$, $\\boxed{-2}$", "-2, 1", True),
        ("\\boxed{1} and \\boxed{-2}", "-2", False),
        ("\\boxed{A} or \\boxed{C}", "C", False),
        ("\\boxed{1}. No, it is \\boxed{3}", "3", True),  # the last one counts
        ("\\boxed{1}. No, it is \\boxed{3}", "1", False),
        ("\\boxed{3} \\boxed{3}", "3", True),
        ("\\boxed{-2}", "\\boxed{1} and \\boxed{-2}", False),
        ("\\boxed{1, -2}", "\\boxed{1} and \\boxed{-2}", True),
        ("\\boxed{7}", "\\boxed {7}", True),
        ("\\boxed{7}", "so \\boxed{7", True),  # a box of a reference that is never closed
        ("\\boxed{8}", "so \\boxed{7", False),
        ("\\boxed{7", "7", False),
    ],
)
def test_several_boxes_and_unclosed_ones(scorer, response, reference, right):
    assert scorer.score([response], [reference])[0].accuracy == right


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


def test_a_comparison_is_made_once(monkeypatch):
    asked = []
    compare = scorer_module._Worker.compare

    def counted(self, *pair):
        asked.append(pair)
        return compare(self, *pair)

    monkeypatch.setattr(scorer_module._Worker, "compare", counted)
    with Scorer(RewardConfig(timeout=LIMIT, workers=1)) as scorer:
        first = scorer.score([boxed("1/2"), boxed("1/3")], ["0.5", "0.5"])
        assert len(asked) == 2
        again = scorer.score([boxed("1/3"), boxed("1/2"), boxed("2/4")], ["0.5"] * 3)
        assert len(asked) == 3 and [s.accuracy for s in (*first, *again)] == [1, 0, 0, 1, 1]
        monkeypatch.setattr(scorer_module, "REMEMBERED", 1)
        scorer.score([boxed("1/2")], ["0.5"])
        assert len(asked) == 3
        assert [s.accuracy for s in scorer.score([boxed("1/3")], ["0.5"])] == [0]
        assert len(asked) == 4  # the others were forgotten


# --- answers that would hang ----------------------------------------------------------------------

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


# --- kinds of answers ---

CASES = json.loads((Path(__file__).parent / "data" / "answers.json").read_text(encoding="utf-8"))


def test_how_many_answers_of_the_list_are_misjudged(scorer):
    scores = scorer.score([boxed(c["boxed"]) for c in CASES], [c["reference"] for c in CASES])
    wrong = [c for c, s in zip(CASES, scores, strict=True) if s.accuracy != c["right"]]
    assert sum(c["right"] for c in CASES) == 113 and len(CASES) == 173
    assert len([c for c in wrong if c["right"]]) <= 11, wrong
    assert len([c for c in wrong if not c["right"]]) <= 4, wrong
    assert scorer.failures == 0


KINDS = {
    "a choice is one letter, with or without text": (
        [
            ("B", "(B) 12"),
            ("B", "\\text{(B) } 12"),
            ("B", "Option (B)"),
            ("D", "D. Both A and B"),
            ("B", "B, since it is larger"),
            ("B", "B is correct"),
            ("B", "A is wrong, so B"),
            ("C", "The answer is C"),
            ("C", "not A but C"),
            ("C", "[C]"),
            ("B", "B: 3:4"),
        ],
        [
            ("B", "A or B"),
            ("B", "(A) or (B)"),
            ("B", "B, C"),
            ("B", "B and D"),
            ("A", "not A"),
            ("A", "A is wrong, so B"),
            ("A", "an apple"),
            ("A", "A triangle"),
            ("A", "AB"),
            ("B", "A. 12 or B. 13"),
            ("C", "cat"),
            ("B", "neither A nor B"),
            ("B", "B. C. D."),
        ],
    ),
    "a reference may be a choice with a stop, with text, or of several letters": (
        [
            ("(B) 12", "B"),
            ("(B) 12", "12"),
            ("B.", "(b)"),
            ("C: a cell", "C"),
            ("(C)", "c"),
            ("AC", "A, C"),
            ("AC", "C and A"),
            ("A and C", "AC"),
            ("ABC", "BCA"),
        ],
        [
            ("(B) 12", "(C) 12"),
            ("(B) 12", "C"),
            ("(B) 12", "13"),
            ("B.", "C."),
            ("AC", "A"),
            ("AC", "A, B"),
            ("AC", "ABC"),
            ("AC", "A or C"),
            ("A,B", "A,B,C"),
        ],
    ),
    "degrees": (
        [
            ("30°", "30 degrees"),
            ("30", "30°"),
            ("m\\angle ABC = 60^\\circ", "60"),
            ("25°C", "25"),
            ("\\angle B = 70°", "70^{\\circ}"),
            ("90º", "90"),
        ],
        [("30°", "60°"), ("25°C", "25°F"), ("90°", "9°"), ("30°", "30\\%"), ("30", "30°30'")],
    ),
    "Unicode is LaTeX": (
        [
            ("√5", "\\sqrt{5}"),
            ("√(16)", "4"),
            ("2⁵", "32"),
            ("¾", "0.75"),
            ("2½", "2.5"),
            ("−∞", "-\\infty"),
            ("π/2", "\\frac{\\pi}{2}"),
            ("x≤-1", "x\\leqslant -1"),
            ("１２", "12"),
            ("（B）", "B"),
            ("３：４", "3:4"),
            ("10⁻³", "0.001"),
            ("∛8", "2"),
        ],
        [
            ("√5", "5"),
            ("2⁵", "25"),
            ("½", "1/3"),
            ("∞", "-∞"),
            ("2π", "2"),
            ("x≥2", "x≤2"),
            ("x>2", "x≥2"),
            ("１２", "13"),
            ("10⁻³", "10^3"),
            ("√3/2", "3/2"),
        ],
    ),
    "thousands": (
        [
            ("12345", "12,345"),
            ("10000", "10 000"),
            ("2500", "2{,}500"),
            ("3000", "3\\,000"),
            ("\\$3,000", "3000"),
            ("1,500", "1500.0"),
            ("5,000 m", "5000"),
        ],
        [
            ("1,234", "1,235"),
            ("1,000", "1"),
            ("12,345", "12.345"),
            ("10", "1,0"),
            ("1,2,3", "123"),
            ("(1,200)", "1200"),
            ("1,000", "1, 0000"),
        ],
    ),
    "mixed numbers": (
        [("3/2", "1 1/2"), ("1\\frac12", "1.5"), ("-1\\frac{1}{2}", "-1.5"), ("2 1/3", "7/3")],
        [("3/2", "1/2"), ("1\\frac12", "1\\frac13"), ("2 1/3", "2/3"), ("7/3", "21/3")],
    ),
    "units": (
        [
            ("7 kg", "7"),
            ("15 km/h", "15 kph"),
            ("8 inches", "8 in"),
            ("20 ft²", "20 sq ft"),
            ("9.8 \\text{ m/s}^2", "9.8 m/s²"),
            ("6π cm²", "6\\pi"),
            ("5", "5 apples"),
            ("5 dollars", "\\$5"),
            ("16 \\mathrm{~cm}", "16"),
            ("3 人", "3"),
            ("0.5", "1/2 hour"),
            ("3 cm and 4 cm", "3, 4"),
            ("0.75", "75%"),
            ("75%", "75"),
            ("2ab", "2ba"),
        ],
        [
            ("7 kg", "7 g"),
            ("7 m", "7 m^2"),
            ("15 km/h", "15 m/s"),
            ("5 apples", "5 pears"),
            ("12", "12x"),
            ("12", "12i"),
            ("12", "12 million"),
            ("12", "12 or 14"),
            ("5", "5t"),
            ("1", "1lar"),
            ("12", "12 boys and 13 girls"),
            ("6π cm", "6 cm"),
            ("5", "5 ft 3 in"),
            ("75%", "7.5"),
            ("12", "not 12"),
            ("0.5", "0.5%"),
            ("3 cm and 4 cm", "3, 5"),
            ("12", "12!"),
        ],
    ),
    "tiny numbers and rounded ones": (
        [
            ("1/3", "0.333333"),
            ("1/7", "0.142857"),
            ("1e-9", "0.000000001"),
            ("10^{-9}", "1\\times10^{-9}"),
            ("2\\sqrt{2}", "2.828427"),
            ("0.1", "0.10000000000000001"),
        ],
        [
            ("1/3", "0.3333"),
            ("2\\sqrt2", "2.83"),
            ("0", "10^{-12}"),
            ("10^{-9}", "10^{-8}"),
            ("10^{-9}", "0"),
            ("\\frac{1}{3^{80}}", "\\frac{1}{3^{81}}"),
            ("1e-9", "2e-9"),
            ("10^{-20}\\pi", "10^{-21}\\pi"),
            ("(10^{-9},1)", "(10^{-8},1)"),
            ("1000000", "1000001"),
            ("12345.6", "12345.7"),
            ("0.5", "0.5000001"),
        ],
    ),
    "words": (
        [
            ("UK", "U.K."),
            ("on", "On."),
            ("Na", "Na"),
            ("the dog", "dog"),
            ("an apple", "apple"),
            ("Yes", "Yes, because it is"),
            ("seven", "7"),
            ("21", "twenty-one"),
            ("xy", "yx"),
            ("Fe2O3", "\\mathrm{Fe_2O_3}"),
            ("room 12", "Room 12"),
            ("7:30 PM", "7:30 p.m."),
        ],
        [
            ("on", "no"),
            ("UK", "KU"),
            ("TV", "VT"),
            ("XYZ", "ZYX"),
            ("XI", "IX"),
            ("Al", "La"),
            ("Fe2O3", "Fe3O2"),
            ("Room 12", "Room 21"),
            ("7:30 PM", "7:30 AM"),
            ("left", "not left"),
            ("cos", "cso"),
            ("seven", "8"),
            ("No", "Not"),
            ("red", "red and blue"),
        ],
    ),
    "sets and inequalities": (
        [("[2,\\infty)", "x\\ge 2"), ("1 and -2", "-2, 1"), ("\\pm 2", "2, -2")],
        [("[2,\\infty)", "x>2"), ("1 and -2", "1"), ("[2,3]", "(2,3)"), ("\\pm 2", "2")],
    ),
}
"""Kind → (reference, boxed answer) that are equal, and that are not."""


def misjudged(scorer, right, wrong):
    pairs = [*right, *wrong]
    scores = scorer.score([boxed(c) for _, c in pairs], [r for r, _ in pairs])
    accuracies = [s.accuracy for s in scores]
    return [
        p
        for p, a, i in zip(pairs, accuracies, range(len(pairs)), strict=True)
        if a != (i < len(right))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_answer(scorer, kind):
    assert misjudged(scorer, *KINDS[kind]) == []


LATEX = [
    *"0123456789abcxyzABCDE.,;:!?^_{}()[]|+-*/=<>$%&#~ '\"\n\t",
    *("\\", "\\frac", "\\sqrt", "\\text{", "\\boxed{", "\\left(", "\\right)", "\\pi", "\\{", "\\}"),
    *(
        "\\times",
        "^{",
        "_{",
        "\\begin{",
        "\\sum",
        "\\int",
        "°",
        "½",
        "√",
        "²",
        "π",
        "１",
        "（",
        "个",
    ),
    *(
        " or ",
        " and ",
        "is wrong",
        "cm",
        "\\,",
        "10^",
        "9^{",
        "\ud83d\ude00",
        "\x00",
        "\u200b",
        "<think>",
    ),
]


@given(st.lists(st.sampled_from(LATEX), max_size=40), st.lists(st.sampled_from(LATEX), max_size=40))
@settings(max_examples=1000, deadline=2000)
def test_any_text_can_be_judged_by_reading(reference, candidate):
    judged = judge("".join(reference), "".join(candidate))
    assert isinstance(judged, bool | Algebra)
    if isinstance(judged, Algebra):
        assert [answer_check.too_large(x) in (True, False) for x in judged]


@pytest.mark.parametrize("piece", [*LATEX, "1 ", "a ", "A or ", "{(", "A is "])
def test_a_long_repetition_costs_little_to_read(piece):
    text = piece * (3900 // len(piece))
    started = time.process_time()
    for pair in ((text, "x"), ("x", text), ("B", text), (text, text + "1"), ("12", text)):
        judged = judge(*pair)
        if isinstance(judged, Algebra):
            [answer_check.too_large(x) for x in judged]
    assert time.process_time() - started < 8.0  # a busy machine's caches cost CPU time too
    started = time.process_time()
    huge = boxed(piece * (200_000 // len(piece)))
    has_format(huge), last_boxed(huge), reading(huge)
    assert time.process_time() - started < 8.0


def test_random_latex_never_raises_nor_takes_over_the_limit():
    with Scorer(RewardConfig(timeout=LIMIT, workers=2)) as scorer:
        draw = random.Random(0)
        texts = ["".join(draw.choices(LATEX, k=draw.randint(1, 12))) for _ in range(200)]
        started = time.process_time() + cpu_seconds_of_ended_workers()
        scores = scorer.score([boxed(text) for text in texts], ["x + \\frac{1}{2}"] * len(texts))
        slow = sum(s.timed_out for s in scores)
    seconds = time.process_time() + cpu_seconds_of_ended_workers() - started
    assert len(scores) == 200
    # The workers' starts, a limit for each that hung, and the comparisons.
    assert seconds < 60 and slow <= 4, (seconds, slow)


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


@pytest.mark.parametrize("candidate", ["8-", "8+", "8*", "8/", "8=", "8^", "8 -", "8("])
def test_an_answer_that_ends_in_an_operator_is_not_the_number_before_it(scorer, candidate):
    response = f"<think>5+3</think>\\boxed{{{candidate}}}"
    (score,) = scorer.score([response], ["8"])
    assert score.accuracy == 0
