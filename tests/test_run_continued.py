"""What keeps a run from going on, and that it goes on from where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from papo_fast.errors import InputError
from papo_fast.launch import train
from papo_fast.run import same_data
from papo_fast.run.checkpoint import CheckpointStore
from papo_fast.run.folder import write_json
from papo_fast.run.same_data import sha256
from support.small_runs import (
    SILENT,
    checkpoints_of,
    png,
    resumable,
    run,
    steps_of,
    with_train,
)


@pytest.fixture
def config(checkpoints, questions, tmp_path):
    return resumable(checkpoints, questions, tmp_path)


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
    # the last step's too: the run may be killed in the evaluation after it
    assert checkpoints_of(whole)[-2:] == [3, 4]
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
