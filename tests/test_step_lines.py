"""The lines of a run's steps: columns that stand below each other, and the time that is left."""

from __future__ import annotations

import json
import re

import pytest

from papo_fast.run.step_lines import HEADER_EVERY, StepLines, time_left
from support import TESTS

ROW = json.loads((TESTS / "data" / "metrics_row.json").read_text())


def row(step, **changes):
    return ROW | {"step": step, "rollout_seconds": 3.0, "update_seconds": 1.0,
                  "sync_seconds": 0.0, "experience_seconds": 0.0} | changes  # fmt: skip


def test_columns_stand_under_their_headings_in_less_than_100_characters():
    lines = StepLines()
    head, first = lines.of(row(1, truncated=0.25, groups_kept=0.5), 320)
    (second,) = lines.of(row(2, kl_prcp=None, grad_norm=123456.0, response_length=2047.96), 320)
    assert len(head) == len(first) == len(second) < 100
    ends = [found.end() for found in re.finditer(r"\S+", head)]
    for line in (first, second):
        assert [found.end() for found in re.finditer(r"\S+", line)] == ends
    by_name = dict(zip(head.split(), first.split(), strict=True))
    assert by_name["trunc"] == "0.25" and by_name["kept"] == "0.50" and by_name["step"] == "1/320"
    assert by_name["s"] == "4.0" and by_name["left"] == "21m"  # 319 steps of 4 s
    by_name = dict(zip(head.split(), second.split(), strict=True))
    assert (
        by_name["KL_prcp"] == "–" and by_name["grad"] == "1e+05" and by_name["length"] == "2048.0"
    )


def test_the_header_comes_again():
    lines = StepLines()
    heads = [len(lines.of(row(step), 10_000)) == 2 for step in range(1, 2 * HEADER_EVERY + 2)]
    assert [i for i, head in enumerate(heads) if head] == [0, HEADER_EVERY, 2 * HEADER_EVERY]


def test_the_time_left_is_that_of_the_latest_steps():
    lines = StepLines()
    lines.of(row(1, rollout_seconds=1000.0), 100)
    for step in range(2, 13):
        line = lines.of(row(step), 100)[-1]
    assert line.split()[-1] == "6m"  # 88 steps of 4 s


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0s"), (99, "99s"), (119, "2m"), (5940, "99m"), (6000, "1h40m"), (172_700, "47h58m"),
     (172_800, "2d00h"), (8_640_000, "100d00h")],
)  # fmt: skip
def test_times(seconds, said):
    assert time_left(seconds) == said
