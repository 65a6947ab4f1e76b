"""Training on the plain path: every family, adapters, shared weights, and two processes as one."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from papo_fast.cli import main
from papo_fast.config import EvalConfig, ModelConfig
from papo_fast.model.choice import load_encoder
from papo_fast.model.plain import PlainPolicy
from papo_fast.model.policy import Policy, inference
from papo_fast.parallel import _weights_to_meta
from papo_fast.presets import get_preset
from papo_fast.rewards.scorer import Score
from support import SUPPORT
from support.plain_checkpoints import PLAIN
from support.plain_policies import DATA, KINDS, gradients, groups_of, loaded, often
from support.ranks import launch
from support.small_runs import both_streams, png, run, small


@pytest.fixture
def with_pictures(tmp_path):
    """A file of six rows, each with a picture wide or high enough that tiles are cut."""
    rows = [
        {"problem": "What?", "answer": str(i), "images": [png(i, ((64, 64), (120, 50))[i % 2])]}
        for i in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


def command(path, data, out, *more):
    """`papo-fast train grpo` on this model, two steps of four prompts."""
    return [
        *("train", "grpo", "--model.path", str(path), "--data.train", str(data)),
        *("--out", str(out), "--device", "cpu", "--model.dtype", "float32"),
        *("--data.min-pixels", "3136", "--data.max-pixels", "12544", "--reward.workers", "1"),
        *("--rollout.prompts", "4", "--rollout.group-size", "3", "--rollout.max-new-tokens", "6"),
        *("--train.steps", "2", "--train.update-prompts", "2", "--train.max-tokens", "400"),
        *more,
    ]


@pytest.mark.parametrize("name", often([n for n in PLAIN if n not in KINDS]))
def test_the_command_trains_every_family(name, tiny, with_pictures, tmp_path):
    assert main(command(tiny(name), with_pictures, tmp_path)) == 0
    [metrics] = tmp_path.glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(rows) == 2 and all(row["bad_updates"] == 0 for row in rows)
    # the sampler's log-probs are those of the policy that is scored
    assert all(row["sampler_mismatch"] < 1e-4 for row in rows)


@pytest.mark.parametrize("name", often(KINDS))
def test_papo_trains_each_family_and_its_model_is_read_back(name, tiny, questions, tmp_path):
    config = small(both_streams(get_preset("papo-g-7b")), tiny(name), questions, tmp_path)
    config = dataclasses.replace(config, eval=EvalConfig(samples=1, limit=3))
    folder, rows, summary = run(config)
    assert len(rows) == 2 and "accuracy_after_corrupted" in summary
    for row in rows:
        assert row["bad_updates"] == 0 and row["grad_norm"] > 0
        assert row["kl_prcp"] > 1e-5 and row["sampler_mismatch"] < 1e-4
    before = loaded(tiny(name))[1].state_dict()
    encoder, policy = loaded(folder / "model")
    moved = [n for n, v in policy.state_dict().items() if not torch.equal(v, before[n])]
    assert any("lm_head" in n or "embed" in n for n in moved)
    assert any(("vision" in n or "visual" in n) and "weight" in n for n in moved)
    groups = groups_of(encoder, questions)
    with inference(policy):
        once = policy.stats(policy.pack(groups))[0].logprobs
    policy.save(tmp_path / "again")
    encoder.save_pretrained(tmp_path / "again")
    again_encoder, again = loaded(tmp_path / "again")
    with inference(again):
        twice = again.stats(again.pack(groups_of(again_encoder, questions)))[0].logprobs
    torch.testing.assert_close(once, twice, atol=0, rtol=0)
    assert again_encoder.banned_token_ids == encoder.banned_token_ids


def test_weights_that_two_layers_share_stay_one_without_values(tiny):
    """Else one process gathers one weight more than the others."""
    model = AutoModelForImageTextToText.from_pretrained(tiny("internvl"), dtype=torch.float32)
    names = [n for n, _ in model.named_parameters()]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    _weights_to_meta(model)
    model.to("meta")
    assert [n for n, p in model.named_parameters() if p.is_meta] == names
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "smolvlm", "qwen3_5_moe"])
def test_adapters_and_a_frozen_tower(name, tiny, questions):
    pytest.importorskip("peft", reason="pip install -e '.[lora]'")
    model = ModelConfig(path=str(tiny(name)), dtype="float32", forward="plain")
    encoder = load_encoder(model, DATA)
    bans = encoder.banned_token_ids
    for vision in (True, False):
        settings = dataclasses.replace(model, lora_rank=2, train_vision=vision)
        policy = PlainPolicy.load(settings, bans, torch.device("cpu"))
        got = gradients(policy, groups_of(encoder, questions))
        assert got and all("lora" in n for n in got)
        assert any("vis" in n for n in got) == vision
    frozen = dataclasses.replace(model, train_vision=False)
    policy = PlainPolicy.load(frozen, bans, torch.device("cpu"))
    got = gradients(policy, groups_of(encoder, questions))
    assert got and not any("vis" in n or "project" in n or "connector" in n for n in got)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("internvl", PlainPolicy), ("qwen3_5", Policy)])
def test_two_ranks_train_as_one(name, kind, tiny, questions, tmp_path):
    """Sharded, each rank runs its share of the padded sequences, or of the trees.

    In two of the updates one of the ranks has text alone.
    """
    path = tiny(name)
    config = small(both_streams(get_preset("papo-g-7b")), path, questions, tmp_path)
    encoder = load_encoder(config.model, config.data)
    groups = groups_of(encoder, questions, count=6)
    for i, sample in enumerate(s for group in groups for s in group.samples):
        sample.advantage = 0.5 * (i % 3) - 0.4
        sample.score = Score(0.0, 0.0, 0.0, False)
    job = {
        "config": config,
        "groups": groups,
        "bans": encoder.banned_token_ids,
        "kind": kind,
        "stand_in": getattr(encoder, "one_picture", None),
    }
    torch.save(job, tmp_path / "job.pt")
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"ranks{ranks}"
        launch(ranks, [str(SUPPORT / "parallel_worker.py"), str(tmp_path / "job.pt"), str(out)])
        weights = load_file(out / "model.safetensors")
        found.append((weights, torch.load(out / "rows.pt", weights_only=False)))
    (alone, rows), (sharded, of_two) = found
    assert len(rows) == 3
    for one, two in zip(rows, of_two, strict=True):
        assert one["kl_prcp"] == pytest.approx(two["kl_prcp"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    before = load_file(path / "model.safetensors")
    for name, weight in alone.items():
        step = (weight - before[name]).abs().max()
        assert (weight - sharded[name]).abs().max() <= 0.05 * step + 1e-6, name
