"""Which families and samplers the plain path takes, and what it says of those that it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest

from papo_fast.config import ModelConfig
from papo_fast.data.encoder import PromptTooLong
from papo_fast.errors import InputError
from papo_fast.model.choice import load_encoder
from papo_fast.presets import get_preset
from papo_fast.rollout.engines import make_engine
from support.plain_policies import DATA, loaded
from support.small_runs import small


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("florence2", "it is an encoder and a decoder"),
        ("chameleon", "it reads pictures as codes"),
        ("deepseek_vl_hybrid", "writes pictures as two tensors"),
        ("gpt2", "model; supported are"),
    ],
)
def test_a_family_that_cannot_work_is_refused_by_name(family, why, tmp_path):
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": family}))
    with pytest.raises(InputError, match=f"{family}.*{why}"):
        load_encoder(ModelConfig(path=str(tmp_path)), DATA)


def test_the_fast_path_cannot_be_forced_on_others(tiny):
    with pytest.raises(InputError, match=r"takes qwen2_vl, .*--model\.forward auto"):
        load_encoder(ModelConfig(path=str(tiny("gemma3")), forward="fast"), DATA)


def test_a_too_long_prompt_names_the_options_that_help_where_max_pixels_may_not(tiny):
    encoder = load_encoder(ModelConfig(path=str(tiny("gemma3"))), DATA)
    encoder.max_prompt_length = 20
    with pytest.raises(PromptTooLong, match=r"raise --data\.max-prompt-length or give smaller"):
        encoder.encode("x" * 30, [])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gemma3", "no token of a picture see"),
        ("glm4v_moe", "its experts compute something else"),
        ("internvl", "keeps the old head"),
    ],
)
def test_vllm_is_refused_where_it_does_not_sample_from_the_policy(name, why, tiny, tmp_path):
    config = small(get_preset("grpo"), tiny(name), "", tmp_path)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine="vllm"))
    encoder, policy = loaded(tiny(name))
    with pytest.raises(InputError, match=f"{why}.*rollout.engine hf"):
        make_engine(config, policy, encoder, tmp_path)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl_moe"])
def test_a_sampler_is_told_the_shapes_that_it_gets(name, tiny):
    """Under the names of published checkpoints, which are not those of the model in memory."""
    _, policy = loaded(tiny(name))
    got = {name: tuple(weight.shape) for name, weight in policy.whole_weights()}
    assert list(policy.whole_shapes()) == list(got.items())
    in_memory = {n: tuple(p.shape) for n, p in policy.model.named_parameters()}
    assert got != in_memory and got.keys() & in_memory.keys()
