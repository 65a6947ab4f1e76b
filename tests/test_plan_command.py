"""What `papo-fast plan` prints and refuses, and what fits on one card."""

from __future__ import annotations

import dataclasses
import re

import pytest

from papo_fast.cli import main
from papo_fast.planning.advice import effects, with_engine
from papo_fast.planning.arguments import Lengths
from papo_fast.planning.gpus import GPUS
from papo_fast.planning.memory import Layout, plan_memory
from papo_fast.planning.seconds import estimate_step
from papo_fast.rewards import answer_check
from support.planned import CONFIGS, arguments, resolved_preset, said


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
    from papo_kernels.triton import forward, groups, launch, lists

    assert (units.TILE_ROWS, units.GROUP_ROWS) == (launch.TILE, groups.GROUP_ROWS)
    assert units.CHUNKS == forward.CHUNKS
    assert (units.LIST_WORDS, units.LIST_SPARSITY) == (lists.MEAN_WORDS, lists.SPARSITY)
    assert groups.GATHERED_ELEMENTS == rows.CHUNK_ELEMENTS == units.CHUNK_ELEMENTS


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
