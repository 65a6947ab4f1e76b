"""The comparison's runner: what is done is skipped, and nothing is left half done."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from support import TESTS

sys.path.insert(0, str(TESTS.parent))

from bench.evidence.arms import ARMS
from bench.evidence.runner import Plan, result_of, work
from papo_fast.errors import InputError
from support.evidence_results import cell, result, write


def stub(of, **figures):
    return result(of, **figures)


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(tmp_path):
    plan, results = Plan.of([cell(seed=s) for s in (100, 101, 102)]), tmp_path / "results"
    made, lines = [], []

    def failing(of):
        if of.seed == 101:
            raise InputError("no luck")
        made.append(of.seed)
        return stub(of)

    assert work(plan, results, tmp_path, failing, lines.append) == 1
    assert made == [100, 102]
    assert any("failed" in line and "no luck" in line for line in lines)
    assert any(line.startswith(("2/3", "1/3")) for line in lines)
    again = []
    assert work(plan, results, tmp_path, lambda of: again.append(of) or stub(of), print) == 0
    assert again == [plan.cells[1]]


def test_an_arm_that_was_changed_does_not_pass_for_done(tmp_path):
    of = cell("official", "gamma-0.02")
    write(tmp_path, of)
    assert result_of(of, tmp_path)
    other = dataclasses.replace(of.arm, words=(*of.arm.words, "--objective.clip-high", "0.4"))
    with pytest.raises(InputError, match=r"clip-high 0\.4.*delete the file"):
        result_of(dataclasses.replace(of, arm=other), tmp_path)


def test_an_arm_that_this_version_lacks_is_named_and_left_out():
    arm = dataclasses.replace(ARMS["grpo"], name="later", needs=("no_such_field",))
    plan = Plan.of([cell(), dataclasses.replace(cell(), arm=arm)])
    assert [c.arm.name for c in plan.cells] == ["grpo"]
    assert plan.impossible == ("skipped: arm later, this version has no objective.no_such_field",)


def slow(of):
    with (LOG / f"{of.seed}-{os.getpid()}").open("x"):
        time.sleep(0.2)
    return stub(of)


LOG = Path()


def worker(folder):
    global LOG
    LOG = folder / "log"
    plan = Plan.of([cell(seed=s) for s in range(100, 108)])
    work(plan, folder / "results", folder, slow, lambda line: None)


def test_two_processes_make_every_run_once_and_a_killed_one_leaves_nothing_half_done(tmp_path):
    (tmp_path / "log").mkdir()
    context = multiprocessing.get_context("fork")
    first, second = (context.Process(target=worker, args=(tmp_path,)) for _ in range(2))
    first.start(), second.start()
    while not list((tmp_path / "log").iterdir()):
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.join(), second.join()
    files = sorted((tmp_path / "results").rglob("*.*"))
    assert all(json.loads(file.read_text()) for file in files)
    third = context.Process(target=worker, args=(tmp_path,))  # what the killed one held is free
    third.start(), third.join()
    files = [p for p in (tmp_path / "results").rglob("*") if p.is_file()]
    assert sorted(p.name for p in files) == [f"seed{s}.json" for s in range(100, 108)]
    starts = [p.name.partition("-")[0] for p in (tmp_path / "log").iterdir()]
    assert len(starts) <= 9  # at most the run that was killed started twice
