"""README.md and docs/: code runs, commands are accepted, and runs and plans say what pages show."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from papo_fast import cli, estimators, objective
from papo_fast.config import Config, ObjectiveConfig
from papo_fast.config_checks import resolve
from papo_fast.presets import PRESETS
from papo_fast.token_batch import TokenBatch
from papo_fast.weighing import TokenWeigher
from support import SUPPORT, TESTS
from support.doc_pages import (
    BASH,
    BLOCKS,
    ROOT,
    chains,
    commands_of,
    extras_of_pyproject,
    table_rows,
)

# `done` runs everything once: another process would only wait for it
pytestmark = pytest.mark.xdist_group("docs")

GIVENS = SUPPORT / "doc_givens.py"
CONFIGS = TESTS / "data" / "configs"
MODELS = {  # hub names of the commands → whose config.json stands for it
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl_3b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl_7b",
    "Qwen/Qwen3-VL-2B-Thinking": "qwen3_vl_2b",
}
OWN = """
def short(response): return 0
def noise(pixel_values, image_grid_thw, seed): return pixel_values
def drift(batch, config): return batch.logprobs
def seen(batch, config): return batch.dependency
"""  # functions that commands name as mine.py:NAME


def test_every_block_is_of_a_language_that_is_checked():
    assert [str(b) for b in BLOCKS if b.language not in ("python", "bash")] == []
    assert {b.language for b in BLOCKS} == {"python", "bash"}


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """{name: (exit status, output, folder)} of every chain of blocks and every script's --help.

    One process imports torch and TRL, once, and forks for each of them. Where several processes run
    the tests, the first to come does it for all.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "docs"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "statuses.json").is_file():
            do_jobs(folder)
    statuses = json.loads((folder / "statuses.json").read_text())
    return {
        name: (status, (folder / name / "output.txt").read_text(), folder / name)
        for name, status in statuses.items()
    }


def do_jobs(folder):
    jobs = {job_name(c): {"blocks": [dataclasses.asdict(b) for b in c]} for c in chains()}
    jobs |= {job_name(script): {"script": str(ROOT / script)} for script in scripts()}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    ended = subprocess.run(
        [sys.executable, str(GIVENS), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]


def job_name(work):
    text = work if isinstance(work, str) else str(work[0])
    return re.sub(r"[/:.]", "-", text)


def scripts():
    words = [command for block in BASH for command in commands_of(block)]
    return sorted({w for c in words for w in c if w.endswith(".py") and (ROOT / w).is_file()})


@pytest.mark.slow
@pytest.mark.parametrize("chain", chains(), ids=lambda chain: str(chain[0]))
def test_a_python_block_runs(chain, done):
    if any(re.search(r"integrations\.trl|from trl", block.text) for block in chain):
        pytest.importorskip("trl", reason="pip install -e '.[trl]'")
    status, output, _ = done[job_name(chain)]
    assert status == 0, output[-4000:]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the models that commands name; what would run for long says it was asked."""
    for folder, config in MODELS.items():
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text((CONFIGS / f"{config}.json").read_text())
    (tmp_path / "mine.py").write_text(OWN)
    settings = {"model": {"path": "M"}, "data": {"train": "questions.jsonl"}}
    for preset in ("papo-g-3b", "papo-g-7b"):
        finished = tmp_path / "runs" / f"{preset}-seed0"
        (finished / "model").mkdir(parents=True)
        (finished / "config.json").write_text(json.dumps({"preset": preset, **settings}))
    (tmp_path / "run.yaml").write_text(json.dumps({"preset": "papo-g-3b", **settings}))
    monkeypatch.chdir(tmp_path)
    asked = []

    def stand_in(module, name):
        def record(first, *rest):
            if isinstance(first, Config):
                resolve(first)
            asked.append(name)

        monkeypatch.setattr(f"papo_fast.{module}.{name}", record)

    stand_in("launch", "train")
    stand_in("launch", "serve")
    stand_in("launch", "evaluate")
    stand_in("report", "print_run")
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("block", BASH, ids=str)
def test_the_commands_of_a_block_are_accepted(block, desk, done, capsys):
    commands = list(commands_of(block))
    assert commands
    for words in commands:
        check_command(words, desk, done, capsys)


@pytest.mark.slow
def test_a_command_with_a_mistake_is_refused(desk, done, capsys):
    for line in (
        "papo-fast train papo-g-3b --model.path M/ --data.train D.parquet --train.step 5",
        "papo-fast train papo-g-4b --model.path M/ --data.train D.parquet",
        "papo-fast train papo-g-3b --data.train D.parquet",
        "papo-fast plan --preset papo-g-3b --model.path Qwen2.5-VL-99B/",
        "torchrun --nproc-per-knot 2 -m papo_fast train tiny",
        "make trian",
        "make train SEEDS=1",
        "python bench/report.py bench/results/cpu/quick.json --readme",
        "python bench/reports.py",
        "bash bench/gpu_trains.sh OUT",
        "bash bench/gpu_train.sh OUT --step attention",
        "pip install -e '.[no-such-extra]'",
        "rm -rf runs",
    ):
        with pytest.raises((AssertionError, SystemExit, ValueError)):
            check_command(shlex.split(line), desk, done, capsys)


def check_command(words, asked, done, capsys):
    words = list(words)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables in front
        words.pop(0)
    program, *rest = words
    if program == "papo-fast":
        papo_fast_accepts(rest, asked, capsys)
    elif program == "torchrun":
        torchrun_accepts(rest, asked, capsys)
    elif program == "make":
        make_accepts(rest)
    elif program == "python" and rest[:2] == ["-m", "papo_fast"]:
        papo_fast_accepts(rest[2:], asked, capsys)
    elif program == "python" and rest[:2] == ["-m", "bench.evidence"]:
        evidence_accepts(rest[2:])
    elif program == "python":
        script_accepts(rest, done)
    elif program == "bash" and rest[0].startswith("bench/"):
        assert (ROOT / rest[0]).is_file(), rest[0]
        known = re.findall(r"--[a-z]+", (ROOT / rest[0]).read_text(encoding="utf-8"))
        assert {word for word in rest[1:] if word.startswith("-")} <= set(known), rest
    elif program in ("sbatch", "bash"):
        script = next(i for i, word in enumerate(rest) if word.startswith("examples/"))
        assert (ROOT / rest[script]).is_file(), rest[script]
        assert all(re.fullmatch(r"--[a-z-]+|\d+", word) for word in rest[:script]), rest
        papo_fast_accepts(["train", *rest[script + 1 :]], asked, capsys)
    elif program == "pip":
        pip_accepts(rest)
    elif program == "git":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert rest == ["clone", project["urls"]["Homepage"]]
    elif program == "source":
        assert rest == [".venv/bin/activate"]
    elif program == "cd":
        assert rest == ["papo_fast"]  # the folder that git clone makes
    else:
        raise AssertionError(f"{program}: say in check_command how this is checked")


def papo_fast_accepts(words, asked, capsys):
    command, before = words[0], len(asked)
    try:
        status = cli.main(words)
    except SystemExit as end:  # tyro after --help
        status = end.code
    said = "".join(capsys.readouterr())
    assert status in (0, None), said
    if command in ("train", "serve", "eval", "report") and "--help" not in words:
        assert len(asked) == before + 1, f"{shlex.join(words)} started nothing: {said}"


def evidence_accepts(words):
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from bench.evidence.__main__ import command_line

    command_line().parse_args(words)


def torchrun_accepts(words, asked, capsys):
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    assert args.module and args.training_script == "papo_fast"
    papo_fast_accepts(args.training_script_args, asked, capsys)


def make_accepts(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, given, _ = word.partition("=")
        if given:
            assert re.search(rf"^{name}\s*\?=|\$\({name}[):]", makefile, re.M), name
        else:
            assert re.search(rf"^{name}:", makefile, re.M), f"make has no target {name}"
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def script_accepts(words, done):
    script, *rest = words
    assert (ROOT / script).is_file(), f"there is no {script}"
    status, said, _ = done[job_name(script)]
    assert status == 0, said[-2000:]
    for word in rest:
        if word.startswith("-"):
            assert re.search(rf"{word}\b", said), f"{script} has no option {word}"
        elif "/" in word:
            assert (ROOT / word).exists(), f"there is no {word}"


def pip_accepts(words):
    assert words.pop(0) == "install"
    extras = extras_of_pyproject()
    while words:
        word = words.pop(0)
        if word == "-c":
            assert (ROOT / words.pop(0)).is_file()
        elif found := re.fullmatch(r"\.\[([a-z,-]+)\]", word):
            assert set(found[1].split(",")) <= extras, word
        else:
            assert word in ("-e", "--no-build-isolation") or (ROOT / word).is_dir(), word


# --- what pages show ------------------------------------------------------------------------------


def documented_keys():
    rows = table_rows(ROOT / "docs" / "usage.md", "Every key of `metrics.jsonl`")
    return [key for row in rows for key in re.findall(r"`(\w+)`", row[0])]


def keys_of_the_code():
    import torch

    row = json.loads((TESTS / "data" / "metrics_row.json").read_text())
    zeros = torch.zeros(1)
    terms = (*objective.TERMS, *objective.VIEW_TERMS)
    _, of_weights = estimators.truncated_weights(zeros, zeros, 2.0)
    return set(row) | {x.name for x in terms} | set(of_weights) | weigher_keys()


def weigher_keys():
    import torch

    goal = ObjectiveConfig(token_weights="pgpo", dependency_of="current").resolved()
    weigher = TokenWeigher(dataclasses.replace(PRESETS["grpo"][1], objective=goal))
    zeros = torch.zeros(1)
    ids = torch.zeros(1, dtype=torch.int64)
    batch = TokenBatch(zeros, zeros, zeros, ids, kl_prcp=zeros)
    return set(weigher.weighted(batch, None)[1])


def test_every_key_of_the_metrics_is_documented_once():
    keys = documented_keys()
    assert sorted(keys) == sorted(keys_of_the_code())


@pytest.mark.slow
def test_the_runs_of_the_usage_page_log_the_documented_keys(done):
    (chain,) = [c for c in chains() if c[0].page == "docs/usage.md"]
    status, output, folder = done[job_name(chain)]
    assert status == 0, output[-4000:]
    runs = {path.parent.name: path for path in folder.glob("runs/*/metrics.jsonl")}
    assert set(runs) == {*("from-python", "own-reward", "own-corruption", "own-term", "own-weight")}
    rows = {name: json.loads(path.read_text().splitlines()[0]) for name, path in runs.items()}
    assert set(rows["from-python"]) <= set(documented_keys())
    assert set(rows["own-term"]) - set(documented_keys()) == {"term_drift"}
    # of the tokens that VPPO keeps, at least four fifths, the page's weight may drop any
    assert set(rows["own-weight"]) >= weigher_keys() and rows["own-weight"]["token_weight"] < 1
    # 0.1 / (1 + length / 200) for a response of some length, where the built-in reward gives 0
    assert rows["from-python"]["reward"] == 0 and 0.05 < rows["own-reward"]["reward"] < 0.1
    assert set(rows["own-reward"]) - set(documented_keys()) == {"reward_short"}
    assert rows["own-corruption"]["kl_prcp"] != rows["own-reward"]["kl_prcp"]


PLANNED = (
    ("papo-g-3b", "Qwen/Qwen2.5-VL-3B-Instruct", 2),
    ("papo-g-7b", "Qwen/Qwen2.5-VL-7B-Instruct", 4),
    ("papo-d", "Qwen/Qwen2.5-VL-3B-Instruct", 8),
    ("papo-d", "Qwen/Qwen2.5-VL-7B-Instruct", 8),
    ("papo-qwen3-2b", "Qwen/Qwen3-VL-2B-Thinking", 4),
    ("grpo", "Qwen/Qwen2.5-VL-3B-Instruct", 2),
    ("dapo", "Qwen/Qwen2.5-VL-3B-Instruct", 2),
)
STEPS = 2 * 38_800 // 384


def planned(preset, model, gpus, engine):
    from papo_fast.planning.arguments import Lengths
    from papo_fast.planning.gpus import GIB, find_gpu
    from papo_fast.planning.memory import Layout, plan_memory
    from papo_fast.planning.seconds import estimate_step
    from papo_fast.planning.sizes import ModelSizes

    config = PRESETS[preset][1]
    of_engine = {"gpu_memory": 0.25, "batch_size": 256} if engine == "vllm" else {}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=model),
        objective=dataclasses.replace(config.objective, parity="official").resolved(),
        rollout=dataclasses.replace(config.rollout, engine=engine, **of_engine),
    )
    gpu, sizes = find_gpu("h100"), ModelSizes.of(config.model)
    layout = Layout(ranks=gpus, gpu_memory=gpu.memory)
    plan = plan_memory(config, sizes, Lengths(), layout)
    seconds = estimate_step(config, sizes, Lengths(), layout, gpu).total
    fits = "" if plan.fits(gpu.memory) else ", does not fit"
    return f"{plan.peak / GIB:.0f}{fits}", f"{seconds:.0f}", f"{STEPS * seconds / 3600:.1f}"


def test_planned_memory_and_time_are_what_plan_says(desk):
    head = ["preset", "model", "GPUs", "engine", "GiB of one GPU", "s per step", "hours"]
    lines = [head, ["---"] * 4 + ["---:"] * 3]
    for preset, model, gpus in PLANNED:
        for engine in ("hf", "vllm"):
            cells = planned(preset, model, gpus, engine)
            name = model.partition("/")[2].rsplit("-", 1)[0]
            lines.append([f"`{preset}`", name, str(gpus), f"`{engine}`", *cells])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    shown = page.split("<!-- planned -->\n")[1].split("\n<!-- end of planned -->")[0]
    assert shown == table, f"the page should say:\n{table}"
