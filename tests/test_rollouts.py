"""The rollout that runs beside the update: whose weights it has, and that nothing of it is lost."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from papo_fast.config import EvalConfig, RewardConfig
from papo_fast.config_checks import check
from papo_fast.errors import InputError
from papo_fast.launch import train
from papo_fast.presets import get_preset
from papo_fast.update import Updater
from support.ranks import launch
from support.small_runs import png
from support.standing_in import standing_in
from support.vllm_checks import untrained

N = 4  # responses of a training prompt; evaluation asks for one


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config, encoder, _ = untrained(folder / "model", engine="vllm_server")
    rows = [{"problem": "1+1?", "answer": str(i), "images": [png(i, (140, 28))]} for i in range(16)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    data = replace(config.data, train=str(folder / "data.parquet"))
    return replace(config, data=data), encoder


class Heard:
    """What a server was asked: of each training prompt its picture, and the weights it met."""

    def __init__(self, fault=lambda prompts: False):
        self.loaded, self.prompts, self.fault = 0, [], fault

    def __call__(self, handler):
        if handler.path == "/collective_rpc":
            self.loaded += 1
        if handler.path != "/inference/v1/generate" or handler.body["sampling_params"]["n"] != N:
            return False
        picture = handler.body["content_parts"][0]["url"]
        self.prompts.append((hashlib.sha256(picture.encode()).hexdigest()[:8], self.loaded))
        return self.fault(self.prompts) and handler.answer({"error": "no space"}, 500)

    def weights(self):
        """Which weights each step's four prompts met."""
        return [{w for _, w in self.prompts[i : i + 4]} for i in range(0, len(self.prompts), 4)]

    def pictures(self):
        """Those of each step."""
        return [{p for p, _ in self.prompts[i : i + 4]} for i in range(0, len(self.prompts), 4)]


def run(model, heard, out, *, overlap=True, resume=False, steps=3):
    config, encoder = model
    with standing_in(encoder, heard) as url:
        rollout = replace(
            config.rollout,
            server_urls=(url,),
            prompts=4,
            group_size=N,
            dynamic_filter=False,
            overlap=overlap,
        )
        whole = replace(
            config,
            out=str(out),
            name="run",
            resume=resume,
            rollout=rollout,
            train=replace(config.train, update_prompts=2, steps=steps),
            eval=EvalConfig(samples=1),
            reward=RewardConfig(workers=1),
        )
        train(whole, Console(quiet=True))
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_each_rollout_has_the_weights_from_before_the_update_beside_it(model, tmp_path):
    ahead, in_turn = Heard(), Heard()
    rows = run(model, ahead, tmp_path / "ahead")
    assert ahead.weights() == [{1}, {1}, {2}]
    plain = run(model, in_turn, tmp_path / "turn", overlap=False)
    assert in_turn.weights() == [{1}, {2}, {3}]
    assert ahead.pictures() == in_turn.pictures()
    # the stand-in draws by the seed alone, so both are updated on the same responses
    assert [r["reward"] for r in rows] == [r["reward"] for r in plain]
    assert [r["pg_loss"] for r in rows] == [r["pg_loss"] for r in plain]


def test_the_next_rollout_runs_while_the_update_does(model, tmp_path, monkeypatch):
    asked, updating = threading.Event(), threading.Event()
    waited = []

    def fault(prompts):
        if len(prompts) > 4:  # of the second step
            asked.set()
            waited.append(updating.wait(60))
        return False

    update = Updater.update

    def after_the_next_was_asked_for(self, *args, **kwargs):
        assert asked.wait(60)
        updating.set()
        return update(self, *args, **kwargs)

    monkeypatch.setattr(Updater, "update", after_the_next_was_asked_for)
    run(model, Heard(fault), tmp_path, steps=2)
    assert waited == [True] * 4


def test_a_rollout_that_fails_ahead_costs_nothing_that_was_trained(model, tmp_path):
    unharmed = Heard()
    run(model, unharmed, tmp_path / "unharmed")
    broken = Heard(lambda prompts: len(prompts) == 7)  # while the first step trains
    with pytest.raises(InputError, match=r"status 500.*no space"):
        run(model, broken, tmp_path)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    resumed = Heard()
    rows = run(model, resumed, tmp_path, resume=True)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert resumed.pictures() == unharmed.pictures()[1:]  # those of the lost rollout come again


def test_overlap_is_refused_where_it_would_be_wrong():
    tiny = get_preset("tiny")

    def overlapped(parity="ours", **rollout):
        objective = replace(tiny.objective, parity=parity, kl_prcp_direction="forward")
        rollout = {"overlap": True, "engine": "vllm_server"} | rollout
        return replace(tiny, objective=objective, rollout=replace(tiny.rollout, **rollout))

    check(overlapped())
    check(overlapped(parity="official", old_logprobs="sampler"))
    with pytest.raises(InputError, match=r"rollout\.engine is hf.*to vllm_server"):
        check(overlapped(engine="hf"))
    with pytest.raises(InputError, match=r"parity official.*old_logprobs to sampler"):
        check(overlapped(parity="official"))
    with pytest.raises(InputError, match=r"importance_cap is 0.*old_logprobs to sampler"):
        check(overlapped(importance_cap=0))


def test_ranks_tell_each_other_things_from_two_threads_at_a_time():
    launch(2, [__file__])


def talk_from_two_threads():
    import random
    import time

    import torch

    from papo_fast.parallel import Collectives, gather, gather_in_order, process_group, rank

    with process_group(torch.device("cpu")):
        own, found = Collectives(), []
        draw = random.Random(rank())

        def beside():
            with own.of_this_thread():
                for i in range(40):
                    time.sleep(draw.uniform(0, 0.004))
                    found.append(gather(("beside", i, rank())))
                    found.append(gather_in_order([f"{rank()}.{i}"], 2))

        thread = threading.Thread(target=beside)
        thread.start()
        for i in range(40):
            time.sleep(draw.uniform(0, 0.004))
            assert gather(("main", i)) == [("main", i)] * 2
        thread.join()
        assert found[::2] == [[("beside", i, r) for r in range(2)] for i in range(40)]
        assert found[1::2] == [[f"{r}.{i}" for r in range(2)] for i in range(40)]


if __name__ == "__main__":
    sys.exit(talk_from_two_threads())
