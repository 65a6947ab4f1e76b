"""vLLM in the training process: it samples from the policy as the trainer scores it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from papo_fast.digits.model import build_checkpoint
from papo_fast.errors import InputError
from papo_fast.presets import get_preset
from papo_fast.rollout.vllm_requests import engine_options, require_vllm
from papo_fast.rollout.vllm_setup import ON_CPU
from support.ranks import launch
from support.small_runs import png
from support.vllm_checks import (
    CPU,
    check_agreement,
    check_agreement_after_every_sync,
    check_bans,
    mixed_prompts,
    needs_vllm,
    picture,
    run_alone,
    sample,
    untrained,
)

pytestmark = pytest.mark.xdist_group("vllm")  # one process, one engine at a time


@pytest.fixture(scope="module")
def engine_policy_encoder(tmp_path_factory):
    from papo_fast.rollout.vllm import VLLMRollout

    config, encoder, policy = untrained(tmp_path_factory.mktemp("model"), engine="vllm")
    environment = dict(os.environ)
    engine = VLLMRollout(config, encoder, CPU)
    engine.load_weights(policy)
    yield engine, policy, encoder
    engine.close()
    os.environ.clear()
    os.environ.update(environment)


@needs_vllm
def test_sampler_and_trainer_agree_after_every_sync(engine_policy_encoder):
    check_agreement_after_every_sync(*engine_policy_encoder)


FAMILY = """
import sys
from pathlib import Path
from support.family_checkpoints import write_checkpoint
from support.vllm_checks import CPU, at_hand, check_agreement_after_every_sync
from papo_fast.rollout.vllm import VLLMRollout

config, encoder, policy = at_hand(write_checkpoint(Path(sys.argv[1]), sys.argv[2], head_dim=32))
engine = VLLMRollout(config, encoder, CPU)
check_agreement_after_every_sync(engine, policy, encoder)
engine.close()
"""


@needs_vllm
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_the_other_families_agree_too(family, tmp_path):
    run_alone(FAMILY, tmp_path, family)


@needs_vllm
def test_banned_tokens_are_never_sampled(engine_policy_encoder):
    check_bans(*engine_policy_encoder)


@needs_vllm
def test_a_seed_decides_the_tokens_and_every_response_draws_its_own(engine_policy_encoder):
    engine, _, encoder = engine_policy_encoder
    prompts = mixed_prompts(encoder)
    a, b, c = (sample(engine, prompts, seed=seed) for seed in (5, 5, 6))
    assert a == b and a != c
    tokens = [tuple(c.token_ids) for group in a for c in group]
    assert len(set(tokens)) == len(tokens), "two responses drew the same numbers"


@needs_vllm
def test_more_prompts_than_fit_into_one_step_are_sampled_all_the_same(engine_policy_encoder):
    engine, policy, encoder = engine_policy_encoder
    prompts = [encoder.encode("1+23?" * 50, [picture(i)]) for i in range(40)]
    groups = sample(engine, prompts, n=2, max_new_tokens=4)
    check_agreement(policy, prompts, groups)


@needs_vllm
def test_responses_end_with_the_end_token_or_at_the_limit(engine_policy_encoder):
    engine, _, encoder = engine_policy_encoder
    prompt = encoder.encode("1+1?", [picture(1)])
    [group] = sample(engine, [prompt], n=64, temperature=2.0, max_new_tokens=20)
    assert {c.finished for c in group} == {True, False}
    for c in group:
        ends = [t in encoder.eos_token_ids for t in c.token_ids]
        assert ends.index(True) == len(ends) - 1 if c.finished else not any(ends)
        assert c.finished or len(ends) == 20
        assert len(c.logprobs) == len(ends)


@needs_vllm
def test_torch_keeps_its_threads_and_random_numbers(tmp_path, engine_policy_encoder):
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1


class Recorder:
    """Stands in for vLLM's engine on a GPU and writes down what it is asked."""

    def __init__(self):
        self.calls = []
        self.llm_engine = self

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, *args, *kwargs.values()))
            return True

        return call


def test_the_engine_sleeps_through_the_update_and_gets_weights_before_its_cache():
    from papo_fast.rollout.vllm import VLLMRollout

    engine = object.__new__(VLLMRollout)
    engine.llm, engine.can_sleep, engine.asleep = Recorder(), True, False
    engine.sleep()
    with pytest.raises(RuntimeError, match="load_weights first"):
        sample(engine, [])

    class SomePolicy:
        def whole_weights(self):
            return "weights"

    engine.load_weights(SomePolicy())
    assert engine.llm.calls == [
        ("sleep", 2),
        ("wake_up", ["weights"]),
        ("collective_rpc", "reload_weights", {"weights_iterator": "weights"}),
        ("wake_up", ["kv_cache"]),
        ("reset_prefix_cache",),
        ("reset_mm_cache",),
        ("reset_encoder_cache",),
    ]


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_temperatures_that_vllm_would_change_or_refuse_are_named(temperature):
    preset = get_preset("tiny")
    hot = replace(preset, rollout=replace(preset.rollout, temperature=temperature))
    with pytest.raises(InputError, match=f"rollout.temperature is {temperature}"):
        engine_options(hot, None)


def test_without_vllm_the_engine_says_how_to_install_it(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: pip install .*'\.\[vllm"):
        require_vllm()


# --- pictures and the two packages that CPU machines cannot load ----------------------------------


def test_pictures_survive_the_way_through_patches(tmp_path):
    _, encoder, _ = untrained(tmp_path)
    images = [picture(1, (56, 84)), picture(2, (140, 28))]  # sizes that need no resizing
    pixels, grid = encoder.process_images(images)
    again = encoder.to_images(pixels, grid)
    for before, after in zip(images, again, strict=True):
        assert before.size == after.size and before.tobytes() == after.tobytes()


def python(code: str, path: str = "") -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@needs_vllm
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is not a CPU build")
def test_on_cpu_torchvision_imports_in_vllms_processes_and_start_up_stays_light():
    assert python("import torchvision; print('works')", str(ON_CPU)) == "works"
    code = "import sys; print('torch' in sys.modules, sys.modules.get('torchaudio', 'free'))"
    assert python(code, str(ON_CPU)) == "False None"


def test_with_a_cuda_build_of_torch_nothing_is_touched(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("cuda = '13.0'\n")
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / "torchvision" / "version.py").write_text("__version__ = '0.28.0+cu130'\n")
    code = "import sys; print(sys.meta_path[0], sys.modules.get('torchaudio', 'free'))"
    seen = python(code, os.pathsep.join([str(ON_CPU), str(tmp_path)]))
    assert "DeclareOperators" not in seen and seen.endswith("free")


# --- the whole loop -------------------------------------------------------------------------------


@needs_vllm
def test_two_sharded_ranks_sample_with_an_engine_each_and_no_copy_of_the_model(tmp_path):
    build_checkpoint(tmp_path / "model", seed=0)
    rows = [
        {"problem": "1+1?", "answer": str(i), "images": [png(i, (140, 28))] if i % 3 else []}
        for i in range(8)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    options = {
        "digits.enabled": None,
        "model.path": tmp_path / "model",
        "data.train": tmp_path / "data.parquet",
        "data.test": tmp_path / "data.parquet",
        "rollout.engine": "vllm",
        "rollout.prompts": 4,
        "rollout.group-size": 4,
        "rollout.batch-size": 16,
        "rollout.filter-prompts": 4,
        "train.update-prompts": 2,
        "train.steps": 3,
        "train.lr": 1e-3,
        "objective.parity": "ours",  # the authors' weighs no rollout
        "eval.samples": 1,
        "reward.workers": 1,
        "device": "cpu",
        "out": tmp_path / "runs",
    }
    flat = [f"--{k}" if v is None else f"--{k}={v}" for k, v in options.items()]
    flat[0] = "--digits.no-enabled"
    launch(2, ["-m", "papo_fast", "train", "tiny", *flat])
    folder = tmp_path / "runs" / "tiny-seed0"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert 0 < row["sampler_mismatch"] < 1e-4  # of the weights of this very step
        assert row["rollout_weight"] == pytest.approx(1, abs=1e-4)
        assert row["grad_norm"] > 0 and row["kl_prcp"] > 0 and row["response_length"] > 1
    assert Path(folder / "model" / "model.safetensors").is_file()
