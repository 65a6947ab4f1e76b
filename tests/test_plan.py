"""What `papo-fast plan` says: against measured memory, and for the models people train."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from PIL import Image

from support.family_checkpoints import write_checkpoint
from support.small_runs import both_streams

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
from papo_fast.planning import simulate
from papo_fast.planning.advice import changed_by, effects, gpus_needed, remedy, with_engine
from papo_fast.planning.arguments import Lengths
from papo_fast.planning.gpus import GPUS
from papo_fast.planning.memory import Layout, plan_memory
from papo_fast.planning.seconds import estimate_step
from papo_fast.planning.sizes import ModelSizes
from papo_fast.planning.workload import micro_batch, step_work
from papo_fast.presets import get_preset
from papo_fast.rewards import answer_check
from papo_fast.rollout.engines import engine_class
from papo_fast.rollout.hf import HFRollout

CONFIGS = Path(__file__).parent / "data" / "configs"
# published numbers of parameters, in billions
PUBLISHED = {
    "qwen2_5_vl_3b": 3.75,
    "qwen2_5_vl_7b": 8.29,
    "qwen2_5_vl_32b": 33.45,
    "qwen2_5_vl_72b": 73.41,
    "qwen3_vl_2b": 2.13,
    "qwen3_vl_8b": 8.77,
}


def resolved_preset(name):
    config = get_preset(name)
    if name.startswith("papo"):
        config = both_streams(config)
    return dataclasses.replace(config, objective=config.objective.resolved())


@pytest.fixture(scope="module")
def sizes():
    return {name: ModelSizes.of(ModelConfig(path=str(CONFIGS / f"{name}.json")))
            for name in PUBLISHED}  # fmt: skip


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


def arguments(name, gpus, *more):
    path = ("--model.path", str(CONFIGS / f"{name}.json"))
    return ["plan", *more, *path, "--gpu", "h100", "--gpus", str(gpus)]


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


def test_the_command_prints_a_plan(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(arguments("qwen2_5_vl_72b", 8, "--preset", "papo-d")) == 0
    said = capsys.readouterr().out
    for words in (
        "73.41 B parameters (qwen2_5_vl) on 8 x h100",
        "optimizer",
        "Estimated, not measured",
        "does not fit",
        "switch on:",
        "logits and their gradients, which papo_kernels computes and drops",
    ):
        assert words in said, words
    assert "reference" not in said  # papo-d has none
    assert main(arguments("qwen3_vl_2b", 8)) == 0
    assert "fits" in capsys.readouterr().out


def test_the_memory_that_reward_workers_may_take_is_planned(sizes, capsys, monkeypatch):
    config, model = resolved_preset("papo-g-7b"), sizes["qwen2_5_vl_7b"]
    reward = dataclasses.replace(config.reward, workers=3)
    parallel = dataclasses.replace(config.parallel, offload=True)
    config = dataclasses.replace(config, reward=reward, parallel=parallel)
    plan = plan_memory(config, model, Lengths(), Layout(8, GPUS["h100"].memory))
    assert plan.scoring == 3 * answer_check.MEMORY_LIMIT == 6 * 2**30
    # weights, reference, gradients and two moments in float32: those are of all eight together
    state = 5 * 4 * model.parameters
    assert plan.host_peak(8) == pytest.approx(state + 8 * 6 * 2**30, rel=1e-3)
    monkeypatch.setenv("COLUMNS", "140")
    argv = arguments("qwen2_5_vl_7b", 8, "--reward.workers", "3", "--parallel.offload")
    assert main(argv) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "up to 6.0 GiB in the 3 reward worker(s) of each process" in said
    assert f"up to {plan.host_peak(8) / 2**30:.1f} GiB." in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--gpus", "8"], "model.path is empty"),
        (["plan", "--model.path", "nowhere"], "there is no file nowhere"),
        (arguments("qwen2_5_vl_3b", 8, "--preset", "papo-g3b"), "did you mean 'papo-g-3b'"),
        (arguments("qwen2_5_vl_3b", 0), "gpus is 0"),
        (arguments("qwen2_5_vl_3b", 8, "--parallel.replicas", "3"), "parallel.replicas is 3"),
        (arguments("qwen2_5_vl_3b", 8, "--mfu", "35"), "mfu is 35"),
        (arguments("qwen2_5_vl_3b", 8, "--lengths.response", "0"), "lengths.response is 0"),
        (["plan", "--model.path", str(CONFIGS / "qwen3_vl_2b.json"), "--gpu", "h1000"], "h100"),
    ],
)
def test_what_cannot_be_planned_is_named(capsys, argv, message):
    assert main(argv) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_configuration_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert main(["plan", "--model.path", str(tmp_path)]) == 2
    assert "is a 'llama' model" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "config.json").write_text("{")
    assert main(["plan", "--model.path", str(tmp_path)]) == 2
    assert "cannot be read" in " ".join(capsys.readouterr().err.split())


def test_the_plan_knows_the_sizes_of_the_gpu_kernels():
    pytest.importorskip("triton")
    from papo_fast.planning import units
    from papo_kernels import rows
    from papo_kernels.triton import backward, launch, lists

    assert (units.TILE_ROWS, units.GROUP_ROWS) == (launch.TILE, backward.GROUP_ROWS)
    assert (units.LIST_WORDS, units.LIST_SPARSITY) == (lists.MEAN_WORDS, lists.SPARSITY)
    assert backward.GATHERED_ELEMENTS == rows.CHUNK_ELEMENTS == units.CHUNK_ELEMENTS


# --- what fits on one card, and what is printed ---------------------------------------------------

QLORA = ("--model.lora-rank", "64", "--model.quantize", "nf4")
VLLM = ("--rollout.engine", "vllm")
TARGETS = {
    "3B full with reference, 80 GB": (
        "papo-g-3b", "qwen2_5_vl_3b", "h100",
        ("--model.reference-dtype", "bfloat16", "--model.weights-dtype", "bfloat16", *VLLM),
    ),
    "7B LoRA, 48 GB": ("papo-g-7b", "qwen2_5_vl_7b", "l40s", ("--model.lora-rank", "64")),
    "3B QLoRA with vLLM, 24 GB": ("papo-g-3b", "qwen2_5_vl_3b", "rtx4090", (*QLORA, *VLLM)),
    "7B QLoRA, 48 GB": ("papo-g-7b", "qwen2_5_vl_7b", "l40s", QLORA),
}  # fmt: skip


def said(capsys, argv):
    assert main(argv) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("target", TARGETS)
def test_these_fit_on_one_card(capsys, monkeypatch, target):
    monkeypatch.setenv("COLUMNS", "140")
    preset, model, gpu, flags = TARGETS[target]
    path = ("--model.path", str(CONFIGS / f"{model}.json"))
    told = said(capsys, ["plan", "--preset", preset, *path, "--gpu", gpu, *flags])
    print(target, told[told.index("GiB are left") - 12 :])
    assert "fits: " in told and "GiB are left" in told
    if model == "qwen2_5_vl_3b" and gpu == "h100":
        assert "does not fit" in said(capsys, ["plan", "--preset", preset, *path, "--gpu", gpu])


def test_any_gpu_can_be_described(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    described = ("--gpu-memory", "79.1", "--gpu-tflops", "989", "--gpu-bandwidth", "3350")
    path = ("--model.path", str(CONFIGS / "qwen2_5_vl_3b.json"))
    ours = said(capsys, ["plan", *path, "--gpu", "a100-40g", *described])
    theirs = said(capsys, ["plan", *path, "--gpu", "h100"])
    bare = re.compile(r"[─━ ]")
    same = ours.replace("x GPU", "x h100").replace("of GPU", "of h100")
    # the commands say nothing of the GPU
    assert bare.sub("", same) == bare.sub("", theirs)


def test_the_command_to_copy_is_the_run_that_was_planned(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    asked = ("--rollout.group-size", "8", "--model.no-train-vision", "--train.betas", "0.9", "0.95")
    told = said(capsys, arguments("qwen2_5_vl_7b", 8, "--preset", "papo-d", *asked, *VLLM))
    command = re.search(r"the command: (.*)", told)[1]
    assert command.startswith("torchrun --nproc-per-node 8 -m papo_fast train papo-d ")
    for words in (
        "--rollout.group-size 8", "--model.no-train-vision", "--train.betas 0.9 0.95",
        "--rollout.engine vllm", "--data.train TRAIN.parquet",
    ):  # fmt: skip
        assert words in command
    assert "--train.lr" not in command  # the preset says it


def test_time_of_the_run_of_each_option_and_of_a_faster_engine_are_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    told = said(capsys, arguments("qwen2_5_vl_3b", 8, "--preset", "papo-g-3b"))
    # 2 epochs of 38 870 rows by 384
    assert "for the whole run of 202 steps" in told
    assert re.search(r"--parallel.offload │ +[0-9.]+ │ [0-9]+ (s|min) │ fits", told)
    found = re.search(r"vLLM takes (\d+) (s|min) for a step in place of (\d+) (s|min)", told)
    seconds = {"s": 1, "min": 60}
    fast, slow = (int(found[i]) * seconds[found[i + 1]] for i in (1, 3))
    assert fast < 0.5 * slow
    many = ("--rollout.batch-size", "256")
    told = said(capsys, arguments("qwen2_5_vl_3b", 8, "--preset", "papo-g-3b", *VLLM, *many))
    assert "faster" not in told


def test_vllm_is_planned_with_the_sequences_that_the_run_lets_it_have(sizes):
    """The engine gets `rollout.batch_size` sequences at a time; the plan thought of 256 always."""
    model, h100 = sizes["qwen2_5_vl_3b"], GPUS["h100"]
    config, layout = resolved_preset("papo-g-3b"), Layout(1, h100.memory)
    times = {}
    for at_a_time in (64, 256):
        rollout = dataclasses.replace(config.rollout, engine="vllm", batch_size=at_a_time)
        run = dataclasses.replace(config, rollout=rollout)
        times[at_a_time] = estimate_step(run, model, Lengths(), layout, h100).rollout
    assert 1.5 * times[256] < times[64] < 4 * times[256]
    of_vllm = [
        e.option for e in effects(config, model, Lengths(), layout) if "vllm" in e.option.name
    ]
    assert of_vllm
    for option in of_vllm:
        changed, _ = option.change(config, layout)
        assert changed.rollout.batch_size == 256 and "--rollout.batch-size 256" in option.flags
    # and no smaller batch beside it, which transformers alone needed
    fewer = [e.option for e in effects(config, model, Lengths(), layout)
             if e.option.name.startswith("--rollout.batch-size")]  # fmt: skip
    assert fewer and with_engine(fewer, of_vllm[0]) == [of_vllm[0]]


def test_no_advice_takes_more_gpus_than_there_are(sizes, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    told = said(capsys, arguments("qwen2_5_vl_72b", 1, "--preset", "papo-d"))
    assert "no combination of these options makes it fit on so many GPUs: it takes" in told
    assert "vllm_server" not in told and "--gpus" not in told
    server = ("--rollout.engine", "vllm_server", "--rollout.tensor-parallel", "2")
    told = said(capsys, arguments("qwen2_5_vl_7b", 8, *server))
    assert "vLLM's server has 2 of the GPUs; 6 train." in told
    assert main(arguments("qwen2_5_vl_7b", 2, *server)) == 2
    assert "none is left to train on" in " ".join(capsys.readouterr().err.split())


def test_a_hub_name_can_be_planned_from_its_cache(capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    folder = tmp_path / "models--Some--Model" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((CONFIGS / "qwen2_5_vl_3b.json").read_bytes())
    (tmp_path / "models--Some--Model" / "refs").mkdir()
    (tmp_path / "models--Some--Model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "140")
    told = said(capsys, ["plan", "--model.path", "Some/Model"])
    assert "3.75 B parameters" in told and "--model.path Some/Model" in told
    assert main(["plan", "--model.path", "Some/Other"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "there is no file Some/Other; expected a local checkpoint" in told and "hub name" in told


# --- simulation -----------------------------------------------------------------------------------


def test_the_simulation_reproduces_the_published_seconds_within_25_percent(sizes):
    config, h100 = resolved_preset("papo-g-7b"), GPUS["h100"]
    models = {"3B": sizes["qwen2_5_vl_3b"], "7B": sizes["qwen2_5_vl_7b"]}
    fitted = simulate.fitted_mfu(config, simulate.Model.of(models["3B"]), Lengths(), h100)
    published = {("3B", 2): (360.9, 428.1), ("7B", 4): (258.5, 367.1)}
    for (name, gpus), seconds in published.items():
        model = simulate.Model.of(models[name])
        assert model == simulate.QWEN2_5_VL[name]
        for papo, wanted in zip((False, True), seconds, strict=True):
            got = simulate.authors(config, model, Lengths(), gpus, h100, fitted, papo=papo)
            print(f"{name}, {'PAPO' if papo else 'GRPO'}: {got.seconds:.0f} s, published {wanted}")
            assert got.seconds == pytest.approx(wanted, rel=0.25)
    # the 7B's masked pass, which was not fitted: 50 s
    got = simulate.authors(config, model, Lengths(), 4, h100, fitted, papo=True)
    assert got.experience / 3 == pytest.approx(50, rel=0.1)
    assert simulate.Model.of(sizes["qwen2_5_vl_32b"]) == simulate.QWEN2_5_VL["32B"]


def test_more_gpus_are_faster_and_overlap_hides_the_shorter_of_both(sizes):
    config, h100 = resolved_preset("papo-g-7b"), GPUS["h100"]
    model = simulate.QWEN2_5_VL["7B"]
    found = [simulate.ours(config, model, Lengths(), n, h100) for n in (1, 2, 4, 8, 16, 32, 64)]
    assert all(a.seconds > b.seconds for a, b in itertools.pairwise(found))
    assert all(a.tokens_per_gpu > b.tokens_per_gpu for a, b in itertools.pairwise(found))
    assert all(0.02 < x.mfu < 0.35 for x in found)
    split = simulate.ours(config, model, Lengths(), 8, h100, samplers=3)
    train = split.experience + split.update
    assert split.seconds == max(split.rollout, train) + split.sync + simulate.FIXED
    best = simulate.overlapped(config, model, Lengths(), 8, h100)
    assert best.seconds <= split.seconds and best.seconds < found[3].seconds
    assert simulate.overlapped(config, model, Lengths(), 1, h100) is None


def test_the_simulation_is_printed_with_its_assumptions(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    told = said(capsys, ["plan", "--simulate"])
    for words in ("published", "360.9", "the one number that was fitted", "1800 to 2000", "32B"):
        assert words in told
