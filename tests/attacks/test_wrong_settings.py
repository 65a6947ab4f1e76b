"""Settings that are wrong: each is one line that names the setting."""

from __future__ import annotations

import pytest

from support import TESTS
from support.attacks import assert_no_run, refused, train_on

CONFIG = TESTS / "data" / "configs" / "qwen2_5_vl_3b.json"
SETTINGS = [
    # not a number, infinite
    ("train grpo", "rollout.temperature", "nan"),
    ("train grpo", "eval.temperature", "inf"),
    ("train grpo", "train.lr", "nan"),
    ("train grpo", "train.lr", "inf"),
    ("train grpo", "train.betas", "nan 0.9"),
    ("train grpo", "train.grad-clip", "nan"),
    ("train grpo", "objective.kl-prcp-coef", "nan"),
    ("train grpo", "objective.clip-high", "inf"),
    ("train grpo", "objective.kl-prcp-clip", "-inf"),
    ("train grpo", "corruption.ratio", "nan"),
    ("train grpo", "reward.timeout", "inf"),
    ("train grpo", "rollout.gpu-memory", "nan"),
    # below and above
    ("train grpo", "seed", "-1"),
    ("train grpo", "seed", "4294967296"),
    ("train grpo", "threads", "-1"),
    ("train grpo", "threads", "1000000"),
    ("train grpo", "rollout.prompts", "0"),
    ("train grpo", "rollout.group-size", "1"),
    ("train grpo", "rollout.max-new-tokens", "-5"),
    ("train grpo", "rollout.temperature", "0"),
    ("train grpo", "rollout.temperature", "1e3"),
    ("train grpo", "rollout.importance-cap", "0.5"),
    ("train grpo", "rollout.server-timeout", "-1"),
    ("train grpo", "reward.workers", "0"),
    ("train grpo", "reward.workers", "100000000"),
    ("train grpo", "objective.clip-low", "1"),
    ("train grpo", "objective.clip-dual", "1"),
    ("train grpo", "objective.kl-prcp-top-p", "0"),
    ("train grpo", "train.betas", "0.9 1"),
    ("train grpo", "train.steps", "-3"),
    ("train grpo", "train.max-tokens", "0"),
    ("train grpo", "train.keep-checkpoints", "0"),
    ("train grpo", "data.max-prompt-length", "10000000000000000000000"),
    ("train grpo", "parallel.replicas", "0"),
    ("train grpo", "model.lora-rank", "-1"),
    ("train tiny", "digits.warm-accuracy", "1.5"),
    # of another type, unknown
    ("train grpo", "rollout.prompts", "many"),
    ("train grpo", "rollout.prompts", "2.5"),
    ("train grpo", "train.lr", "1e-6x"),
    ("train grpo", "train.betas", "0.9"),
    ("train grpo", "rollout.engine", "sglang"),
    ("train grpo", "model.dtype", "float8"),
    ("train grpo", "objective.clip-dual", "off"),
    ("train grpo", "nonsense", "3"),
    ("train grpo", "rollout.tempature", "1"),
    ("train grpo", "rollout.server-urls", "localhost:8000"),
    ("train grpo", "name", "../elsewhere"),
    ("train grp", "grp", ""),
    ("trian grpo", "trian", ""),
    # against each other
    ("train grpo --rollout.prompts 6", "train.update-prompts", "4"),
    ("train grpo --data.min-pixels 900", "data.max-pixels", "800"),
    ("train grpo --resume", "overwrite", ""),
    ("train grpo", "rollout.filter-range", "0.5 0.5"),
    ("train papo-g-3b --objective.parity ours", "objective.aug", "stored"),
    ("train papo-g-3b --objective.kl-prcp-estimator sampled", "objective.kl-prcp-direction",
     "reverse"),
    ("train grpo --rollout.dynamic-filter", "rollout.max-filter-rounds", "1"),
    ("train grpo", "device", "tpu"),
    ("train grpo", "out", "/proc/runs"),
    ("train grpo", "out", "/dev/null"),
    ("train grpo --resume", "out", "/proc/runs"),
    ("train tiny", "digits.cache", "/proc/cache"),
    ("train tiny", "digits.cache", "/dev/null"),
    # other commands
    ("plan", "gpus", "0"),
    ("plan", "gpus", "100000000000000000000000000000000"),
    ("plan", "mfu", "nan"),
    ("plan", "gpu", "abacus"),
    ("plan", "lengths.image", "-1"),
    ("plan", "lengths.response", "1000000000000000000000000"),
    ("plan", "preset", "papo"),
    ("eval", "samples", "0"),
    ("eval", "limit", "-1"),
    ("eval", "seed", "-1"),
    ("eval", "preset", "papo"),
    ("report", "run", "nowhere"),
    ("serve grpo", "rollout.server-urls", "http://one:8000 http://two:8000"),
    ("doctor", "verbose", ""),
]  # fmt: skip


@pytest.mark.parametrize(("command", "name", "value"), SETTINGS)
def test_a_wrong_setting_is_one_line_that_names_it(place, tmp_path, capfd, command, name, value):
    words = command.split()
    argv = [*words, *([f"--{name}"] if words[-1] != name else []), *value.split()]
    if words[:2] == ["train", "grpo"] or words[1:2] == ["papo-g-3b"]:
        given = ["--model.path", place / "model", "--data.train", place / "good.parquet"]
        argv = [*words[:2], *given, "--out", tmp_path / "runs", *argv[2:]]
    elif words == ["train", "tiny"]:
        cache = [] if name == "digits.cache" else ["--digits.cache", tmp_path / "cache"]
        argv += ["--out", tmp_path / "runs", *cache]
    elif words[0] == "plan":
        argv += ["--model.path", CONFIG]
    elif words[0] == "eval":
        argv += ["--model", place / "model", "--data", place / "good.parquet"]
    refused(capfd, argv, name)
    if name == "digits.cache":  # the run's folder is locked before the cache is filled
        assert_no_run(tmp_path)
    else:
        assert list(tmp_path.iterdir()) == []


# options → what the line names; these are refused when something is loaded
LATER = {
    "--parallel.replicas 3": "parallel.replicas",
    "--data.problem-key question": "'question'",
    "--data.train nowhere.jsonl": "nowhere.jsonl",
    "--data.test nowhere.jsonl": "nowhere.jsonl",
    "--data.train nobody/nothing": "nobody/nothing",
    "--model.path nowhere/at/all": "nowhere/at/all",
    "--model.path nobody/nothing": "nobody/nothing",
    "--model.lora-rank 4 --model.lora-targets no_such_layer": "model.lora_targets",
    "--rollout.engine vllm_server --rollout.server-urls http://127.0.0.1:9 "
    "--rollout.server-token-file /nowhere/TOKEN": "rollout.server_token_file",
    "--rollout.engine vllm_server --rollout.server-urls http://127.0.0.1:9": "rollout.server_urls",
    "--model.liger on": "liger",
    "--rollout.prompts 4": "rollout.prompts",
    "--train.steps 0 --train.epochs 0": "train.steps",
}


@pytest.mark.parametrize("options", LATER)
def test_a_setting_that_what_is_loaded_refutes_is_one_line(place, tmp_path, capfd, options):
    argv = [*train_on(place, tmp_path, place / "good.parquet"), *options.split()]
    refused(capfd, argv, LATER[options])
    assert_no_run(tmp_path)
