"""Options that save memory: what they change of losses, how runs go on, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from papo_fast import blockwise
from papo_fast.config_checks import check_memory, check_processes
from papo_fast.data.encoder import PromptEncoder
from papo_fast.errors import InputError
from papo_fast.experience import add_logprobs
from papo_fast.launch import train
from papo_fast.model import activations
from papo_fast.model.four_bit import FourBitLinear, four_bit_layers
from papo_fast.model.lora import is_adapter
from papo_fast.model.packing import pack
from papo_fast.model.policy import Policy
from papo_fast.run.checkpoint import CheckpointStore
from papo_fast.run.shards import SafeReader
from papo_fast.update import Updater
from support.family_checkpoints import write_checkpoint
from support.memory_options import CPU, needs
from support.ranks import DATA, fixed_groups
from support.small_runs import every_term, run, small

# a few updates on the same groups: options of the model, the optimizer and the process
MODEL, TRAIN, PARALLEL = "model", "train", "parallel"
HALF = {"weights_dtype": "bfloat16"}
OPTIONS = {
    # name: (changes by section, largest difference of a loss to the plain run)
    "bf16 reference": ({MODEL: {"reference_dtype": "bfloat16"}}, 2e-3),
    "bf16 weights, rounded at random": ({MODEL: HALF}, 2e-2),
    "bf16 weights and a master": ({MODEL: HALF, TRAIN: {"master_weights": True}}, 2e-2),
    "8bit moments": ({TRAIN: {"optimizer": "adamw_8bit"}}, 5e-3),
    "fused": ({TRAIN: {"fused": "on"}}, 1e-5),
    "optimizer offloaded": ({PARALLEL: {"offload_optimizer": True}}, 0.0),
    "activations offloaded": ({PARALLEL: {"offload_activations": True}}, 0.0),
    "all of them, 8bit": (
        {
            MODEL: {**HALF, "reference_dtype": "bfloat16"},
            TRAIN: {"optimizer": "adamw_8bit"},
            PARALLEL: {"offload_optimizer": True, "offload_activations": True},
        },
        2e-2,
    ),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("memory") / "model", "qwen2_5_vl")
    encoder = PromptEncoder(path, DATA)
    base = every_term()
    config = dataclasses.replace(
        base,
        objective=base.objective.resolved(),
        model=dataclasses.replace(
            base.model, path=str(path), dtype="bfloat16", gradient_checkpointing=True
        ),
        rollout=dataclasses.replace(base.rollout, prompts=6, group_size=3),
        train=dataclasses.replace(base.train, lr=1e-3, max_tokens=300, update_prompts=2),
    )
    return config, encoder


def changed(config, options):
    return dataclasses.replace(
        config,
        **{k: dataclasses.replace(getattr(config, k), **v) for k, v in options.items()},
    )


def start(job, options):
    config, encoder = job
    config = changed(config, options)
    check_memory(config)
    torch.manual_seed(0)  # adapters
    policy = Policy.load(config.model, encoder.banned_token_ids, CPU, config.parallel)
    reference = policy.reference(config)
    groups = fixed_groups(encoder)
    add_logprobs(groups, policy, reference, config)
    return Updater(config, policy, reference, total_updates=3), groups


def update(updater, groups, i):
    return updater.update(groups[2 * i : 2 * i + 2], lambda _: None, first=i == 0)


@pytest.fixture(scope="module")
def plain(job):
    updater, groups = start(job, {})
    return [update(updater, groups, i) for i in range(3)]


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_of_three_steps_are_those_of_the_plain_run(job, plain, name):
    needs(name)
    options, bound = OPTIONS[name]
    updater, groups = start(job, options)
    rows = [update(updater, groups, i) for i in range(3)]
    losses, theirs = ([row["loss"] for row in r] for r in (rows, plain))
    print(f"{name}: {losses}, plain {theirs}")
    assert len({round(x, 4) for x in theirs}) == 3
    worst = max(abs(a - b) for a, b in zip(losses, theirs, strict=True))
    print(f"largest difference {worst:.1e}, bound {bound:.0e}")
    assert worst <= bound
    assert all(row["grad_norm"] > 0 and math.isfinite(row["grad_norm"]) for row in rows)


@pytest.mark.parametrize("name", [n for n in OPTIONS if "activations" not in n and n != "fused"])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(job, tmp_path, name):
    needs(name)
    options, _ = OPTIONS[name]
    updater, groups = start(job, options)
    for i in range(2):
        update(updater, groups, i)
    store = CheckpointStore(tmp_path)
    store.save(2, updater.policy, updater.optimizer, {"score": 0.0, **updater.counters()})
    last = update(updater, groups, 2)
    again, groups = start(job, options)
    again.restore(store.load(again.policy, again.optimizer))
    torch.rand(7)  # the process's own random numbers decide nothing
    assert update(again, groups, 2) == last
    pairs = list(zip(updater.policy.parameters(), again.policy.parameters(), strict=True))
    assert pairs and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    for a, b in pairs:
        ours, theirs = updater.optimizer.state[a], again.optimizer.state[b]
        assert ours.keys() == theirs.keys() and ours
        assert all(x.dtype == theirs[k].dtype for k, x in ours.items())
        assert all(torch.equal(x, theirs[k]) for k, x in ours.items())


def test_gradients_of_micro_batches_add_up_in_float32(job):
    updater, groups = start(job, OPTIONS["bf16 weights, rounded at random"][0])
    weight = updater.policy.model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    seen = []
    step = updater.optimizer.step
    updater.optimizer.step = lambda: (seen.append(weight.grad.clone()), step())
    update(updater, groups, 0)
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_offloaded_activations_change_no_gradient(checkpoints, monkeypatch, family):
    monkeypatch.setattr(activations, "LEAST", 1)
    encoder = PromptEncoder(checkpoints[family], DATA)
    config = every_term()
    model = dataclasses.replace(config.model, path=str(checkpoints[family]), dtype="float32")
    moved, gradients = [], []
    count = activations.OffloadedActivations.__exit__

    def leaving(self, *args):
        moved.append(self.offloaded)
        return count(self, *args)

    monkeypatch.setattr(activations.OffloadedActivations, "__exit__", leaving)
    for offload in (False, True):
        parallel = dataclasses.replace(config.parallel, offload_activations=offload)
        policy = Policy.load(model, encoder.banned_token_ids, CPU, parallel).train()
        batch = pack(fixed_groups(encoder)[:3], policy.prompt_positions, aug=True)
        stats, _ = policy.stats(batch)
        (stats.logprobs.sum() + stats.kl_prcp.sum()).backward()
        gradients.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    text, vision = policy.model.config.text_config, policy.model.config.vision_config
    # what each layer is given
    least = 4 * text.num_hidden_layers * text.hidden_size * len(batch.input_ids_T)
    least += 4 * vision.depth * vision.hidden_size * len(batch.pixel_values)
    (bytes_moved,) = moved
    print(f"{bytes_moved} bytes moved, {least} of them what layers are given")
    assert least <= bytes_moved
    with torch.no_grad():
        policy.stats(batch)
    assert len(moved) == 1  # nothing is stored without gradients


def test_one_process_alone_can_offload_its_weights(checkpoints, questions, tmp_path):
    config = small(every_term(), checkpoints["qwen2_5_vl"], questions, tmp_path)
    # pictures in every update: AdamW skips what has no gradient, and FSDP's is zero
    config = changed(config, {TRAIN: {"update_prompts": 4}})
    _, whole, _ = run(dataclasses.replace(config, name="whole"))
    parallel = dataclasses.replace(config.parallel, offload=True)
    kinds = set()
    load = Policy.load.__func__

    def loading(cls, *args, **kwargs):
        policy = load(cls, *args, **kwargs)
        kinds.add(type(next(policy.parameters())) is torch.nn.Parameter)
        kinds.add(policy.is_sharded)
        return policy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policy, "load", classmethod(loading))
        _, rows, _ = run(dataclasses.replace(config, name="offloaded", parallel=parallel))
    assert True in kinds  # the policy, its reference; the sampler's copy is whole
    assert not torch.distributed.is_initialized()
    for a, b in zip(rows, whole, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["reward"] == b["reward"]


# frozen weights in 4 bits


@pytest.fixture
def four_bits(job):
    needs("4-bit LoRA")
    return {MODEL: {"lora_rank": 4, "quantize": "nf4"}}


def test_frozen_weights_in_4_bits_are_small_and_near_and_adapters_learn(job, four_bits):
    updater, groups = start(job, four_bits)
    lora, _ = start(job, {MODEL: {"lora_rank": 4}})
    layers = four_bit_layers(updater.policy.model)
    text = updater.policy.model.config.text_config
    vision = updater.policy.model.config.vision_config
    linear = [n for n, _ in lora.policy.named_modules() if n.endswith(".base_layer")]
    assert len(layers) == len(linear) and len(layers) >= 7 * text.num_hidden_layers + vision.depth
    for name, layer in layers.items():
        full = lora.policy.model.get_submodule(name).weight.float()
        error = ((layer.weight - full).norm() / full.norm()).item()
        assert 0.02 < error < 0.12, (name, error)  # NF4 of normal numbers: 9 %
        size = layer.codes.nbytes + layer.scales.nbytes
        assert size == blockwise.bytes_4(full.numel()) < 0.57 * full.numel()
        assert not list(layer.parameters(recurse=False)) or layer.bias is not None
    assert all(p.dtype == torch.float32 for n, p in updater.policy.named_parameters()
               if is_adapter(n))  # fmt: skip
    before = [p.detach().clone() for p in updater.parameters]
    ours = [update(updater, groups, i)["loss"] for i in range(3)]
    _, groups = start(job, {MODEL: {"lora_rank": 4}})
    theirs = [update(lora, groups, i)["loss"] for i in range(3)]
    print(f"4-bit base {ours}, bfloat16 base {theirs}")
    # another base model: losses are near, not equal
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.05
    assert any(not torch.equal(a, b) for a, b in zip(before, updater.parameters, strict=True))


def test_a_product_with_4_bits_has_the_gradient_of_the_weight_they_stand_for(four_bits):
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 40)
    small_ = FourBitLinear(layer, torch.float32)
    x = torch.randn(3, 96, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    upstream = torch.randn(3, 40)
    small_(x).backward(upstream)
    torch.nn.functional.linear(y, small_.weight, layer.bias).backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)


def test_what_is_saved_of_4_bits_is_whole_and_is_what_a_sampler_gets(job, four_bits, tmp_path):
    updater, groups = start(job, four_bits)
    update(updater, groups, 0)
    policy = updater.policy
    policy.save(tmp_path, torch.bfloat16)
    saved = load_file(tmp_path / "model.safetensors")
    sampler = dict(policy.whole_weights())
    assert list(policy.whole_shapes()) == [(name, tuple(x.shape)) for name, x in sampler.items()]
    config, _ = job
    base = Policy.load(config.model, [], CPU)
    assert sampler.keys() == {name for name, _ in base.whole_weights()}
    assert all(x.dtype == torch.bfloat16 for x in saved.values())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = Policy.load(dataclasses.replace(config.model, path=str(tmp_path)), [], CPU)
    for name, weight in again.model.named_parameters():
        torch.testing.assert_close(weight.bfloat16(), sampler[name], rtol=0, atol=0, msg=name)


def test_a_run_with_4_bits_goes_on_from_a_checkpoint(job, four_bits, tmp_path):
    updater, groups = start(job, four_bits)
    update(updater, groups, 0)
    store = CheckpointStore(tmp_path)
    store.save(1, updater.policy, updater.optimizer, {"score": 0.0, **updater.counters()})
    keys = SafeReader(tmp_path / "step-1" / "shards").read_metadata().state_dict_metadata
    assert len(keys) > 100 and all(is_adapter(k) or "param_groups" in k for k in keys)
    last = update(updater, groups, 1)
    again, groups = start(job, four_bits)
    again.restore(store.load(again.policy, again.optimizer))
    assert update(again, groups, 1) == last


# settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({MODEL: {**HALF, "dtype": "float32"}}, "model.dtype is float32"),
        ({MODEL: {**HALF, "lora_rank": 2}}, "model.lora_rank trains adapters alone"),
        ({TRAIN: {"master_weights": True}}, "model.weights_dtype is float32"),
        ({MODEL: {"quantize": "nf4"}}, "set model.lora_rank"),
        (
            {MODEL: {"gradient_checkpointing": False}, PARALLEL: {"offload_activations": True}},
            "set model.gradient_checkpointing",
        ),
        (
            {PARALLEL: {"offload": True, "offload_optimizer": True}},
            "leave out parallel.offload_opt",
        ),
        ({PARALLEL: {"offload": True}, MODEL: HALF}, "set model.weights_dtype to float32"),
    ],
)
def test_options_that_do_not_go_together_are_refused(job, options, message):
    with pytest.raises(InputError, match=message):
        check_memory(changed(job[0], options))


def test_what_one_process_alone_can_do_is_refused_to_several(job):
    for options in ({MODEL: HALF}, {PARALLEL: {"offload_optimizer": True}}):
        check_processes(changed(job[0], options), 1)
        with pytest.raises(InputError, match="but there are 2"):
            check_processes(changed(job[0], options), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {TRAIN: {"optimizer": "adamw_8bit"}},
            "train.optimizer adamw_8bit needs bitsandbytes.*quant",
        ),
        (
            {MODEL: {"quantize": "nf4", "lora_rank": 2}},
            "model.quantize nf4 needs bitsandbytes.*quant",
        ),
        ({MODEL: {"lora_rank": 2}}, "model.lora_rank 2 needs peft.*lora"),
    ],
)
def test_a_missing_library_is_named_with_its_extra_before_anything_is_loaded(
    job, monkeypatch, tmp_path, options, message
):
    found, missing = importlib.util.find_spec, message.split(".*")[0].split()[-1]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == missing else found(n, *a)
    )
    config = changed(job[0], {**options, "data": {"train": "gone.parquet"}})
    config = dataclasses.replace(config, device="cpu", out=str(tmp_path))
    with pytest.raises(InputError, match=message):
        train(config)
    assert not list(tmp_path.iterdir())


def test_the_saved_model_is_float32_unless_asked(job, tmp_path):
    updater, _ = start(job, OPTIONS["bf16 weights, rounded at random"][0])
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        updater.policy.save(folder, dtype)
        saved = load_file(folder / "model.safetensors")
        assert {x.dtype for x in saved.values()} == {dtype}
        name = "model.visual.patch_embed.proj.weight"
        mine = updater.policy.model.get_parameter(name)
        key = next(k for k in saved if k.endswith("patch_embed.proj.weight"))
        assert torch.equal(saved[key].float(), mine.float())
    assert not isinstance(mine, DTensor)
