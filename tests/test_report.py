"""The report of one run, full, unfinished, empty or hostile: its picture and its table."""

import json

import numpy as np
import pytest
from PIL import Image

from papo_fast.errors import InputError
from papo_fast.report import print_run, print_summary, read_run, write_report
from papo_fast.report.curves import smooth
from papo_fast.report.figure import draw
from support.reports import (
    SUMMARY,
    assert_nothing_overlaps,
    corrupt,
    example,
    picture,
    printed,
    texts,
    write_run,
)

HOSTILE = [
    "an unbalanced $ and \\frac{1}{2 x_1^{ \\boxed{",
    "$" * 301,
    "x" * 5000,
    "word " * 1000 + "\\boxed{42}",
    "one\ntwo\n\n\n\tthree\r\n\x00\x07\x1b[31m",
    "🙂🎉 中文 e\u0301\u0302\u0303 \u202eright to left\u200d שלום",
]


def test_full_run_is_drawn_with_everything(tmp_path):
    shown = [example(), example(problem="Count 9.", response="\\boxed{3}", accuracy=0.0)]
    run = write_run(tmp_path / "run", examples=shown, summary=SUMMARY)
    path = write_report(run)
    assert path == run / "report.png"
    with Image.open(path) as image:
        assert image.width == 1500
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0)):
        assert (pixels == colour).all(axis=1).sum() > 50, colour
    figure = draw(read_run(run))
    words = texts(figure)
    assert "tiny, seed 7" in words and "40 steps · 5 min 12 s · 012345678" in words
    assert "vision-dependent 36.2 → 74.1 % (images corrupted: 23.1)" in words
    assert "✓ right, reward 1.00" in words and "✗ wrong, reward 1.00" in words
    assert "expected 12" in words
    assert "not recorded" not in words and "no " not in words
    assert_nothing_overlaps(figure)


def test_curves_hold_the_logged_values(tmp_path):
    run = write_run(tmp_path / "run")
    rows = read_run(run).rows
    figure = draw(read_run(run))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    raw = [line for line in panels["Clipped tokens, %"].lines if line.get_alpha()]
    for line, key in zip(raw, ("clip_fraction_high", "clip_fraction_low"), strict=True):
        np.testing.assert_allclose(line.get_xdata(), [row["step"] for row in rows])
        np.testing.assert_allclose(line.get_ydata(), [100 * row[key] for row in rows])
    assert [t.get_text() for t in panels["Entropy, nats"].texts] != []


def test_pictures_are_drawn_pixel_by_pixel(tmp_path):
    run = write_run(tmp_path / "run", examples=[example()])
    images = [axes.images[0] for axes in draw(read_run(run)).axes if axes.images]
    assert [image.get_interpolation() for image in images] == ["nearest"] * 2
    np.testing.assert_array_equal(images[0].get_array(), np.asarray(picture("7+5")))
    np.testing.assert_array_equal(images[1].get_array(), np.asarray(corrupt(picture("7+5"))))


def test_smoothing_keeps_a_constant_and_leaves_gaps_out():
    values = np.full(50, 3.0)
    values[[0, 7, 8, 49]] = np.nan
    np.testing.assert_allclose(smooth(values, 2.0), 3.0)
    noisy = np.random.default_rng(0).normal(size=400)
    assert smooth(noisy, 5.0)[20:-20].std() < 0.35 * noisy.std()


def test_unfinished_run_is_drawn_with_a_note(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    words = texts(draw(read_run(run)))
    assert "3 steps so far" in words
    assert "line 4 was cut short" in words
    assert "No summary.json" in words and "No examples.jsonl" in words
    said = printed(print_run, run)
    assert "Training so far, 3 steps" in said and "cut short" in said and "report.png" in said
    with Image.open(run / "report.png") as image:
        assert image.width == 1500


def test_run_that_has_only_examples_from_before_is_drawn(tmp_path):
    run = write_run(tmp_path / "run", steps=0, examples=[example(when="before")])
    words = texts(draw(read_run(run)))
    assert "Examples before training" in words and "No training step yet" in words
    with pytest.raises(InputError, match="no step yet"):
        printed(print_run, run)


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_constant_zero_and_missing_metrics_are_drawn(tmp_path, steps):
    flat = {"clip_fraction_high": 0.0, "clip_fraction_low": 0.0, "kl_prcp": None, "entropy": -1.0}
    run = write_run(tmp_path / "run", steps=steps, **flat, response_length=None, grad_norm=2.0)
    figure = draw(read_run(run))
    words = texts(figure)
    assert words.count("not recorded") == 1
    assert "Gradient norm" in words and "Response length" not in words
    assert_nothing_overlaps(figure)


def test_infinite_values_in_the_log_do_not_stop_the_report(tmp_path):
    run = write_run(tmp_path / "run", steps=5, reward=float("nan"), kl_prcp=float("inf"))
    assert texts(draw(read_run(run))).count("not recorded") == 2


@pytest.mark.parametrize("damaged", ["empty", "cut", "missing"])
def test_unreadable_picture_is_named_in_its_place(tmp_path, damaged):
    run = write_run(tmp_path / "run", examples=[example()])
    file = run / "examples" / "after-000.png"
    data = file.read_bytes()
    file.unlink()
    if damaged != "missing":
        file.write_bytes(data[: 0 if damaged == "empty" else len(data) // 2])
    words = texts(draw(read_run(run)))
    assert "after-000.png" in words.replace("\n", "")


def test_run_without_aug_stream_has_one_row_of_pictures(tmp_path):
    run = write_run(tmp_path / "run", examples=[example(corrupted=None)] * 2)
    figure = draw(read_run(run))
    assert sum(bool(axes.images) for axes in figure.axes) == 2
    assert "corrupted copy" not in texts(figure)


@pytest.mark.parametrize("key", ["response", "problem", "answer"])
def test_hostile_text_is_printed_literally_and_stays_in_its_place(tmp_path, key):
    rows = [
        example(
            **{key: text, "accuracy": i % 2, "problem" if key != "problem" else "kind": str(i)},
            reading=None,
        )
        for i, text in enumerate(HOSTILE)
    ]
    run = write_run(tmp_path / "run", examples=rows, summary=SUMMARY | {"preset": "$x_1"})
    figure = draw(read_run(run))
    assert_nothing_overlaps(figure)
    if key == "response":
        words = texts(figure).replace("\n", "")
        assert "an unbalanced $ and\\frac{1}{2 x_1^{\\boxed{" in words.replace("and ", "and")
        assert "\\boxed{42}" in words  # the end of a long response is kept
        assert "characters …" in words
        assert "\x00" not in words and "🙂" not in words


def test_no_warning_about_missing_glyphs(tmp_path, recwarn):
    write_report(
        write_run(tmp_path / "run", examples=[example(response=HOSTILE[-1], reading=None)])
    )
    assert [str(w.message) for w in recwarn if "lyph" in str(w.message)] == []


def test_long_questions_and_many_kinds_wrap(tmp_path):
    question = "In the figure, triangle $ABC$ is inscribed in a circle. " * 6
    kinds = {f"kind_number_{i}": i / 10 for i in range(6)}
    summary = SUMMARY | {"accuracy_before": kinds, "accuracy_after": kinds}
    rows = [example(problem=question, image=Image.new("L", (w, 300))) for w in (40, 900, 300)]
    figure = draw(read_run(write_run(tmp_path / "run", examples=rows, summary=summary)))
    assert "kind-number-5 50.0 → 50.0 %" in texts(figure).replace("\n", " ")
    assert_nothing_overlaps(figure)


def test_alarms_are_marked_and_told(tmp_path):
    run = write_run(tmp_path / "run", steps=30)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[19]["alarms"] = ["both entropies rose"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = draw(read_run(run))
    assert "collapse alarms at step 20. First: both entropies rose" in texts(figure)
    marks = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "^"]
    assert len(marks) == 6 and all(list(line.get_xdata()) == [20.0] for line in marks)
    assert "step 20" in printed(print_run, run)


def test_table_has_accuracies_differences_and_error_shares():
    lines = printed(print_summary, SUMMARY).splitlines()

    def cells(start):
        line = next(line for line in lines if line.startswith(f"│ {start}"))
        return [cell.strip() for cell in line.strip("│").split("│")][1:]

    assert any("mean@8" in line for line in lines)
    assert cells("vision-dependent") == ["36.2 %", "74.1 %", "+37.9", "23.1 %", "-51.0"]
    assert cells("text-leaning") == ["50.0 %", "47.0 %", "-3.0", "47.1 %", "+0.1"]
    assert cells("perception") == ["41.0 %", "17.0 %", "-24.0"]
    assert cells("reasoning") == ["22.8 %", "8.9 %", "-13.9"]


def test_table_leaves_dashes_for_what_was_not_measured():
    said = printed(print_summary, {"preset": "grpo", "accuracy_before": {"[b]all[/b]": 0.5}})
    assert "50.0 %" in said and "–" in said and "preset grpo" in said
    assert "[b]all[/b]" in said
    assert "Errors" not in said


def test_report_of_something_else_says_what_is_there_and_which_runs_exist(tmp_path):
    write_run(tmp_path / "good", steps=1)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="no such directory") as error:
        printed(print_run, tmp_path / "goood")
    assert str(tmp_path / "good") in str(error.value)
    with pytest.raises(InputError, match="directory is empty") as error:
        write_report(tmp_path / "other")
    assert str(tmp_path / "good") in str(error.value)
    with pytest.raises(InputError, match="good/, other/") as error:  # the folder of runs itself
        write_report(tmp_path)
    assert str(tmp_path / "good") in str(error.value)
    with pytest.raises(InputError, match="expected a directory"):
        write_report(tmp_path / "good" / "config.json")


def test_empty_run_is_an_error_that_says_so(tmp_path):
    write_run(tmp_path / "good", steps=1)
    run = write_run(tmp_path / "run", steps=0)
    (run / "metrics.jsonl").touch()
    for call in (write_report, lambda run: printed(print_run, run)):
        with pytest.raises(InputError, match=r"has no metrics yet.*config.json, metrics.jsonl"):
            call(run)
    assert not (run / "report.png").exists()


def test_damaged_summary_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text('{"steps": ')
    with pytest.raises(InputError, match=r"summary.json is not JSON"):
        write_report(run)
