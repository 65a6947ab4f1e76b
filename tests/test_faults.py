"""Faults that are injected into runs: each ends in a clear message, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from papo_fast.config import EvalConfig
from papo_fast.errors import InputError
from papo_fast.model.policy import Policy
from papo_fast.presets import get_preset
from papo_fast.run.checkpoint import CheckpointStore
from support import SUPPORT
from support.family_checkpoints import write_checkpoint
from support.small_runs import every_term, png, run, small


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_rank_that_dies_ends_the_others_within_a_minute_and_the_run_resumes(tmp_path):
    pytest.importorskip("peft", reason="pip install -e '.[lora]'")
    rows = [{"problem": "What?", "answer": "1", "images": [png(i)]} for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    options = {
        "model.path": write_checkpoint(tmp_path / "model", "qwen2_5_vl"),
        "model.dtype": "float32",
        "model.lora-rank": 2,
        "data.train": tmp_path / "data.parquet",
        "data.min-pixels": 56 * 56,
        "data.max-pixels": 112 * 112,
        "rollout.prompts": 2,
        "rollout.group-size": 2,
        "rollout.max-new-tokens": 4,
        "train.update-prompts": 2,
        "train.steps": 3,
        "train.checkpoint-every": 1,
        "reward.workers": 1,
        "device": "cpu",
        "out": tmp_path / "runs",
    }
    flat = [text for k, v in options.items() for text in (f"--{k}", str(v))]
    command = ["train", "papo-g-3b", *flat, "--resume"]
    worker = [str(SUPPORT / "fault_worker.py"), *command]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*torchrun, "--nproc-per-node", "2", *worker],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    folder = tmp_path / "runs" / "papo-g-3b-seed0"
    try:
        while process.poll() is None and not (folder / "checkpoints" / "step-1").exists():
            time.sleep(0.05)
        at_step_1 = time.perf_counter()
        # A minute; on a machine so busy that the start alone takes long, in proportion.
        limit = max(60.0, 4 * (at_step_1 - started))
        output, _ = process.communicate(timeout=limit)
    finally:
        process.terminate()  # torchrun ends its ranks
    print(f"all ended {time.perf_counter() - at_step_1:.1f} of {limit:.0f} s after step 1")
    assert process.returncode != 0
    words = " ".join(output.split())
    assert "rank 0 lost another process of this run" in words and "--resume" in words, output
    [first] = metrics(folder)
    assert main_of_this_process(command) == 0
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3]
    assert metrics(folder)[0] == first


def main_of_this_process(command):
    from papo_fast.cli import main

    return main(command)


@pytest.mark.parametrize(
    "frozen",
    [{"lora_rank": 4}, pytest.param({"train_vision": False}, marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_checkpoints_hold_what_is_trained_and_resume_exactly(
    checkpoints,
    questions,
    tmp_path,
    frozen,
):
    if "lora_rank" in frozen:
        pytest.importorskip("peft", reason="pip install -e '.[lora]'")
    config = small(every_term(), checkpoints["qwen3_vl"], questions, tmp_path / "a")
    config = dataclasses.replace(
        config,
        name="run",
        resume=True,
        model=dataclasses.replace(config.model, **frozen),
        data=dataclasses.replace(config.data, test=""),
        train=dataclasses.replace(config.train, steps=2, checkpoint_every=1),
    )
    whole, rows, _ = run(dataclasses.replace(config, out=str(tmp_path / "whole")))
    run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1)))
    folder, resumed, _ = run(config)
    assert resumed == rows
    assert rows[1]["kl_ref"] > 0
    a, b = (load_file(f / "model" / "model.safetensors") for f in (whole, folder))
    assert all(torch.equal(a[name], b[name]) for name in a)
    policy = Policy.load(config.model, [], torch.device("cpu"))
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    shards = FileSystemReader(folder / "checkpoints" / "step-2" / "shards").read_metadata()
    saved = {n.removeprefix("model.") for n in shards.state_dict_metadata if n.startswith("model.")}
    assert saved == trained


def with_a_broken_picture(path, at):
    rows = pq.read_table(path).to_pylist()
    whole = rows[at]["images"][0]
    rows[at]["images"] = [whole[: len(whole) // 2]]
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_a_corrupt_picture_in_the_middle_of_an_epoch(checkpoints, questions, tmp_path, caplog):
    with_a_broken_picture(questions, 6)
    config = small(get_preset("grpo"), checkpoints["qwen2_5_vl"], questions, tmp_path / "runs")
    config = dataclasses.replace(
        config,
        name="run",
        resume=True,
        data=dataclasses.replace(config.data, test="", shuffle=False),
        train=dataclasses.replace(config.train, steps=3),
        eval=EvalConfig(samples=1),
    )
    # rows 0 to 3 are the first step's; row 6 stops the second, and the first is kept
    with pytest.raises(InputError, match=r"row 6: image 0 .* cannot be read.*on-bad-sample skip"):
        run(config)
    store = CheckpointStore(tmp_path / "runs" / "run" / "checkpoints")
    assert [saved.step for saved in store.saved()] == [1]
    [first] = metrics(tmp_path / "runs" / "run")
    skipping = dataclasses.replace(config.data, on_bad_sample="skip")
    caplog.clear()
    _, rows, summary = run(dataclasses.replace(config, data=skipping))
    assert [row["skipped_samples"] for row in rows] == [0, 1, 1]
    assert rows[0]["loss"] == first["loss"] and summary["steps"] == 3
    reports = [r.message for r in caplog.records if "row 6: image 0" in r.getMessage()]
    assert len(reports) == 1


def test_answers_that_hang_or_crash_the_comparison_cost_their_reward_only(
    checkpoints,
    questions,
    tmp_path,
    monkeypatch,
):
    from papo_fast.data.encoder import PromptEncoder as Encoder

    answers = [
        r"\boxed{9^{9^{9^{9^{9}}}}}",  # never returns
        r"\boxed{x + 1}",
        r"\boxed{2 + \frac{1}{3}}",
    ]
    said = iter(range(10**9))
    monkeypatch.setattr(Encoder, "decode", lambda self, ids: answers[next(said) % 3])
    config = small(get_preset("grpo"), checkpoints["qwen2_5_vl"], questions, tmp_path / "runs")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, test=""),
        reward=dataclasses.replace(config.reward, timeout=1.0),
        train=dataclasses.replace(config.train, steps=1),
    )
    rows = pq.read_table(questions).to_pylist()
    for row in rows:
        row["answer"] = "x + 1"
    pq.write_table(pa.Table.from_pylist(rows), questions)
    compare = "papo_fast.rewards.scorer._Worker.compare"
    from papo_fast.rewards import scorer
    from papo_fast.rewards.scorer import _Worker

    monkeypatch.setattr(scorer, "WALL_FACTOR", 600.0)  # the limit of CPU time alone counts

    asked = _Worker.compare

    def crash_at_a_fraction(self, reference, candidate):
        if "frac" in candidate:
            if self.process is None:
                self.start()
            self.process.kill()  # as the system's memory killer does
        return asked(self, reference, candidate)

    monkeypatch.setattr(compare, crash_at_a_fraction)
    _, [row], summary = run(config)
    # twelve responses: four hang, four are right, four crash
    assert row["reward_timeouts"] == 4 and row["reward_failures"] == 4
    assert row["accuracy"] == pytest.approx(4 / 12)
    assert any("could not be compared" in alarm for alarm in row["alarms"])
    assert summary["reward_failures"] == 4
