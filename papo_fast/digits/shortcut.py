"""The task `digits-shortcut`: the questions of `digits`, with hints that are mostly right.

The text of every training question ends with a hint, such as "Hint: 12", which is the right answer
in `RIGHT` of all rows. A policy that copies the hint and never looks is rewarded for most rows.
Test questions have a hint that is right, none, or one that misleads, in equal parts, and the
evaluation counts each of them apart: a policy that does not look fails where the hint misleads.

Nothing in the text tells a misleading hint from a right one: it is the right answer of another
question of the same sort, so that both look alike and neither is nearer to the truth than chance.

The warm start must not decide the outcome, either way. A third of its questions have a right hint,
a third a misleading one and a third none: it has learned that a hint may be worth following, and
that it is not to be trusted. It follows 9 % of the misleading ones (seed 0), and 160 steps of GRPO
made that 35 % while right hints were answered right in 95 % instead of 53 %: there is something to
be caught, and room on both sides of it. If all of its hints were right, it would copy them from the
start. If they said nothing, it would learn to ignore them: with such a warm start 120 steps of GRPO
did not find out that hints had become worth something. Where the warm start ends is decided on
questions without hints, so that it looks as well as that of `digits`.

Pictures and questions are those of `digits` with the same seed: the tasks differ in hints alone.
"""

from __future__ import annotations

import random
from dataclasses import replace

from papo_fast.digits.task import KINDS, Question, draw_question

RIGHT = 0.8
"""Share of training rows whose hint is the right answer; in the others it misleads."""
HINTS = ("right", "absent", "misleading")


def equal_parts(number: int, question: Question, rng: random.Random) -> Question:
    """For warm start and test: each of `HINTS` equally often for each kind, which come in turn."""
    return _hinted(question, HINTS[number // len(KINDS) % len(HINTS)], rng)


def train_hint(_number: int, question: Question, rng: random.Random) -> Question:
    """For training: right in `RIGHT` of all rows, and else misleading."""
    return _hinted(question, "right" if rng.random() < RIGHT else "misleading", rng)


def hint_of(problem: str) -> str | None:
    """The number that the hint of a question says, or None where it has no hint."""
    _, found, rest = problem.partition("Hint: ")
    return rest.split()[0] if found else None


def _hinted(question: Question, hint: str, rng: random.Random) -> Question:
    """`question` with that hint, which its kind names from then on."""
    if hint == "right":
        question = _with_hint(question, question.answer)
    elif hint == "misleading":
        number = question.answer
        while number == question.answer:
            number = _answer_of_another(question, rng)
        question = _with_hint(question, number)
    return replace(question, kind=f"{question.kind}, hint {hint}")


def _with_hint(question: Question, number: str) -> Question:
    text = question.problem.removesuffix(" <image>")
    return replace(question, problem=f"{text} Hint: {number} <image>")


def _answer_of_another(question: Question, rng: random.Random) -> str:
    """The answer of a question that asks for the same sort of thing, drawn independently."""
    while True:
        other = draw_question("vision_dependent", rng)
        if _sort(other.problem) == _sort(question.problem):
            return other.answer


def _sort(problem: str) -> str:
    """`Compute`, `Count`, or `Which` with what it asks for."""
    first, second, third, *_ = [*problem.split(), "", ""]
    return f"{first} {second} {third}" if first == "Which" else first.rstrip(".")
