"""Which examples a report shows, and how runs save them."""

import json

import numpy as np
import pytest
from PIL import Image

from papo_fast.report import read_run, save_examples
from papo_fast.report.examples import choose, is_right
from papo_fast.report.figure import draw
from papo_fast.rewards.reading import reading
from support.reports import WRONG, example, picture, texts, write_run

RIGHT, LUCKY = "<think>7+5</think>\\boxed{12}", "<think>8+4</think>\\boxed{12}"
UNREAD = "\\boxed{12}"


def test_choice_prefers_vision_dependent_and_keeps_wrong_ones():
    def row(i, kind, accuracy, when="after"):
        return {"when": when, "problem": str(i), "kind": kind, "accuracy": accuracy}

    rows = [row(i, "text_leaning", 1.0) for i in range(9)]
    rows += [row(10 + i, "vision_dependent", 1.0) for i in range(9)]
    rows += [row(20 + i, "vision_dependent", 0.0) for i in range(3)]
    rows += [row(30, "vision_dependent", 0.0, when="before")]
    chosen = choose(rows)
    assert [r["problem"] for r in chosen] == ["10", "11", "12", "13", "20", "21"]
    assert [r["problem"] for r in choose(rows[:9])] == ["0", "1", "2", "3", "4", "5"]
    assert len(choose([row(i, "x", 0.0) for i in range(9)])) == 6
    assert len(choose(rows[18:])) == 3
    assert [r["problem"] for r in choose(rows[-1:])] == ["30"]


def test_choice_does_not_show_samples_of_one_question_twice():
    same = [{"when": "after", "problem": "a", "image": "1", "accuracy": 1.0}] * 8
    other = [{"when": "after", "problem": str(i), "image": "2", "accuracy": 1.0} for i in range(5)]
    assert sorted(r["problem"] for r in choose(same + other)) == ["0", "1", "2", "3", "4", "a"]


def told(i, response, accuracy, when="after", **changes):
    """A row of examples.jsonl: question `i`, whose picture shows 7+5."""
    row = {"when": when, "problem": f"Compute {i}.", "kind": "vision_dependent", "answer": "12"}
    row |= {"reading": "7+5", "response": response, "accuracy": accuracy, "reward": accuracy}
    return row | changes


def test_a_right_answer_with_a_wrong_reading_is_never_shown(tmp_path):
    for when in ("before", "after"):
        lucky = [told(i, text, 1.0, when) for i, text in enumerate([LUCKY, UNREAD] * 8)]
        assert choose(lucky) == []
        rows = [*lucky, told(20, RIGHT, 1.0, when), told(21, WRONG, 0.0, when)]
        assert [row["problem"] for row in choose(rows)] == ["Compute 20.", "Compute 21."]
    # where nobody says what there is to read, an answer is as good as another
    assert len(choose([told(i, LUCKY, 1.0, reading=None) for i in range(6)])) == 6
    run = write_run(tmp_path / "run", examples=[example(response=LUCKY), example(response=WRONG)])
    words = texts(draw(read_run(run)))
    assert "8+4" not in words and "1 right answer with a wrong reading is left out" in words
    only = write_run(tmp_path / "only", examples=[example(response=LUCKY)])
    assert "Examples" not in texts(draw(read_run(only)))


def test_what_training_put_right_is_shown_first():
    before = [told(i, WRONG if i in (5, 9) else RIGHT, float(i not in (5, 9)), "before")
              for i in range(10)]  # fmt: skip
    after = [told(i, RIGHT, 1.0) for i in range(8)] + [told(8, WRONG, 0.0), told(9, LUCKY, 1.0)]
    after[5]["kind"] = before[5]["kind"] = "text_leaning"
    chosen = choose(before + after)
    numbers = [int(row["problem"].split()[1][:-1]) for row in chosen]
    assert numbers == [5, 0, 1, 2, 3, 8]
    assert choose(before + after) == chosen
    assert not any(is_right(row) and reading(row["response"]) != "7+5" for row in chosen)


def test_the_same_question_twice_is_paired_in_the_order_of_the_file():
    before = [told(1, RIGHT, 1.0, "before", image="a"), told(1, WRONG, 0.0, "before", image="b")]
    after = [told(1, RIGHT, 1.0, image="a"), told(1, RIGHT, 1.0, image="b")]
    assert [row["image"] for row in choose(before + after)] == ["b", "a"]


def test_examples_of_before_and_after_live_together(tmp_path):
    save_examples(tmp_path, [example(when="before", response="b", corrupted=None)])
    save_examples(tmp_path, [example(response="old"), example(response="old")])
    save_examples(tmp_path, [example(response="new", image=picture("12"))])
    rows = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [(r["when"], r["response"]) for r in rows] == [("before", "b"), ("after", "new")]
    assert rows[0]["corrupted"] is None
    with Image.open(tmp_path / rows[1]["image"]) as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture("12")))
    with pytest.raises(ValueError, match="'during'"):
        save_examples(tmp_path, [example(when="during")])
