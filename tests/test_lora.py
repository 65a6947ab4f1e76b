"""Adapters: what is trained, what the reference is, what is saved; and Liger's layers."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from safetensors.torch import load_file

from papo_fast.config import ModelConfig, ParallelConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.errors import InputError
from papo_fast.model import liger
from papo_fast.model.loading import load_model
from papo_fast.model.lora import adapted_layers, is_adapter, merged
from papo_fast.model.packing import pack
from papo_fast.model.policy import Policy, SharedReference
from support import SUPPORT, parallel_worker
from support.family_checkpoints import write_checkpoint
from support.ranks import DATA, fixed_groups, launch
from support.small_runs import every_term

pytest.importorskip("peft", reason="pip install -e '.[lora]'")
CPU = torch.device("cpu")


@pytest.fixture(
    scope="module",
    params=[pytest.param("qwen2_5_vl", marks=pytest.mark.exhaustive), "qwen3_vl"],
)
def setup(request, tmp_path_factory):
    """Checkpoint, encoder, its plain policy, and a batch with a picture and one without."""
    path = write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    encoder = PromptEncoder(path, DATA)
    config = ModelConfig(path=str(path), dtype="float32", gradient_checkpointing=False)
    plain = Policy.load(config, encoder.banned_token_ids, CPU).requires_grad_(False)
    groups = fixed_groups(encoder)[1:3]
    return config, encoder, plain, pack(groups, plain.prompt_positions, aug=True)


def with_adapters(config, encoder, seed=None, **changes):
    """The LoRA policy; with a seed its adapters are no longer zero."""
    config = dataclasses.replace(config, lora_rank=4, **changes)
    policy = Policy.load(config, encoder.banned_token_ids, CPU)
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, p in policy.named_parameters():
                if is_adapter(name):
                    p.add_(0.05 * torch.randn_like(p))
    return policy


@pytest.mark.parametrize("vision", [True, False])
def test_it_starts_as_the_base_model_and_gradients_reach_adapters_alone(setup, vision):
    config, encoder, plain, batch = setup
    policy = with_adapters(config, encoder, train_vision=vision)
    stats, _ = policy.stats(batch)
    before, _ = plain.stats(batch)
    for name, value in stats._asdict().items():
        assert torch.equal(value, getattr(before, name)), name
    (stats.logprobs.sum() + stats.kl_prcp.sum()).backward()
    got = {n for n, p in policy.named_parameters() if p.grad is not None}
    assert got and got == {n for n, p in policy.named_parameters() if p.requires_grad}
    assert all(is_adapter(name) for name in got)
    assert any("visual" in name for name in got) == vision
    # the first factor's gradient is zero as long as the second is
    second = [p.grad for n, p in policy.named_parameters() if "lora_B" in n and p.requires_grad]
    assert all(grad.abs().max() > 0 for grad in second)


def test_reference_kl_is_that_of_an_explicit_second_model(setup):
    config, encoder, plain, batch = setup
    policy = with_adapters(config, encoder, seed=1)
    shared = SharedReference(policy)
    with torch.no_grad():
        want, _ = plain.stats(batch)
        got, _ = shared.stats(batch)
    assert torch.equal(got.logprobs, want.logprobs)
    stats, kl = policy.stats(batch, kl_to=shared)
    _, explicit = policy.stats(batch, kl_to=plain)
    print("KL to the base model:", kl.mean().item(), "largest error", (kl - explicit).abs().max())
    assert kl.mean() > 1e-3
    torch.testing.assert_close(kl, explicit, rtol=1e-5, atol=1e-6)
    assert (stats.logprobs - want.logprobs).abs().max() > 1e-2  # adapters are back on
    grads = []
    for value in (kl, explicit):
        policy.zero_grad(set_to_none=True)
        value.sum().backward()
        grads.append([p.grad.clone() for p in policy.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_is_saved_loads_without_peft_and_gives_the_same_log_probs(setup, tmp_path):
    config, encoder, plain, batch = setup
    policy = with_adapters(config, encoder, seed=2)
    policy.save(tmp_path / "merged")
    loaded = Policy.load(
        dataclasses.replace(config, path=str(tmp_path / "merged")), encoder.banned_token_ids, CPU
    )
    assert not adapted_layers(loaded.model)
    with torch.no_grad():
        want, got, base = (p.stats(batch)[0].logprobs for p in (policy, loaded, plain))
    assert (want - base).abs().max() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
    # and what a sampler is sent is the same
    sent = dict(policy.whole_weights())
    assert list(policy.whole_shapes()) == [(name, tuple(x.shape)) for name, x in sent.items()]
    assert sent.keys() == dict(loaded.model.named_parameters()).keys()
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(sent[name], weight), name
    # saving left the base weights as they were
    assert torch.equal(SharedReference(policy).stats(batch)[0].logprobs, base)


def test_two_ranks_train_the_adapters_of_one_process(tmp_path):
    path = write_checkpoint(tmp_path / "model", "qwen3_vl")
    encoder = PromptEncoder(path, DATA)
    preset = every_term()
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, path=str(path), dtype="float32", lora_rank=4),
        train=dataclasses.replace(preset.train, lr=3e-3, max_tokens=300),
        parallel=ParallelConfig(),
    )
    job = {
        "config": config,
        "bans": encoder.banned_token_ids,
        "groups": fixed_groups(encoder),
    }
    torch.save(job, tmp_path / "job.pt")
    parallel_worker.main(str(tmp_path / "job.pt"), str(tmp_path / "one"))
    worker = str(SUPPORT / "parallel_worker.py")
    launch(2, [worker, str(tmp_path / "job.pt"), str(tmp_path / "two")])
    start, one, two = (
        load_file(folder / "model.safetensors")
        for folder in (path, tmp_path / "one", tmp_path / "two")
    )
    assert start.keys() == one.keys() == two.keys()
    moved = {n for n in start if not torch.equal(start[n], one[n])}
    worst = max((one[n] - two[n]).abs().max().item() for n in one)
    size = max((one[n] - start[n]).abs().max().item() for n in one)
    print(f"{len(moved)} weights moved by up to {size:.1e}; two ranks differ by up to {worst:.1e}")
    assert all(n.endswith("weight") and "norm" not in n and "embed" not in n for n in moved)
    assert any("visual" in n for n in moved) and any("layers" in n for n in moved)
    assert size > 1e-3 and worst < 2e-5
    rows = [torch.load(tmp_path / x / "rows.pt", weights_only=True) for x in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert a["kl_ref"] == pytest.approx(b["kl_ref"], rel=1e-3, abs=1e-6)
    assert rows[0][-1]["kl_ref"] > 1e-5


def test_targets_can_be_chosen_and_must_exist(setup):
    config, encoder, _, _ = setup
    policy = with_adapters(config, encoder, lora_targets=("q_proj", "v_proj"), lora_alpha=2.0)
    names = adapted_layers(policy.model)
    assert {n.rpartition(".")[2] for n in names} == {"q_proj", "v_proj"}
    assert all(layer.scaling["default"] == 0.5 for layer in names.values())
    with pytest.raises(InputError, match=r"lora_targets names query.*k_proj.*q_proj"):
        with_adapters(config, encoder, lora_targets=("query",))


def test_every_rank_draws_the_same_adapters_and_the_runs_random_numbers_stay(setup):
    config, encoder, _, _ = setup
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = with_adapters(config, encoder)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    second = with_adapters(config, encoder)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_merging_does_not_change_the_weight_it_is_given(setup):
    config, encoder, _, _ = setup
    policy = with_adapters(config, encoder, seed=3)
    state = policy.model.state_dict()
    copies = {name: value.clone() for name, value in state.items()}
    result = merged(state, policy.model)
    assert all(torch.equal(state[name], copies[name]) for name in copies)
    changed = [n for n in result if ".q_proj.weight" in n]
    for name in changed:
        base, _, _ = name.rpartition(".weight")
        a, b = (copies[f"{base}.lora_{x}.default.weight"].double() for x in "AB")
        want = copies[f"{base}.base_layer.weight"].double() + 2 * b @ a
        torch.testing.assert_close(result[name].double(), want, rtol=1e-6, atol=1e-6)
    assert changed


def test_without_a_gpu_it_is_said_once_that_torchs_layers_run(setup, caplog):
    config, _, plain, _ = setup
    liger._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert not liger.use_liger(plain.model, config, CPU)
    assert [r.message for r in caplog.records if "Liger" in r.message] == [
        "torch's own layers run, not Liger's: its kernels need a GPU and this run is on cpu"
    ]
    with pytest.raises(InputError, match=r"model.liger is on, but its kernels need a GPU"):
        liger.use_liger(plain.model, dataclasses.replace(config, liger="on"), CPU)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_ligers_layers_are_put_into_one_model_and_no_other(family, tmp_path):
    # they are not run here: their kernels neither run on the CPU nor in Triton's interpreter
    pytest.importorskip("liger_kernel", reason="pip install -e '.[liger]'")
    path = str(write_checkpoint(tmp_path / family, family))
    models = [load_model(ModelConfig(path=path))]
    weights = {name: p.data_ptr() for name, p in models[0].named_parameters()}
    liger.patch(models[0])
    models.append(load_model(ModelConfig(path=path)))
    patched, later = (
        [n for n, m in model.named_modules() if m._get_name().startswith("Liger")]
        for model in models
    )
    assert later == []
    assert {name: p.data_ptr() for name, p in models[0].named_parameters()} == weights
    for layer in range(2):
        start = f"model.language_model.layers.{layer}."
        assert (
            start + "input_layernorm" in patched and start + "post_attention_layernorm" in patched
        )
        assert (start + "mlp" in patched) == (family != "qwen3_vl")
    assert any("visual" in name for name in patched) == (family != "qwen3_vl")


def test_in_bfloat16_frozen_weights_are_and_what_adapters_add_is_not_rounded_away(setup, tmp_path):
    config, encoder, plain, batch = setup
    policy = with_adapters(config, encoder, dtype="bfloat16")
    for name, p in policy.named_parameters():
        assert p.dtype == (torch.float32 if is_adapter(name) else torch.bfloat16), name
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.fill_(1e-6)
    stats, _ = policy.stats(batch)
    (stats.logprobs.sum() + stats.kl_prcp.sum()).backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    before, _ = plain.stats(batch)
    gap = (stats.logprobs - before.logprobs).abs()
    print("bfloat16 moves log-probs by", gap.mean().item(), "on average")
    assert 0 < gap.mean() < 0.3
    policy.save(tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    start = load_file(f"{config.path}/model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())
    adapted = [n for n in saved if "q_proj.weight" in n]
    change = [(saved[n] - start[n].bfloat16().float()).abs().max().item() for n in adapted]
    assert all(1e-8 < x < 1e-4 for x in change), change
