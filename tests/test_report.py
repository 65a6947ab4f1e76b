"""The report: table and picture of full, unfinished, empty and hostile runs."""

import io
import itertools
import json
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw
from rich.console import Console

from papo_fast.cli import main
from papo_fast.errors import InputError
from papo_fast.report import print_run, print_summary, read_run, save_examples, write_report
from papo_fast.report.curves import smooth, spread
from papo_fast.report.examples import choose, is_right
from papo_fast.report.figure import draw
from papo_fast.report.naming import name_runs
from papo_fast.rewards.reading import reading
from papo_fast.run.metrics import MetricsLog

SUMMARY = {
    "preset": "tiny",
    "seed": 7,
    "git_commit": "0123456789abcdef",
    "steps": 40,
    "seconds": 312.4,
    "samples_per_question": 8,
    "accuracy_before": {"vision_dependent": 0.362, "text_leaning": 0.5},
    "accuracy_after": {"vision_dependent": 0.741, "text_leaning": 0.47},
    "accuracy_after_corrupted": {"vision_dependent": 0.231, "text_leaning": 0.471},
    "perception_errors_before": 0.41,
    "perception_errors_after": 0.17,
    "reasoning_errors_before": 0.228,
    "reasoning_errors_after": 0.089,
}
HOSTILE = [
    "an unbalanced $ and \\frac{1}{2 x_1^{ \\boxed{",
    "$" * 301,
    "x" * 5000,
    "word " * 1000 + "\\boxed{42}",
    "one\ntwo\n\n\n\tthree\r\n\x00\x07\x1b[31m",
    "🙂🎉 中文 e\u0301\u0302\u0303 \u202eright to left\u200d שלום",
]


def picture(text: str) -> Image.Image:
    image = Image.new("RGB", (28 * len(text), 28), "white")
    for i, char in enumerate(text):
        ImageDraw.Draw(image).text((28 * i + 8, 4), char, fill="black", font_size=18)
    return image


def corrupt(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.paste((0, 0, 0), (0, 0, 28, 14))
    return image


def example(**changes) -> dict:
    row = {"when": "after", "problem": "Compute.", "kind": "vision_dependent", "answer": "12"}
    row |= {"reading": "7+5", "response": "<think>7+5</think>\\boxed{12}", "reward": 1.0}
    row |= {"accuracy": 1.0, "image": picture("7+5"), "corrupted": corrupt(picture("7+5"))}
    return row | changes


def write_run(path, steps=40, examples=(), summary=None, **changes):
    rng = random.Random(0)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"preset": "tiny", "seed": 7}))
    if steps:
        with MetricsLog(path / "metrics.jsonl") as log:
            for step in range(1, steps + 1):
                row = {"step": step, "seconds": 3.0 * step, "reward": rng.random()}
                row |= {"accuracy": rng.random(), "kl_prcp": rng.random(), "entropy": rng.random()}
                row |= {"aug_entropy": rng.random(), "clip_fraction_high": rng.random() / 100}
                row |= {"clip_fraction_low": rng.random() / 100, "response_length": 29.0}
                log.append(row | changes)
    if examples:
        save_examples(path, examples)
    if summary:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def texts(figure) -> str:
    everything = [t.get_text() for t in figure.texts]
    everything += [t.get_text() for axes in figure.axes for t in axes.texts]
    everything += [axes.get_title(loc="left") for axes in figure.axes]
    return "\n".join(everything)


def printed(function, *args) -> str:
    console = Console(record=True, width=140, file=io.StringIO())
    function(*args, console)
    return console.export_text()


def assert_nothing_overlaps(figure):
    """No text leaves the figure, none touches another; measured as they will be drawn."""
    figure.draw_without_rendering()
    bounds = figure.bbox
    boxes = [(t.get_text(), t.get_window_extent()) for t in figure.texts if t.get_text().strip()]
    for axes in figure.axes:
        low, high = axes.get_ylim()
        ticks = [t.label1 for t in axes.yaxis.get_major_ticks() if low <= t.get_loc() <= high]
        left, right = axes.get_xlim()
        ticks += [t.label1 for t in axes.xaxis.get_major_ticks() if left <= t.get_loc() <= right]
        labels = [*axes.texts, axes.title, axes._left_title, *ticks]
        boxes += [(t.get_text(), t.get_window_extent()) for t in labels if t.get_text()]
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= bounds.x1, text
        assert box.y0 >= 0 and box.y1 <= bounds.y1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        # Boxes have the font's full height: neighbouring lines may share the room of descenders.
        assert wide <= 1 or high <= 0.25 * min(a.height, b.height), (one, other)


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


RIGHT, LUCKY = "<think>7+5</think>\\boxed{12}", "<think>8+4</think>\\boxed{12}"
WRONG, UNREAD = "<think>7+5</think>\\boxed{11}", "\\boxed{12}"


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


GRPO = SUMMARY | {
    "preset": "tiny-grpo",
    "seconds": 280.0,
    "accuracy_after": {"vision_dependent": 0.701, "text_leaning": 0.47},
    "perception_errors_after": 0.21,
}


def write_other(path, preset, seed=7, summary=GRPO, **changes):
    run = write_run(path, examples=[example(response="theirs")], summary=summary, **changes)
    (run / "config.json").write_text(
        json.dumps({"preset": preset, "seed": seed, "objective": {"kl_prcp_coef": 0.0}})
    )
    if summary:
        (run / "summary.json").write_text(json.dumps(summary | {"preset": preset, "seed": seed}))
    return run


def pair(tmp_path, **changes):
    rows = [example(), example(when="before", response=WRONG, accuracy=0.0)]
    run = write_run(tmp_path / "run", examples=rows, summary=SUMMARY)
    return run, write_other(tmp_path / "other", "tiny-grpo", **changes)


def test_another_run_is_drawn_beside_and_its_folder_is_left_alone(tmp_path, capsys):
    run, other = pair(tmp_path, kl_prcp=None, aug_entropy=None)
    there = sorted(path.name for path in other.iterdir())
    assert main(["report", str(run), "--beside", str(other)]) == 0
    said = capsys.readouterr().out
    assert "tiny-grpo" in said and "read right but wrong, after" in said
    assert sorted(path.name for path in other.iterdir()) == there
    with Image.open(run / "report.png") as image:
        assert image.width == 1500
    figure = draw(read_run(run), [read_run(other)])
    words = texts(figure)
    assert "tiny beside tiny-grpo, seed 7" in words
    # the times are in the table alone: runs of different hours do not compare
    assert "40 steps" in words and "γ = 0 · 40 steps" in words
    assert "5 min 12 s" in said and "4 min 40 s" in said
    assert "74.1" in words and "70.1" in words and "23.1" in words
    assert "before: ✗ wrong" in words and "theirs" not in words
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    for name, expected in (("Reward", {"tiny", "tiny-grpo"}), ("Perception KL, nats", {"tiny"})):
        assert {t.get_text() for t in panels[name].texts} == expected
    for folder, line in zip((run, other), panels["Reward"].lines[::2], strict=True):
        logged = [row["reward"] for row in read_run(folder).rows]
        np.testing.assert_allclose(line.get_ydata(), logged)
    colours = [line.get_color() for line in panels["Entropy, nats"].lines]
    assert colours == ["#0072B2"] * 4 + ["#E69F00"] * 2
    assert "dashed: corrupted" in {t.get_text() for t in panels["Entropy, nats"].texts}
    assert_nothing_overlaps(figure)


def test_bars_are_as_long_as_the_summaries_say(tmp_path):
    run, other = pair(tmp_path)
    figure = draw(read_run(run), [read_run(other)])
    bars = [axes for axes in figure.axes if axes.patches and not axes.images]
    found = [[bar.get_width() for bar in axes.patches] for axes in bars]
    assert found == [
        [0.362, 0.362, 0.741, 0.701, 0.231, 0.231],
        [0.5, 0.5, 0.47, 0.47, 0.471, 0.471],
        [0.41, 0.41, 0.17, 0.21, 0.228, 0.228, 0.089, 0.089],
    ]
    assert len({axes.get_xlim() for axes in bars}) == 1  # lengths of all panels compare


@pytest.mark.parametrize("count", [2, 5])
def test_many_runs_with_long_names_and_nothing_to_tell_find_their_room(tmp_path, count):
    run, _ = pair(tmp_path)
    others = [
        write_other(
            tmp_path / f"other{i}",
            ("papo-qwen3-2b", "a-preset-with-a-long-name", "$x_1$ 🙂", "tiny", "dapo")[i],
            summary=GRPO if i % 2 else None,
            steps=(40, 3, 1, 90, 40)[i],
            kl_prcp=1.0,
            clip_fraction_high=0.0,
        )
        for i in range(count)
    ]
    figure = draw(read_run(run), [read_run(other) for other in others])
    words = texts(figure)
    assert "papo-qwen3-2b: no summary.json" in words and "40 steps so far" in words
    assert "a-preset-with-a…" in words and "–" in words
    assert_nothing_overlaps(figure)


def test_runs_beside_are_tabled_by_preset_with_dashes_for_what_is_missing(tmp_path):
    run, other = pair(tmp_path, summary=None)
    said = printed(lambda folder, console: print_run(folder, console, [other]), run)
    lines = said.splitlines()

    def cells(start):
        line = next(line for line in lines if line.startswith(f"│ {start}"))
        return [cell.strip() for cell in line.strip("│").split("│")][1:]

    assert "tiny ┃ tiny-grpo" in said
    assert cells("vision-dependent, before") == ["36.2 %", "–"]
    assert cells("vision-dependent, images corrupted") == ["23.1 %", "–"]
    assert cells("misread, after") == ["17.0 %", "–"]
    assert cells("read right but wrong, before") == ["22.8 %", "–"]
    assert cells("time") == ["5 min 12 s", "2 min 0 s"]
    assert "Note on tiny-grpo: no summary.json" in said


def test_runs_of_one_preset_are_told_apart_by_seed_or_folder(tmp_path):
    runs = [write_other(tmp_path / name, "tiny", seed) for name, seed in (("a", 7), ("b", 8))]
    named = name_runs([read_run(run) for run in runs])
    assert [entry.name for entry in named] == ["tiny 7", "tiny 8"]
    runs.append(write_other(tmp_path / "c", "tiny", 7))
    assert [e.name for e in name_runs([read_run(r) for r in runs])] == ["a", "tiny 8", "c"]
    assert len({entry.colour for entry in name_runs([read_run(r) for r in runs])}) == 3


def test_what_cannot_stand_beside_is_named(tmp_path, capsys):
    run, _ = pair(tmp_path)
    assert main(["report", str(run), "--beside", str(run)]) == 2
    assert "is named twice" in " ".join(capsys.readouterr().err.split())
    assert main(["report", str(run), "--beside", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in " ".join(capsys.readouterr().err.split())
    many = [write_other(tmp_path / str(i), "tiny", i) for i in range(6)]
    assert main(["report", str(run), "--beside", *map(str, many)]) == 2
    assert "name at most 5" in " ".join(capsys.readouterr().err.split())
    assert not (run / "report.png").exists()
    assert main(["report", str(run)]) == 0
    words = texts(draw(read_run(run)))
    assert "beside" not in words and "Held-out accuracy, mean@8" in words


@pytest.mark.parametrize("places", [[], [0.5], [0.5, 0.5], [0.0, 0.01, 0.02], [0.9, 0.95, 1.0]])
def test_names_at_the_ends_of_curves_are_moved_apart_and_no_further(places):
    moved = spread(places, gap=0.13)
    assert len(moved) == len(places) and moved == sorted(moved)
    assert all(b - a >= 0.13 - 1e-9 for a, b in itertools.pairwise(moved))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved)
    assert spread([0.2, 0.5, 0.8], gap=0.13) == [0.2, 0.5, 0.8]
