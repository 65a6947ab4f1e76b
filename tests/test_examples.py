"""Each example runs by the command written above it."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from papo_fast.digits.task import write_questions
from support.family_checkpoints import write_checkpoint

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def command_above(path):
    """The first indented command in the file's head."""
    found = re.search(r"^#? {3,5}((?:NPROC=\d )?\S*(?:python|bash|sbatch) .*examples/.*)$",
                      path.read_text(encoding="utf-8"), re.M)  # fmt: skip
    assert found, f"{path.name} does not say how it is run"
    return found[1]


def run(path, *more, **environment):
    words = shlex.split(command_above(path))
    while "=" in words[0]:
        name, value = words.pop(0).split("=")
        environment.setdefault(name, value)
    words[0] = {".venv/bin/python": sys.executable}.get(words[0], words[0])
    assert words[1] == f"examples/{path.name}"
    return run_words([*words, *map(str, more)], environment)


def run_words(words, environment):
    # In a session of its own, so that a test that is ended ends the launcher's processes too.
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *_given_path()]),
            "PYTHON": sys.executable,
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, stdout[-2000:] + stderr[-4000:]
    return stdout + stderr


def _given_path():
    return filter(None, [os.environ.get("PYTHONPATH")])


def test_the_bare_loop_learns():
    output = run(EXAMPLES / "bare_loop.py")
    rewards = [float(x) for x in re.findall(r"reward (\S+),", output)]
    assert len(rewards) == 24
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.01
    assert max(float(x) for x in re.findall(r"kl_prcp (\S+)", output)) > 0


def test_the_bare_loop_is_short():
    assert len((EXAMPLES / "bare_loop.py").read_text().splitlines()) < 60


def test_trls_trainer_runs(tmp_path):
    for package in ("trl", "peft"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[trl,lora]'")
    output = run(EXAMPLES / "trl_papo.py", "--output_dir", tmp_path, "--lora", 4)
    assert len(re.findall(r"'kl_prcp': '?[\d.]+", output)) == 5
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.fixture
def one_step(tmp_path):
    """Options of a run of one step, and what tells that it was run."""
    write_checkpoint(tmp_path / "model", "qwen2_5_vl")
    write_questions(tmp_path / "train.parquet", 4, "train", 0)
    settings = {
        "model.path": tmp_path / "model",
        "data.train": tmp_path / "train.parquet",
        "rollout.prompts": 2,
        "rollout.filter-prompts": 2,
        "rollout.group-size": 2,
        "rollout.max-new-tokens": 4,
        "train.update-prompts": 2,
        "train.steps": 1,
        "out": tmp_path / "runs",
    }
    options = ["--digits.no-enabled"]
    options += [str(text) for k, v in settings.items() for text in (f"--{k}", v)]

    def check():
        (metrics,) = (tmp_path / "runs").glob("*/metrics.jsonl")
        assert len(metrics.read_text().splitlines()) == 1
        config = json.loads((metrics.parent / "config.json").read_text())
        return config["parallel"]

    return options, check


def test_torchrun_is_given_the_trainer_and_its_options(tmp_path):
    """By a program that prints what it is asked; torchrun itself runs in test_faults.py."""
    from torch.distributed.run import get_args_parser

    program = tmp_path / "python"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    asked = run(EXAMPLES / "torchrun.sh", "--train.steps", 1, PYTHON=str(program)).splitlines()
    assert asked[:2] == ["-m", "torch.distributed.run"]
    args = get_args_parser().parse_args(asked[2:])
    assert args.standalone and args.nproc_per_node == "2"  # as the command above it says
    assert args.module and args.training_script == "papo_fast"
    assert args.training_script_args == ["train", "tiny", "--train.steps", "1", "--resume"]


@pytest.mark.exhaustive
def test_torchrun_starts_the_trainer(one_step):
    options, check = one_step
    run(EXAMPLES / "torchrun.sh", *options, NPROC="1")
    assert check()["replicas"] == 1


# What SLURM gives a job, on one machine that stands for two nodes.
SLURM = {
    "scontrol": 'test "$*" = "show hostnames node[1-2]" && printf "localhost\\nlocalhost\\n"',
    "srun": """
test "$1 $2 $3" = "--kill-on-bad-exit=1 --cpus-per-task 2" && shift 3
for node in $(seq "$SLURM_NNODES"); do "$@" & tasks="$tasks $!"; done
for task in $tasks; do wait "$task" || status=$?; done
exit "${status:-0}"
""",
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run "$@"',
}


def run_slurm(folder, options, **programs_too):
    """What a job of two nodes prints that is sent with these options."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (SLURM | programs_too).items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "2",
    }
    # the job's own command, without the options of sbatch and of the user's model
    script = ["bash", "examples/slurm.sbatch", "papo-g-7b"]
    assert " ".join(script[1:]) in command_above(EXAMPLES / "slurm.sbatch")
    return run_words([*script, *options], environment)


def test_slurm_gives_torchrun_two_nodes_and_the_trainer(tmp_path):
    from torch.distributed.run import get_args_parser

    said = run_slurm(tmp_path, ["--train.steps", "1"], torchrun='echo "torchrun $*"')
    asked = [line.split()[1:] for line in said.splitlines() if line.startswith("torchrun ")]
    assert len(asked) == 2 and asked[0] == asked[1]
    args = get_args_parser().parse_args(asked[0])
    assert args.nnodes == "2" and args.nproc_per_node == "1"
    assert args.rdzv_backend == "c10d" and args.rdzv_endpoint.startswith("localhost:")
    assert args.module and args.training_script == "papo_fast"
    words = args.training_script_args
    assert words[:2] == ["train", "papo-g-7b"] and {"--train.steps", "--resume"} <= set(words)


@pytest.mark.exhaustive  # test_faults.py has a run of two ranks that torchrun starts
def test_slurm_starts_the_trainer_on_two_nodes(one_step, tmp_path):
    options, check = one_step
    run_slurm(tmp_path, [*options, "--model.dtype", "float32"])
    assert check()["replicas"] == 2
