"""Rewards: format, answers that need no parser, math-verify, and what a scorer promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papo_fast.config import RewardConfig
from papo_fast.errors import InputError
from papo_fast.rewards import scorer as scorer_module
from papo_fast.rewards.reading import reading
from papo_fast.rewards.scorer import Scorer, equal_as_text, has_format, last_boxed
from support.scoring import LIMIT, boxed, is_right

pytestmark = pytest.mark.usefixtures("cpu_time_alone_is_limited")


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
