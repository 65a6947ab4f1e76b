"""What `papo-fast plan` computes: against measured memory, and for the models people train."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.family_checkpoints import write_checkpoint
from support.planned import PUBLISHED, arguments, resolved_preset

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import update_memory
from update_memory import Case

from papo_fast.cli import main
from papo_fast.config import DataConfig, ModelConfig, RolloutConfig
from papo_fast.config_checks import check_memory, check_processes
from papo_fast.data.encoder import PromptEncoder
from papo_fast.model.batching import distribute, tree_tokens
from papo_fast.model.flops import ModelShape
from papo_fast.model.policy import Policy
from papo_fast.planning.advice import changed_by, effects, gpus_needed, remedy
from papo_fast.planning.arguments import Lengths
from papo_fast.planning.gpus import GPUS
from papo_fast.planning.memory import Layout, plan_memory
from papo_fast.planning.seconds import estimate_step
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.workload import micro_batch, step_work
from papo_fast.rollout.engines import engine_class
from papo_fast.rollout.hf import HFRollout


@pytest.fixture(scope="module")
def warm():
    update_memory.warm_up()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("case", "model"),
    [
        pytest.param(  # the options below are measured of such a model, too
            Case("qwen2_5_vl", 384, 1536, 4, 4000, 192, 3, prompts=2, together=1),
            {},
            marks=pytest.mark.exhaustive,
        ),
        (
            Case("qwen3_vl", 256, 1024, 6, 2000, 192, 3, prompts=2, together=1),
            {"gradient_checkpointing": True},
        ),
        pytest.param(
            Case("qwen2_5_vl", 512, 1024, 3, 3000, 128, 2, response=60, prompts=2),
            {"lora_rank": 8, "train_vision": False},
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["Qwen2.5-VL", "Qwen3-VL, checkpointing", "Qwen2.5-VL, LoRA, frozen vision tower"],
)
def test_planned_memory_is_within_15_percent_of_a_measured_update(warm, case, model, tmp_path):
    if "lora_rank" in model:
        pytest.importorskip("peft")
    update_memory.write_checkpoint(case, tmp_path)
    config = update_memory.configuration(case, tmp_path, model)
    measured = update_memory.measure(case, config)
    plan = update_memory.planned(case, config)
    planned = sum(plan.update.values())
    print(f"measured {measured / 2**20:.0f} MiB, planned {planned / 2**20:.0f}: {plan.update}")
    assert planned == pytest.approx(measured, rel=0.15)
    # the plan is not right by one large term alone
    assert 0.15 < plan.update["activations"] / planned < 0.85


SMALL = Case("qwen2_5_vl", 320, 1024, 3, 3000, 128, 2, (8, 12), 20, 24, 2, 4, 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    "way",
    [
        "bfloat16 reference",
        "bfloat16 weights, float32 copy",
        "all in bfloat16, 8-bit AdamW",
        "LoRA on 4 bits",
    ],  # the others are in docs/scaling.md, by the same script
)
def test_the_plan_of_each_memory_option_is_within_15_percent_of_a_measured_update(
    warm, tmp_path, way
):
    model, train, parallel, ranks = update_memory.WAYS[way]
    if "8-bit" in way or "4 bits" in way:
        pytest.importorskip("bitsandbytes", reason="pip install -e '.[quant]'")
    if "lora_rank" in model:
        pytest.importorskip("peft", reason="pip install -e '.[lora]'")
    # Of so little memory the code that oneDNN compiles would be a sixth.
    case = dataclasses.replace(SMALL, response=2 * SMALL.response) if "4 bits" in way else SMALL
    update_memory.write_checkpoint(case, tmp_path)
    plain = update_memory.configuration(case, tmp_path)
    config = update_memory.configuration(case, tmp_path, model, parallel, train)
    measured = update_memory.measure(case, config, ranks)
    plan, before = (update_memory.planned(case, c, ranks) for c in (config, plain))
    planned, usual = (sum(p.update.values()) + p.host for p in (plan, before))
    print(f"{way}: measured {measured / 2**20:.0f} MiB, planned {planned / 2**20:.0f}, without "
          f"the option {usual / 2**20:.0f}")  # fmt: skip
    assert planned == pytest.approx(measured, rel=0.15)
    assert planned < 0.95 * usual or "copy" in way


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(sizes, name):
    assert sizes[name].parameters / 1e9 == pytest.approx(PUBLISHED[name], abs=0.01)


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_plan_counts_the_parameters_that_the_policy_trains(tmp_path, family, vision, lora):
    if lora:
        pytest.importorskip("peft")
    path = write_checkpoint(tmp_path / "model", family)
    targets = ("q_proj", "down_proj") if lora and not vision else ()
    config = ModelConfig(
        path=str(path),
        dtype="float32",
        train_vision=vision,
        lora_rank=lora,
        lora_targets=targets,
    )
    policy = Policy.load(config, [], torch.device("cpu"))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in policy.parameters())
    settings = dataclasses.replace(resolved_preset("papo-g-3b"), model=config)
    plan = plan_memory(settings, ModelSizes.of(config), Lengths(16, 8, 8))
    # two moments of four bytes; weights of four
    assert plan.update["optimizer"] == 8 * trained
    assert plan.update["weights"] == 4 * everything


@pytest.mark.parametrize("gpus", [1, 2, 8, 64])
@pytest.mark.parametrize("name", [n for n in PUBLISHED if "qwen2" in n])
def test_plans_for_h100s_fit_or_say_what_to_switch_on(sizes, name, gpus):
    config = resolved_preset("papo-g-7b")
    layout, memory = Layout(gpus, GPUS["h100"].memory), GPUS["h100"].memory
    plan = plan_memory(config, sizes[name], Lengths(), layout)
    parts = ", ".join(f"{k} {v / 2**30:.1f}" for k, v in plan.worst.items())
    print(f"{name} on {gpus}: {plan.peak / 2**30:.1f} GiB ({parts})")
    # 16 bytes a parameter and a reference, however they are spread
    assert plan.peak > 20 * sizes[name].parameters / gpus
    if plan.fits(memory):
        return
    found = remedy(config, sizes[name], Lengths(), layout)
    if found is None:  # a 72B in bfloat16 is larger than one GPU, where generate needs it whole
        assert (name, gpus) in {("qwen2_5_vl_72b", 1), ("qwen2_5_vl_72b", 2)}
        assert gpus_needed(config, sizes[name], Lengths(), layout) in (4, 8)
        return
    chosen, better = found
    print("   ->", [option.name for option in chosen], f"{better.peak / 2**30:.1f}")
    assert better.fits(memory)
    # the advice, followed: the plan of the changed settings is the one that was promised
    changed, there = changed_by(chosen, config, layout)
    assert there.ranks <= gpus
    check_memory(changed)
    check_processes(changed, there.ranks)
    again = plan_memory(changed, sizes[name], Lengths(), there)
    assert again.peak == better.peak and again.peak < plan.peak


def test_the_advice_can_be_passed_to_the_command_line(sizes, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    config = resolved_preset("papo-g-7b")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, gradient_checkpointing=False)
    )
    layout = Layout(8, GPUS["h100"].memory)
    for effect in effects(config, sizes["qwen2_5_vl_7b"], Lengths(), layout):
        flags = effect.option.name.partition(" (")[0].split()
        argv = arguments(
            "qwen2_5_vl_7b", 8, "--model.no-gradient-checkpointing",
            "--objective.parity", "ours", "--objective.aug", "trained",
        )  # fmt: skip
        assert main([*argv, *flags]) == 0, flags
        sums = [line for line in capsys.readouterr().out.splitlines() if "sum" in line]
        peak = max(float(x) for x in re.findall(r"[0-9]+[.][0-9]", sums[0]))
        assert peak == pytest.approx(effect.plan.peak / 2**30, abs=0.06), flags


def test_where_vllm_does_not_fit_into_its_share_it_gets_gpus_of_its_own(sizes):
    config = resolved_preset("papo-g-7b")
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, engine="vllm", gpu_memory=0.4)
    )
    layout = Layout(8, GPUS["h100"].memory)
    plan = plan_memory(config, sizes["qwen2_5_vl_32b"], Lengths(), layout)
    assert "rollout.gpu_memory = 0.4 is 31.6 GiB" in plan.problem
    chosen, better = remedy(config, sizes["qwen2_5_vl_32b"], Lengths(), layout)
    names = [option.name for option in chosen]
    assert names[0].startswith("--rollout.engine vllm_server --rollout.tensor-parallel 2")
    assert better.fits(GPUS["h100"].memory) and not any("--gpus" in name for name in names)


def test_a_rollout_beside_the_update_takes_the_longer_of_the_two(sizes):
    config = resolved_preset("papo-g-7b")
    config = dataclasses.replace(
        config, rollout=dataclasses.replace(config.rollout, engine="vllm_server")
    )
    case = (sizes["qwen2_5_vl_7b"], Lengths(), Layout(6, GPUS["h100"].memory))
    now = estimate_step(config, *case, GPUS["h100"])
    [overlap] = [e for e in effects(config, *case) if "--rollout.overlap" in e.option.name]
    assert overlap.option.name == "--rollout.overlap"
    then = overlap.time
    assert then.total == max(then.rollout, then.experience + then.update) < now.total
    # the authors' objective has no importance weights
    goal = dataclasses.replace(config.objective, parity="official")
    config = dataclasses.replace(config, objective=goal)
    [overlap] = [e for e in effects(config, *case) if "--rollout.overlap" in e.option.name]
    assert overlap.option.name == "--rollout.overlap --rollout.old-logprobs sampler"


def test_every_option_is_of_use_somewhere_and_none_makes_it_worse(sizes):
    config = resolved_preset("papo-g-7b")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, gradient_checkpointing=False)
    )
    layout = Layout(8, GPUS["h100"].memory)
    before = plan_memory(config, sizes["qwen2_5_vl_7b"], Lengths(), layout)
    found = list(effects(config, sizes["qwen2_5_vl_7b"], Lengths(), layout))
    assert len(found) >= 7
    for effect in found:
        # of the larger part, and the sampler's batch of the other
        smaller = effect.plan.peak < before.peak
        samples = sum(effect.plan.rollout.values()) < sum(before.rollout.values())
        assert smaller or samples, effect.option.name
        assert effect.plan.peak <= before.peak


def test_more_tokens_layers_kept_and_longer_prompts_take_more(sizes):
    config, layout = resolved_preset("papo-g-7b"), Layout(8, GPUS["h100"].memory)

    def activations(lengths=None, **model):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
        plan = plan_memory(changed, sizes["qwen2_5_vl_7b"], lengths or Lengths(), layout)
        return plan.update["activations"]

    assert activations(gradient_checkpointing=False) > 4 * activations()
    assert activations(train_vision=False) < activations()
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, max_tokens=8192))
    few, more = (micro_batch(c, Lengths(), 4, 8) for c in (half, config))
    assert 1.8 < more.tokens / few.tokens < 2.2
    # the planned logits are those that token_stats does not hold: two streams, and gradients
    plan = plan_memory(config, sizes["qwen2_5_vl_7b"], Lengths(), layout)
    assert plan.logits == 2 * 2 * 4 * plan.batch.response_tokens * 152_064


def test_a_micro_batch_is_the_one_that_packing_makes(warm):
    case = Case("qwen2_5_vl", 384, 1536, 4, 4000, 192, 3)
    config = update_memory.configuration(case, "unused")
    data = update_memory.experience(case)
    shape = ModelShape.of(case.model_config())
    for ranks, tokens in ((1, 0), (1, 300), (2, 0)):
        train = config.train
        if tokens:
            train = dataclasses.replace(train, max_tokens=tokens)
        changed = dataclasses.replace(config, train=train)
        dealt = distribute(data, train.max_tokens, 2, shape, ranks)
        largest = max(2 * sum(map(tree_tokens, b)) for of_rank in dealt for b in of_rank)
        expected = micro_batch(changed, case.lengths, 4, ranks)
        assert expected.tokens == pytest.approx(largest, rel=0.15), (ranks, tokens)
        assert expected.accumulated == (len(dealt[0]) > 1)


def test_time_counts_the_passes_and_falls_with_more_gpus(sizes):
    config, lengths = resolved_preset("papo-g-7b"), Lengths()
    model = sizes["qwen2_5_vl_7b"]
    grpo = resolved_preset("grpo")
    plain = dataclasses.replace(config.model, gradient_checkpointing=False)
    ours, theirs = (
        step_work(dataclasses.replace(c, model=plain), lengths, model.flops) for c in (config, grpo)
    )
    assert ours.update == 2 * theirs.update  # both streams, forward and backward
    assert ours.experience == theirs.experience
    gpu = GPUS["h100"]
    one, eight = (estimate_step(config, model, lengths, Layout(n, gpu.memory), gpu) for n in (1, 8))
    assert one.update == pytest.approx(8 * eight.update)
    half = estimate_step(config, model, lengths, Layout(1, gpu.memory), gpu, mfu=0.175)
    assert half.update == pytest.approx(2 * one.update, rel=2e-3)  # but for the optimizer
    # by hand: 1920 responses of 350 tokens and their prompts once, 8.3 B parameters, both streams,
    # three passes and the recomputed one
    tokens = 384 * (760 + 5 * 350)
    about = 2 * 4 * 2 * 7.6e9 * tokens / (0.35 * 989e12)
    assert one.update == pytest.approx(about, rel=0.3)


ENGINES = typing.get_args(typing.get_type_hints(RolloutConfig)["engine"])


@pytest.mark.parametrize("responses", [1, 4])
def test_a_prompt_goes_through_the_model_as_often_as_its_engine_says(tmp_path, responses):
    path = write_checkpoint(tmp_path / "model", "qwen2_5_vl")
    encoder = PromptEncoder(path, DataConfig(min_pixels=28 * 28, max_pixels=28 * 28 * 16))
    policy = Policy.load(ModelConfig(path=str(path), dtype="float32"), [], torch.device("cpu"))
    engine = HFRollout(policy, encoder.eos_token_ids, encoder.pad_token_id, batch_size=8)
    prompts = [encoder.encode(f"{i} + 2?", [Image.new("RGB", (84, 56))]) for i in (1, 3)]
    tokens, patches = [], []
    model = policy.model.model
    model.language_model.register_forward_hook(
        lambda module, given, output: tokens.append(output.last_hidden_state.shape[:2].numel())
    )
    model.visual.patch_embed.register_forward_hook(
        lambda module, given, output: patches.append(len(output))
    )
    with torch.no_grad():
        hidden_RD = engine._prefill(prompts, responses, 1)[0]
    assert len(hidden_RD) == 2 * responses
    passes = HFRollout.prompt_passes(responses)
    assert sum(tokens) == passes * sum(map(len, prompts))
    assert sum(patches) == passes * sum(len(p.pixel_values) for p in prompts)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_plan_counts_the_prompt_passes_of_the_engine(sizes, engine, monkeypatch):
    config, lengths = resolved_preset("papo-g-7b"), Lengths()
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, engine=engine))
    model = sizes["qwen2_5_vl_7b"]
    once = step_work(config, lengths, model.flops).prefill
    # two FLOPs for a weight and a token: 760 of the decoder, and 640 x 4 patches of the tower
    about = 2 * config.rollout.prompts * (760 * 6.5e9 + 640 * 4 * 0.64e9)
    assert once == pytest.approx(about, rel=0.1)
    monkeypatch.setattr(engine_class(engine), "prompt_passes", staticmethod(lambda n: n))
    again = step_work(config, lengths, model.flops).prefill
    assert again == config.rollout.group_size * once


def test_planning_does_not_import_vllm_nor_engines_the_doctor():
    code = (
        "import sys, papo_fast.planning.command, papo_fast.rollout.engines as e\n"
        "[e.engine_class(name).prompt_passes(5) for name in sys.argv[1:]]\n"
        "assert 'vllm' not in sys.modules\n"
        "import papo_fast.rollout.vllm_requests as r\n"
        "try: r.require_vllm()\n"
        "except r.InputError as error: print(error)\n"
        "assert 'papo_fast.doctor' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *ENGINES], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout or "pip install -c constraints/" in done.stdout
