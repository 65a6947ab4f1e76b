"""The report of a run beside others: their curves, bars and table, and what cannot stand there."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from papo_fast.cli import main
from papo_fast.report import print_run, read_run
from papo_fast.report.curves import spread
from papo_fast.report.figure import draw
from papo_fast.report.naming import name_runs
from support.reports import (
    SUMMARY,
    WRONG,
    assert_nothing_overlaps,
    example,
    printed,
    texts,
    write_run,
)

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
