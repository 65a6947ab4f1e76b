"""The folder of a run: whose it is, what may be deleted, and what a run can do without."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from papo_fast.config import Config
from papo_fast.digits import warmstart
from papo_fast.errors import InputError
from papo_fast.presets import get_preset
from papo_fast.run.folder import git_commit, run_folder, write_json
from papo_fast.run.lock import LOCK, Locked, locked
from papo_fast.run.progress import Progress
from support.small_runs import (
    SILENT,
    resumable,
    steps_of,
)

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def config(checkpoints, questions, tmp_path):
    return resumable(checkpoints, questions, tmp_path)


def holder_is_running(folder):
    """A process of its own that holds `folder`, once it does."""

    def hold():
        with locked(folder):
            time.sleep(600)

    folder.mkdir(parents=True, exist_ok=True)
    process = FORK.Process(target=hold, daemon=True)
    process.start()
    while not (folder / LOCK).exists():
        time.sleep(0.01)
    return process


# --- whose folder it is ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["resume", "overwrite", "name"])
def test_two_processes_in_one_run_folder(tmp_path, how):
    folder = tmp_path / "run"
    process = holder_is_running(folder)
    (folder / "theirs").touch()
    write_json(folder / "config.json", dataclasses.asdict(Config()))
    flags = {} if how == "name" else {how: True}
    config = Config(out=str(tmp_path), name="run", **flags)
    with pytest.raises(InputError, match=rf"in use by process {process.pid}|already holds a run"):
        run_folder(config).__enter__()
    assert (folder / "theirs").exists()
    process.kill()  # as the memory killer would: the lock stays
    if how == "overwrite":
        time.sleep(0.2)  # a process that nobody has waited for yet is gone all the same
    else:
        process.join()
    assert (folder / LOCK).exists()
    if how != "name":
        with run_folder(config) as taken:
            assert taken == folder and json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
        assert not (folder / LOCK).exists()
    process.join()


def test_a_run_without_a_name_takes_the_next_one_where_a_folder_is_in_use(tmp_path):
    config = Config(out=str(tmp_path), preset="tiny")
    with run_folder(config) as first, run_folder(config) as second:
        assert [first.name, second.name] == ["tiny-seed0", "tiny-seed0-2"]


def test_a_lock_of_another_machine_stays_and_one_of_a_reused_pid_does_not(tmp_path):
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": ""}))
    with pytest.raises(Locked, match=rf"process 1 of elsewhere.*delete {lock}"):
        locked(tmp_path).__enter__()
    for stale in (
        json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "started": "another boot"}),
        "{",
        "",
        "[]",
    ):
        lock.write_text(stale)
        with locked(tmp_path):
            assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_one_of_many_that_want_a_folder_at_once_gets_it(tmp_path):
    start, got = FORK.Barrier(8), FORK.Queue()
    (tmp_path / LOCK).write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))

    def want():
        start.wait()
        try:
            with locked(tmp_path):
                got.put(True)
                time.sleep(1)
        except Locked:
            got.put(False)

    processes = [FORK.Process(target=want) for _ in range(8)]
    for process in processes:
        process.start()
    found = [got.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == [False] * 7 + [True]


def test_two_processes_in_one_digits_cache(tmp_path, monkeypatch):
    config = dataclasses.replace(
        get_preset("tiny"),
        digits=dataclasses.replace(get_preset("tiny").digits, cache=str(tmp_path)),
    )
    folder = warmstart.cache_folder(config)
    process = holder_is_running(folder)
    built = []
    monkeypatch.setattr(warmstart, "_build", lambda files, *_: built.append(files))

    def finish():  # the other one is done, and this one finds what it made
        (folder / "model").mkdir()
        (folder / "model" / "config.json").touch()
        process.kill()
        process.join()

    timer = threading.Timer(1.0, finish)
    timer.start()
    warmstart.prepare(config, Progress(SILENT))
    timer.join()
    assert built == []
    (folder / "model" / "config.json").unlink()  # the other one has died at it: this one builds
    warmstart.prepare(config, Progress(SILENT))
    assert len(built) == 1
    (folder / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(InputError, match="in use by process 1 of elsewhere"):
        warmstart.prepare(config, Progress(SILENT))


# --- what may be deleted --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../precious", "a/b", "..", ".", "a\\b", "/tmp/x", "a\0b"])
@pytest.mark.parametrize("flag", ["overwrite", "resume"])
def test_a_name_never_leads_out_of_the_folder_of_runs(tmp_path, name, flag):
    (tmp_path / "precious").mkdir()
    write_json(tmp_path / "precious" / "config.json", dataclasses.asdict(Config()))
    config = Config(out=str(tmp_path / "runs"), name=name, **{flag: True})
    with pytest.raises(InputError, match="expected the name of a folder"):
        run_folder(config).__enter__()
    assert (tmp_path / "precious" / "config.json").exists() and not (tmp_path / "runs").exists()


def test_overwrite_deletes_runs_of_ours_only(tmp_path):
    config = Config(out=str(tmp_path), name="run", overwrite=True)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").touch()
    for content in (None, "{}", '{"model_type": "qwen2_vl"}', "{", "[]", '["model", "data"]'):
        if content is not None:  # any model's folder has one
            (folder / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"is not a run .* will not be replaced"):
            run_folder(config).__enter__()
        assert (folder / "thesis.tex").exists()
    write_json(folder / "config.json", dataclasses.asdict(config))
    (folder / "examples").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").touch()
    (folder / "link").symlink_to(tmp_path / "outside")
    with run_folder(config):
        assert [entry.name for entry in folder.iterdir()] == [LOCK]
    assert (tmp_path / "outside" / "kept").exists()


def test_overwrite_follows_no_symlink(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write_json(tmp_path / "elsewhere" / "config.json", dataclasses.asdict(Config()))
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="no folder of its own"):
        run_folder(Config(out=str(tmp_path), name="run", overwrite=True)).__enter__()
    assert (tmp_path / "elsewhere" / "config.json").exists()


# --- what a run needs and can do without ----------------------------------------------------------


def test_no_git_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
    (tmp_path / "git").write_text("not a program")
    (tmp_path / "git").chmod(0o755)
    assert git_commit() is None


def command_of(config):
    flat = {
        "name": config.name,
        "out": config.out,
        "device": "cpu",
        "model.path": config.model.path,
        "model.dtype": "float32",
        "data.train": config.data.train,
        "data.test": config.data.test,
        "data.min-pixels": config.data.min_pixels,
        "data.max-pixels": config.data.max_pixels,
        "rollout.prompts": 4,
        "rollout.group-size": 3,
        "rollout.max-new-tokens": 6,
        "train.update-prompts": 2,
        "train.steps": config.train.steps,
        "eval.samples": 1,
        "reward.workers": 1,
    }
    options = [text for name, value in flat.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "papo_fast", "train", "grpo", *options]


def test_a_closed_stdout_a_home_that_nobody_can_write_to_and_any_locale_are_no_error(
    config, questions, tmp_path
):
    # brackets are markup to rich, and é is no letter in this locale
    data = shutil.copy(questions, questions.with_name("é.parquet"))
    config = dataclasses.replace(
        config,
        out=str(tmp_path / "[bold] [/x]"),
        data=dataclasses.replace(config.data, train=str(data), test=str(data)),
    )
    environment = {**os.environ, "HOME": "/dev/null", "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "MPLCONFIGDIR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        command_of(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(300) == 0, errors
    folder = Path(config.out) / "run"
    assert "BrokenPipe" not in errors and "Traceback" not in errors
    assert (folder / "summary.json").exists() and steps_of(folder) == [1, 2]
    written = json.loads((folder / "config.json").read_text("utf-8"))["data"]["train"]
    assert os.fsencode(written) == os.fsencode(data)


def test_a_folder_that_is_not_unicode_is_refused_before_the_training(tmp_path):
    config = Config(out=str(tmp_path / "\udcff"), name="run")
    with pytest.raises(InputError, match="bytes that are no characters"), run_folder(config):
        pass
    assert not list(tmp_path.iterdir())
