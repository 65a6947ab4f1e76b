"""The built-in task: right answers, honest splits, an ordinary checkpoint."""

from __future__ import annotations

import dataclasses
import io
import random
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

from papo_fast.config import DataConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.prompts import PromptDataset
from papo_fast.digits import shortcut
from papo_fast.digits.model import build_checkpoint
from papo_fast.digits.task import (
    CELL,
    KINDS,
    WIDTH,
    Handwriting,
    draw_question,
    response,
    write_questions,
)
from papo_fast.digits.warmstart import cache_folder
from papo_fast.evaluate import Evaluation, error_shares
from papo_fast.presets import get_preset
from papo_fast.rewards.reading import reading
from papo_fast.rewards.scorer import Score
from papo_fast.samples import Completion, Group, Sample

DATA = DataConfig(prompt_suffix="", min_pixels=CELL * CELL, max_pixels=CELL * CELL * 64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "model"
    build_checkpoint(path, seed=0)
    return path


def solve(question: str, shown: str) -> int:
    """An independent solver that reads the picture's symbols."""
    if question.startswith("Compute"):
        return eval(shown)  # digits, + and - only
    if question.startswith("Count"):
        return shown.count(question.split()[1].rstrip("."))
    numbers = [int(part) for part in shown.split()]
    return max(numbers) if "larger" in question else min(numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_picture_and_hints_are_true(kind):
    rng = random.Random(1)
    hints = set()
    for _ in range(2000):
        q = draw_question(kind, rng)
        text = q.problem.removesuffix(" <image>")
        assert int(q.answer) == solve(q.problem, q.symbols)
        assert q.reading == q.symbols.replace(" ", ",")
        if " Given: " in text:
            assert text.endswith(q.reading)
            hints.add("all")
        if " First: " in text:
            assert q.reading.startswith(text.split("First: ")[1])
            hints.add("first")
        if " Choose: " in text:
            options = text.split("Choose: ")[1].split(" or ")
            assert q.answer in options and len(set(options)) == 2
            hints.add("choice")
    assert hints == (set() if kind == "vision_dependent" else {"all", "first", "choice"})


def test_no_handwriting_of_test_questions_is_seen_in_training_or_warm_start_checks():
    ink = {
        split: {i.tobytes() for digit in Handwriting(split).digits.values() for i in digit}
        for split in ("train", "dev", "test")
    }
    assert {split: len(i) for split, i in ink.items()} == {"train": 1097, "dev": 200, "test": 500}
    assert not ink["test"] & (ink["train"] | ink["dev"])


def test_the_file_is_the_same_each_time_and_holds_the_pictures_it_speaks_of(tmp_path):
    for name in ("a", "b"):
        write_questions(tmp_path / f"{name}.parquet", 40, "test", seed=3)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert [r["kind"] for r in rows] == [KINDS[i % 2] for i in range(40)]
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row["images"][0])))
        shown = row["reading"].replace(",", " ").ljust(WIDTH)
        assert pixels.shape == (CELL, CELL * WIDTH)
        ink = (255.0 - pixels).reshape(CELL, WIDTH, CELL).sum(axis=(0, 2)) / 255
        for symbol, amount in zip(shown, ink, strict=True):
            low, high = {" ": (0, 0), "-": (24, 24), "+": (44, 44)}.get(symbol, (50, 400))
            assert low <= amount <= high, (symbol, amount)


def test_the_checkpoint_loads_like_any_other_and_one_cell_is_one_token(checkpoint, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = response("37+5", "42")
    assert text == "<think>37+5</think>\\boxed{42}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == 10  # every digit and tag is one token
    write_questions(tmp_path / "q.parquet", 6, "train", seed=0)
    encoder = PromptEncoder(checkpoint, DATA)
    for prompt in PromptDataset(tmp_path / "q.parquet", DATA, encoder):
        image_tokens = int((prompt.encoded.input_ids == encoder.image_token_id).sum())
        assert image_tokens == WIDTH


@pytest.mark.parametrize("preset", ["tiny", "tiny-grpo"])
def test_every_right_response_fits_into_the_default_jobs_length_limit(checkpoint, preset):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rng = random.Random(2)
    questions = [draw_question(kind, rng) for kind in KINDS for _ in range(1000)]
    texts = {response(q.reading, q.answer) for q in questions}
    longest = max(len(tokenizer.encode(text)) + 1 for text in texts)  # and the end
    assert longest <= get_preset(preset).rollout.max_new_tokens
    assert longest == 12


def test_the_same_seed_builds_the_same_model(tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_checkpoint(tmp_path / name, seed)
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / name)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_wrong_answers_split_into_misread_and_miscalculated(tmp_path, checkpoint):
    write_questions(tmp_path / "q.parquet", 2, "train", seed=0)
    prompts = list(PromptDataset(tmp_path / "q.parquet", DATA, PromptEncoder(checkpoint, DATA)))
    vision, leaning = prompts
    assert (vision.kind, leaning.kind) == KINDS
    right = response(vision.reading, vision.answer)

    def sample(text, accuracy):
        return Sample(Completion([], [], True), text, Score(accuracy, accuracy, 1.0, False))

    groups = [
        Group(
            vision,
            [
                sample(right, 1.0),
                sample(response("9999", vision.answer), 1.0),  # right by luck: no error
                sample(response(vision.reading, "-1"), 0.0),
                sample(response("9999", "-1"), 0.0),
                sample("<think>never closed", 0.0),
            ],
        ),
        # not a vision-dependent question
        Group(leaning, [sample(response("9999", "-1"), 0.0)]),
    ]
    assert error_shares(groups) == (2 / 5, 1 / 5)
    assert error_shares(groups[-1:]) == (None, None)
    assert reading("<think> 3+4 </think>\\boxed{7}") == "3+4"


def test_the_default_tasks_cache_has_the_name_that_it_always_had():
    tiny = get_preset("tiny")
    assert cache_folder(tiny).name == "17675f89958b"
    for name, value in (("task", "digits-shortcut"), ("held_out", "dev")):
        other = dataclasses.replace(tiny, digits=dataclasses.replace(tiny.digits, **{name: value}))
        assert cache_folder(other) != cache_folder(tiny)


def rows_of(path, n, change, split="train"):
    write_questions(path, n, split, 0, change)
    return pq.read_table(path).to_pylist()


def test_hints_change_the_text_alone(tmp_path):
    plain = rows_of(tmp_path / "plain.parquet", 60, None)
    for change in (shortcut.equal_parts, shortcut.train_hint):
        hinted = rows_of(tmp_path / "hinted.parquet", 60, change)
        for a, b in zip(plain, hinted, strict=True):
            assert {k: a[k] for k in ("answer", "images", "reading")} == {
                k: b[k] for k in ("answer", "images", "reading")
            }
            number = shortcut.hint_of(b["problem"])
            hint = "" if number is None else f" Hint: {number}"
            assert b["problem"] == a["problem"].removesuffix(" <image>") + hint + " <image>"
            assert b["kind"].partition(",")[0] == a["kind"]


def drawn(change, n=6000):
    rng = random.Random(5)
    questions = [draw_question(KINDS[i % 2], rng) for i in range(n)]
    return [(q, change(i, q, rng)) for i, q in enumerate(questions)]


def test_training_hints_are_right_in_four_rows_of_five_and_others_come_in_equal_parts():
    for change, shares in (
        (shortcut.train_hint, {"right": 0.8, "misleading": 0.2}),
        (shortcut.equal_parts, dict.fromkeys(shortcut.HINTS, 1 / 3)),
    ):
        pairs = drawn(change)
        kinds = Counter(hinted.kind for _, hinted in pairs)
        assert set(kinds) == {f"{kind}, hint {hint}" for kind in KINDS for hint in shares}
        for kind, n in kinds.items():
            assert n / 3000 == pytest.approx(shares[kind.rpartition(" ")[2]], abs=0.03)
        for question, hinted in pairs:
            number = shortcut.hint_of(hinted.problem)
            assert {
                "right": number == question.answer,
                "absent": number is None,
                "misleading": number not in (None, question.answer),
            }[hinted.kind.rpartition(" ")[2]]


def test_a_misleading_hint_looks_like_a_right_one():
    numbers = {"right": Counter(), "misleading": Counter()}
    for question, hinted in drawn(shortcut.train_hint, 30_000):
        if question.problem.startswith("Compute"):
            numbers[hinted.kind.rpartition(" ")[2]][shortcut.hint_of(hinted.problem)] += 1
    for number in map(str, range(20)):
        right, wrong = (c[number] / c.total() for c in numbers.values())
        assert wrong == pytest.approx(right, abs=0.02)


def test_the_honesty_check_is_of_questions_that_the_text_answers(tmp_path, checkpoint):
    write_questions(tmp_path / "q.parquet", 12, "test", 0, shortcut.equal_parts)
    prompts = list(PromptDataset(tmp_path / "q.parquet", DATA, PromptEncoder(checkpoint, DATA)))

    def group(prompt, *accuracies):
        scores = [Score(a, a, 1.0, False) for a in accuracies]
        return Group(prompt, [Sample(Completion([], [], True), "", score) for score in scores])

    groups = [group(p, *((1.0, 0.0) if p.kind.startswith("text") else (0.0, 0.0))) for p in prompts]
    entries = Evaluation({"a": 0.1}, None, None, groups).corrupted_summary("before")
    assert entries == {"accuracy_before_corrupted": {"a": 0.1}, "honesty_before": 0.5}
    only_vision = Evaluation({}, None, None, groups[::2]).corrupted_summary("after")
    assert only_vision == {"accuracy_after_corrupted": {}}
    assert error_shares(groups) == (1.0, 0.0)  # all hints count, and nothing was read
