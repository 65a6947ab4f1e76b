"""Whole commands on the device: doctor, a run that is killed and resumed."""

import json
import os
import signal
import time
from pathlib import Path

from papo_fast.cli import main
from papo_fast.digits.model import build_checkpoint
from papo_fast.digits.task import write_questions
from papo_fast.rewards.scorer import Scorer  # noqa: F401  imported before the fork

VOLATILE = ("seconds", "sync_seconds", "rollout_seconds", "experience_seconds", "update_seconds")


def command(words, log):
    """Start `papo-fast words` in a forked process; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        status = main(words)
    finally:
        os._exit(status)


def wait(pid, log):
    """Raises with the end of the output where the command failed."""
    _, status = os.waitpid(pid, 0)
    if (code := os.waitstatus_to_exitcode(status)) != 0:
        end = Path(log).read_text(errors="replace")[-1500:]
        raise RuntimeError(f"it ended with {code}: {end}")


def doctor(recorder):
    log = recorder.folder / "doctor.txt"
    pid = command(["doctor"], log)
    try:
        wait(pid, log)
    finally:
        recorder.note("output", log.read_text())


def train_and_resume(recorder, dtype):
    """20 steps twice without a stop, and once with SIGKILL at the tenth and --resume.

    The three have the same seed. What the first two differ by comes of the device's sums, whose
    order is not fixed on a GPU; the third must not differ by more of a kind.
    """
    steps, kill_at = (4, 2) if recorder.small else (20, 10)
    words = _words(recorder, dtype, steps)
    runs = recorder.folder / "runs"
    names = ("whole", "again", "killed")
    logs = {name: recorder.folder / f"{name}.log" for name in names}

    def start(name, *more):
        return command([*words, "--out", str(runs), "--name", name, *more], logs[name])

    try:
        killed, others = start("killed"), [start(name) for name in ("whole", "again")]
        _kill_when_due(killed, runs / "killed", kill_at)
        for pid, name in zip(others, ("whole", "again"), strict=True):
            wait(pid, logs[name])
        done = len(rows_of(runs / "killed"))
        recorder.note("killed after step", done)
        wait(start("killed", "--resume"), logs["killed"])
    finally:
        for name, log in logs.items():
            print(f"--- {name}\n{log.read_text(errors='replace') if log.exists() else ''}")
    whole = rows_of(runs / "whole")
    _report(recorder, dtype, whole, rows_of(runs / "again"), rows_of(runs / "killed"), steps)


def _words(recorder, dtype, steps):
    """The command line; on a GPU with the warm start, which takes minutes on one CPU core."""
    words = ["train", "tiny", "--device", str(recorder.device), "--model.dtype", dtype]
    words += ["--train.steps", str(steps), "--train.checkpoint-every", "1"]
    # torch's own layers in float32, whatever is installed in bfloat16
    words += ["--model.liger", "off" if dtype == "float32" else "auto"]
    if not recorder.small:
        return [
            *words,
            *("--digits.cache", str(recorder.shared / "digits")),
            *("--digits.train-questions", "1024", "--digits.test-questions", "64"),
            *("--digits.warm-accuracy", "0.2", "--eval.samples", "2"),
        ]
    folder = recorder.folder
    build_checkpoint(folder / "model", 0)
    write_questions(folder / "train.parquet", 64, "train", 0, None)
    words += ["--digits.no-enabled", "--model.path", str(folder / "model")]
    words += ["--data.train", str(folder / "train.parquet"), "--rollout.prompts", "4"]
    return [*words, *("--rollout.filter-prompts", "4", "--train.update-prompts", "4")]


def _kill_when_due(pid, folder, kill_at):
    """SIGKILL to a run once it has written `kill_at` steps; it must not end before."""
    while len(rows_of(folder)) < kill_at:
        if os.waitpid(pid, os.WNOHANG)[0]:
            raise RuntimeError(f"the run ended before step {kill_at}")
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def rows_of(folder):
    """Whole rows of metrics.jsonl, without what a clock wrote."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    return [json.loads(line) for line in lines]


def largest_difference(rows, others):
    """(largest relative difference of a number, step and name of the first difference or None)."""
    worst, first = 0.0, None
    for a, b in zip(rows, others, strict=True):
        for name in a.keys() | b.keys():
            if name in VOLATILE or a.get(name) == b.get(name):
                continue
            x, y = a.get(name), b.get(name)
            if isinstance(x, int | float) and isinstance(y, int | float):
                off = abs(x - y) / max(abs(x), abs(y), 1e-6)
            else:
                off = 1.0
            worst = max(worst, off)
            first = first or f"step {a['step']}, {name}: {x} and {y}"
    return worst, first


def _report(recorder, dtype, whole, again, resumed, steps):
    if not len(whole) == len(again) == len(resumed) == steps:
        raise AssertionError(f"{len(whole)}, {len(again)} and {len(resumed)} rows of {steps} steps")
    for key in ("reward", "loss", "grad_norm", "sampler_mismatch", "kl_prcp"):
        recorder.note(f"{key}, first and last step", [whole[0].get(key), whole[-1].get(key)])
    for key in ("rollout_seconds", "experience_seconds", "update_seconds"):
        values = sorted(row[key] for row in whole)
        recorder.note(f"median {key}", values[len(values) // 2])
    noise, where = largest_difference(whole, again)
    recorder.note("two runs alike, largest relative difference", noise)
    recorder.note("first difference of the two", where or "none: bit-equal")
    off, where = largest_difference(whole, resumed)
    recorder.note("resumed run, largest relative difference", off)
    recorder.note("first difference of the resumed run", where or "none: bit-equal")
    if noise == 0:
        recorder.check("resumed run against the uninterrupted one", off, 0)
    mismatch = max(row["sampler_mismatch"] for row in whole)
    recorder.check("sampler_mismatch", mismatch, 1e-3 if dtype == "float32" else 5e-2)
