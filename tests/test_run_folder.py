"""The folder of a run: whose it is, what may be deleted, and what keeps a run from going on."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from papo_fast.config import Config
from papo_fast.digits import warmstart
from papo_fast.errors import InputError
from papo_fast.launch import train
from papo_fast.presets import get_preset
from papo_fast.run import same_data
from papo_fast.run.checkpoint import CheckpointStore
from papo_fast.run.folder import git_commit, run_folder, write_json
from papo_fast.run.lock import LOCK, Locked, locked
from papo_fast.run.progress import Progress
from papo_fast.run.same_data import sha256
from papo_fast.update import Updater
from support.small_runs import png, run, small

FORK = multiprocessing.get_context("fork")
SILENT = Console(quiet=True)


@pytest.fixture
def config(checkpoints, questions, tmp_path):
    config = small(get_preset("grpo"), checkpoints["qwen2_5_vl"], questions, tmp_path / "runs")
    return dataclasses.replace(
        config, name="run", resume=True, data=dataclasses.replace(config.data, test="")
    )


def with_train(config, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def steps_of(folder):
    return [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints_of(folder):
    return [saved.step for saved in CheckpointStore(folder / "checkpoints").saved()]


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


def test_a_closed_stdout_and_a_home_that_nobody_can_write_to_are_no_error(config, questions):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=str(questions)))
    environment = {**os.environ, "HOME": "/dev/null"}
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


# --- what stops a run, and what stays -------------------------------------------------------------


# One handler takes both signals: each place by one of them, and one place by both.
@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("evaluation", signal.SIGINT),
        ("step", signal.SIGINT),
        ("step", signal.SIGTERM),
        ("checkpoint", signal.SIGTERM),
        pytest.param("evaluation", signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param("checkpoint", signal.SIGINT, marks=pytest.mark.exhaustive),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_a_signal_keeps_the_last_step_wherever_it_comes(
    config, questions, monkeypatch, number, where
):
    every = 1 if where == "checkpoint" else 0
    config = with_train(config, steps=3, checkpoint_every=every)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=str(questions)))
    place = {
        "evaluation": "papo_fast.trainer.Trainer.evaluate",
        "step": "papo_fast.update.Updater.update",
        "checkpoint": "papo_fast.run.checkpoint.CheckpointStore.save",
    }[where]
    owner, _, name = place.rpartition(".")
    module, _, cls = owner.rpartition(".")
    original, calls = getattr(getattr(sys.modules[module], cls), name), []

    def interrupted(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, interrupted)
        folder = train(config, Console(quiet=True))
    done = {"evaluation": [], "step": [1], "checkpoint": [1]}[where]
    assert checkpoints_of(folder) == done and not (folder / "summary.json").exists()
    assert len(calls) == {"evaluation": 1, "step": 2, "checkpoint": 1}[where]
    _, rows, _ = run(config)
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_a_second_interrupt_ends_at_once_and_keeps_the_last_whole_step(config, monkeypatch):
    config = with_train(config, steps=3, checkpoint_every=0)
    original, calls = Updater.update, []

    def interrupted_twice(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # the first update of the second step
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Updater, "update", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        train(config, SILENT)
    assert checkpoints_of(Path(config.out) / "run") == [1]


class Unforeseen(Exception):
    pass


@pytest.mark.parametrize(
    ("at", "kept"), [(3, [1]), (4, [])], ids=["before an update", "between two updates"]
)
def test_any_error_keeps_the_last_step_while_its_weights_are_whole(config, monkeypatch, at, kept):
    config = with_train(config, checkpoint_every=0)
    _, whole, _ = run(dataclasses.replace(config, name="whole"))
    original, calls = Updater.update, []

    def fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == at:  # a step makes two updates
            raise Unforeseen
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "update", fails)
        with pytest.raises(Unforeseen):
            train(config, SILENT)
    assert len(calls) == at
    folder = Path(config.out) / "run"
    assert checkpoints_of(folder) == kept
    if kept:
        _, rows, _ = run(config)
        assert rows == whole


def test_weights_that_are_not_finite_are_never_kept(config, monkeypatch):
    config = with_train(config, steps=3, checkpoint_every=1)
    original, calls = torch.optim.AdamW.step, []

    def overflows(self, *args, **kwargs):
        calls.append(1)
        original(self, *args, **kwargs)
        if len(calls) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][-1].view(-1)[-1] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflows)
    with pytest.raises(
        InputError, match=r"weights are no longer finite.*lower train\.lr"
    ) as caught:
        train(config, SILENT)
    assert "\n" not in str(caught.value)
    folder = Path(config.out) / "run"
    assert checkpoints_of(folder) == [1] and not (folder / "model").exists()


# --- what keeps a run from going on ---------------------------------------------------------------


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["shards/.metadata", "state.pt", "bytes"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, name):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    store = CheckpointStore(tmp_path / "checkpoints")
    folder = store.save(1, model, optimizer, {"score": 0.0, "step": 1})
    evil = Payload(tmp_path / "ran")
    (folder / "manifest.json").unlink()  # whoever writes there can write that one too
    if name == "bytes":
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        weights, moments = get_state_dict(model, optimizer)
        moments["param_groups"][0]["lr"] = evil
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "shards")
    else:
        (folder / name).write_bytes(pickle.dumps(evil))
    with pytest.raises(InputError, match="cannot be read"):
        store.load(model, optimizer)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(config, caplog):
    _, whole, _ = run(dataclasses.replace(with_train(config, steps=4), name="whole"))
    three = with_train(config, steps=3, checkpoint_every=1)
    three = with_train(three, keep_checkpoints=3)
    folder, _, _ = run(three)
    last = folder / "checkpoints" / "step-3"
    [shard, *_] = sorted((last / "shards").glob("*.distcp"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    (folder / "checkpoints" / "step-2" / "state.pt").unlink()
    _, rows, _ = run(with_train(three, steps=4))
    assert rows == whole
    said = " ".join(record.getMessage() for record in caplog.records)
    assert f"{last} is damaged: shards/{shard.name} is not what was written" in said
    assert "step-2 is damaged: state.pt is missing" in said


def test_an_old_checkpoint_that_is_damaged_does_not_stop_a_run(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    folder = store.save(1, model, optimizer, {"score": 9.0, "step": 1})
    (folder / "state.pt").write_bytes(b"PK")
    store.save(2, model, optimizer, {"score": 0.0, "step": 2})
    assert [saved.step for saved in store.saved()] == [2]


def test_where_all_checkpoints_are_damaged_nothing_is_done_again(config):
    config = with_train(config, steps=1, checkpoint_every=1)
    folder, _, _ = run(config)
    (folder / "checkpoints" / "step-1" / "shards" / ".metadata").unlink()
    rows = (folder / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match=r"no checkpoint is left.*step-1.damaged"):
        train(with_train(config, steps=2), SILENT)
    assert (folder / "metrics.jsonl").read_text() == rows


def test_metrics_that_lack_a_step_are_refused(config):
    config = with_train(config, steps=3, checkpoint_every=1)
    folder, _, _ = run(config)
    more, path = with_train(config, steps=4), folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damaged, why in (
        (lines[:1] + lines[2:], 'has {"step": 3} where the row of step 2'),
        (lines[:2], "ends where the row of step 3"),
        (lines[1::-1] + lines[2:], 'has {"step": 2} where the row of step 1'),
    ):
        path.write_text("".join(damaged))
        with pytest.raises(InputError, match=why):
            train(more, SILENT)
        assert path.read_text() == "".join(damaged)
    path.write_text("".join(lines))
    assert [row["step"] for row in run(more)[1]] == [1, 2, 3, 4]


def test_threads_data_steps_and_a_missing_config_are_refused_with_a_reason(config, questions):
    config = with_train(config, steps=1, checkpoint_every=1, lr_schedule="linear")
    folder, _, _ = run(config)
    two = with_train(config, steps=2)
    with pytest.raises(InputError, match=r"train.steps was 1 and is 2\. Under lr_schedule linear"):
        train(two, SILENT)
    constant = json.loads((folder / "config.json").read_text())
    constant["train"]["lr_schedule"] = "constant"
    write_json(folder / "config.json", constant)
    two = with_train(two, lr_schedule="constant")
    threads = torch.get_num_threads()
    try:
        with pytest.raises(InputError, match=r"threads was 0 and is 1\. With another number"):
            train(dataclasses.replace(two, threads=1), SILENT)
    finally:
        torch.set_num_threads(threads)
    content = questions.read_bytes()
    rows = pq.read_table(questions).to_pylist()
    rows[-1]["images"] = [png(99)]
    pq.write_table(pa.Table.from_pylist(rows), questions)
    with pytest.raises(InputError, match=r"data.train .* is not the file with which"):
        train(two, SILENT)
    questions.write_bytes(content)
    settings = (folder / "config.json").read_text()
    for damaged, why in (("{", "is damaged"), ("[]", "holds no settings"), (None, "but no config")):
        (folder / "config.json").unlink()
        if damaged is not None:
            (folder / "config.json").write_text(damaged)
        else:
            assert not (folder / "config.json").exists()
        with pytest.raises(InputError, match=why):
            train(two, SILENT)
        (folder / "config.json").write_text(settings)
    assert [row["step"] for row in run(two)[1]] == [1, 2]


def test_a_finished_run_is_left_as_it_is(config):
    config, said = with_train(config, checkpoint_every=0), io.StringIO()
    folder, _, _ = run(config, report=True)  # without a checkpoint
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    train(config, Console(file=said, width=500))
    assert "is finished after 2 steps: nothing is left to do" in said.getvalue()
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"done 2 steps and left no checkpoint"):
        train(with_train(config, steps=3), SILENT)
    assert steps_of(folder) == [1, 2]


def killed_in_a_checkpoint(config, monkeypatch, at):
    """The folder of a run that ends while it writes its checkpoint number `at`."""
    original, calls = CheckpointStore.save, []

    def killed(self, *args):
        calls.append(1)
        if len(calls) == at:
            raise SystemExit  # the row of the step is written, its checkpoint is not
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", killed)
        with pytest.raises(SystemExit):
            train(config, SILENT)
    return Path(config.out) / "run"


def test_a_run_that_is_killed_again_and_again_goes_on_from_where_it_was(config, monkeypatch):
    config = with_train(config, steps=4, checkpoint_every=3)
    whole, rows, _ = run(dataclasses.replace(config, name="whole"))
    assert checkpoints_of(whole) == [1, 3]
    folder = killed_in_a_checkpoint(config, monkeypatch, at=1)
    assert steps_of(folder) == [1] and checkpoints_of(folder) == []
    killed_in_a_checkpoint(config, monkeypatch, at=2)
    assert steps_of(folder) == [1, 2, 3] and checkpoints_of(folder) == [1]
    said = io.StringIO()
    train(config, Console(file=said, width=500))
    assert f"resuming {folder} after step 1, from {folder}/checkpoints/step-1" in said.getvalue()
    assert run(with_train(config, steps=4))[1] == rows  # which is finished and left as it is


def test_done_steps_without_a_checkpoint_are_not_done_again_unasked(config, monkeypatch):
    config = with_train(config, steps=4, checkpoint_every=3)
    folder = killed_in_a_checkpoint(config, monkeypatch, at=2)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(InputError, match=r"has done 3 steps and left no checkpoint.*--overwrite"):
        train(config, SILENT)
    assert steps_of(folder) == [1, 2, 3]
    # one step, whose checkpoint was due, is done again aloud; none is due without checkpoints
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(rows[0])
    with pytest.raises(InputError, match=r"has done 1 step and left no checkpoint"):
        train(with_train(config, checkpoint_every=0), SILENT)
    said = io.StringIO()
    train(config, Console(file=said, width=500))
    assert "warning: step 1 had no whole checkpoint yet and is done again" in said.getvalue()
    assert steps_of(folder) == [1, 2, 3, 4]


def test_data_that_nobody_touched_is_not_read_again_and_any_other_is_noticed(
    config, questions, monkeypatch
):
    read = []
    monkeypatch.setattr(same_data, "sha256", lambda path: read.append(path) or sha256(path))
    one = with_train(config, steps=1, checkpoint_every=1)
    folder, _, _ = run(one)
    assert read == [questions]
    mark = json.loads((folder / "data.json").read_text())["train"]
    assert mark["sha256"] == hashlib.sha256(questions.read_bytes()).hexdigest()
    run(with_train(config, steps=2, checkpoint_every=1))
    assert len(read) == 1
    # copied, as from another disk: the content counts, and the copy is known from then on
    content, times = questions.read_bytes(), os.stat(questions)
    questions.unlink()
    questions.write_bytes(content)
    run(with_train(config, steps=3, checkpoint_every=1))
    run(with_train(config, steps=4, checkpoint_every=1))
    assert len(read) == 2
    # one byte of as many, and the time of the last write set back
    same = os.stat(questions)
    questions.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    os.utime(questions, ns=(same.st_atime_ns, same.st_mtime_ns))
    assert os.stat(questions).st_size == times.st_size
    with pytest.raises(InputError, match=r"data.train .* is not the file with which"):
        train(with_train(config, steps=5), SILENT)


def test_data_of_a_run_of_an_earlier_version_is_compared(config, questions):
    folder, _, _ = run(with_train(config, steps=1, checkpoint_every=1))
    write_json(folder / "data.json", {"train": sha256(questions)})
    run(with_train(config, steps=2, checkpoint_every=1))
    write_json(folder / "data.json", {"train": "0" * 64})
    with pytest.raises(InputError, match=r"data.train .* is not the file with which"):
        train(with_train(config, steps=3), SILENT)
