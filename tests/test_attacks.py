"""Settings, data files and model folders that are wrong: each is one line that names what is wrong.

The command line is called as users call it. What is refused exits with status 2, says one line on
stderr and leaves no run behind; no attack ends in a traceback.
"""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import os
import shutil
import signal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from papo_fast.cli import main
from support.family_checkpoints import write_checkpoint
from support.small_runs import png

CONFIG = Path(__file__).parent / "data" / "configs" / "qwen2_5_vl_3b.json"
SECONDS = 30
"""An attack that takes longer has not been refused: it hangs."""
RUN = [
    *("--model.dtype", "float32", "--data.min-pixels", "3136", "--data.max-pixels", "12544"),
    *("--rollout.prompts", "2", "--rollout.group-size", "2", "--rollout.max-new-tokens", "3"),
    *("--train.update-prompts", "2", "--train.steps", "1", "--reward.workers", "1"),
    *("--data.no-shuffle", "--device", "cpu", "--name", "run"),
]


@pytest.fixture(autouse=True)
def ends_in_time():
    def late(*_):
        raise TimeoutError(f"not refused within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="module")
def no_bars():
    """The command asks for none before it imports the libraries, which are here already."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, `model`, and two good rows, `good.parquet`."""
    folder = tmp_path_factory.mktemp("attacks")
    write_checkpoint(folder / "model", "qwen2_5_vl")
    pq.write_table(pa.Table.from_pylist([row(0), row(1)]), folder / "good.parquet")
    return folder


def row(i, **changes):
    return {"problem": "What?", "answer": str(i), "images": [png(i)]} | changes


def refused(capfd, argv, *names):
    """The one line on stderr, which holds each of `names`, however dashes are written."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert status == 2, lines
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    for name in names:
        assert name.replace("-", "_") in lines[0].replace("-", "_"), lines[0]
    return lines[0]


# --- settings -------------------------------------------------------------------------------------

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


# --- data files -----------------------------------------------------------------------------------


def jsonl(*rows):
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def text_rows(**changes):
    plain = {"problem": "What?", "answer": "1"} | changes
    return jsonl(*[{k: v for k, v in plain.items() if v is not ...}] * 2)


def parquet(*rows, **columns):
    return parquet_of(pa.Table.from_pylist(rows) if rows else pa.table(columns))


def parquet_of(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


GOOD = parquet(row(0), row(1))
IN_BASE64 = base64.b64encode(png(0)).decode()
BOMB = (  # a PNG's header of 60 000 x 60 000 pixels
    b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2
    + b"\x08\x02\0\0\0" + b"\0\0\0\0"
)  # fmt: skip

# name → content; a refusal names the file
FILES = {
    "empty.parquet": b"",
    "empty.jsonl": b"",
    "blank.jsonl": b"\n  \n\n",
    "cut.parquet": GOOD[:-40],
    "half.parquet": GOOD[: len(GOOD) // 2],
    "noise.parquet": bytes(range(256)) * 8,
    "renamed.parquet": text_rows(),
    "renamed.jsonl": GOOD,
    "table.csv": b"problem,answer\nWhat?,1\n",
    "no-ending": text_rows(),
    "no-rows.parquet": parquet(problem=pa.array([], pa.string()), answer=pa.array([], pa.string())),
    "no-problem.parquet": parquet(answer=["1", "2"]),
    "no-answer.jsonl": text_rows(answer=...),
    "one-list.jsonl": jsonl([1, 2], [3, 4]),
    "array.jsonl": json.dumps([row(0, images=[])] * 2).encode(),
    "text.jsonl": b'"What?"\n"Why?"\n',
    "cut.jsonl": text_rows()[:-9],
    "latin.jsonl": text_rows().replace(b"What", b"Wh\xe4t"),
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "utf16.jsonl": text_rows().decode().encode("utf-16"),
    "gzip.jsonl": gzip.compress(text_rows()),
    "nul.jsonl": b"\0" * 1000,
    "number.jsonl": b"1e999999999\n",
    "twice.parquet": parquet_of(
        pa.Table.from_arrays([pa.array(["a", "b"])] * 3, ["problem", "problem", "answer"])
    ),
    "few.jsonl": jsonl({"problem": "What?", "answer": "1"}),
}
# rows of this kind; a refusal names file and row
ROWS = {
    "problem-none": text_rows(problem=None),
    "problem-blank": text_rows(problem="  "),
    "problem-number": text_rows(problem=3),
    "problem-list": text_rows(problem=["What?"]),
    "problem-control": text_rows(problem="<|image_pad|> what?"),
    "problem-half-emoji": text_rows(problem="\ud83d"),
    "problem-long": text_rows(problem="why? " * 3000),
    "problem-huge": text_rows(problem="why? " * 1_000_000),
    "answer-none": text_rows(answer=None),
    "answer-blank": text_rows(answer=""),
    "answer-box": text_rows(answer="\\boxed{}"),
    "answer-nan": text_rows(answer=float("nan")),
    "answer-list": text_rows(answer=["1"]),
    "answer-object": text_rows(answer={"value": 1}),
    "answer-date": parquet(problem=["a", "b"], answer=[datetime.date(2020, 1, 1)] * 2),
    "answer-dollars": text_rows(answer="$ $"),
    "answer-digits": parquet(problem=["a", "b"], answer=[b"1", b"2"]),
    "problem-bytes": parquet(problem=[b"a", b"b"], answer=["1", "2"]),
    "image-map": text_rows(images={"a": "b"}),
    "image-lists": text_rows(images=[["a.png"]]),
    "image-svg": parquet(*[row(i, images=[b"<svg/>"]) for i in (0, 1)]),
    "image-eps": parquet(*[row(i, images=[b"%!PS-Adobe-3.0 EPSF-3.0\n"]) for i in (0, 1)]),
    "answer-huge": text_rows(answer="1" * 20_000),
    "reading-list": text_rows(reading=["3+4"]),
    "image-missing": text_rows(images=["nowhere.png"]),
    "image-folder": text_rows(images=["."]),
    "image-url": text_rows(images=["https://example.org/a.png"]),
    "image-base64": text_rows(images=["data:image/png;base64," + IN_BASE64]),
    "image-number": text_rows(images=[3]),
    "image-none": text_rows(images=[None]),
    "image-nul": text_rows(images=["a\0b.png"]),
    "image-long-path": text_rows(images=["a/" * 5000]),
    "image-text": parquet(*[row(i, images=[b"no picture"]) for i in range(2)]),
    "image-cut": parquet(*[row(i, images=[png(i)[:200]]) for i in range(2)]),
    "image-empty": parquet(*[row(i, images=[b""]) for i in range(2)]),
    "image-bomb": parquet(*[row(i, images=[BOMB]) for i in range(2)]),
    "image-thin": parquet(*[row(i, images=[png(i, (2, 900))]) for i in range(2)]),
    "placeholders-more": parquet(*[row(i, problem="<image> <image>?") for i in range(2)]),
    "placeholders-alone": text_rows(problem="<image>?"),
}  # fmt: skip


def train_on(place, tmp_path, data):
    return [
        *("train", "grpo", "--model.path", place / "model", "--data.train", data),
        *("--out", tmp_path / "runs", *RUN),
    ]


MAKE = {
    "absent.parquet": lambda path: None,
    "folder.parquet": Path.mkdir,
    "pipe.jsonl": os.mkfifo,
    "loop.jsonl": lambda path: path.symlink_to(path),
    "nowhere.jsonl": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", [*MAKE, *FILES])
def test_a_wrong_data_file_is_one_line_that_names_it(place, tmp_path, capfd, name):
    if name in MAKE:
        MAKE[name](tmp_path / name)
    else:
        (tmp_path / name).write_bytes(FILES[name])
    refused(capfd, train_on(place, tmp_path, tmp_path / name), name)
    assert_no_run(tmp_path)


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_row_is_one_line_that_names_file_and_row(place, tmp_path, capfd, name):
    content = ROWS[name]
    file = tmp_path / f"data.{'parquet' if content.startswith(b'PAR1') else 'jsonl'}"
    file.write_bytes(content)
    line = refused(capfd, train_on(place, tmp_path, file), file.name, "row 0", "on-bad-sample skip")
    assert len(line) < 2500
    # rows are read when they are drawn, so that the run has begun; but it has done no step
    run = tmp_path / "runs" / "run"
    assert (run / "metrics.jsonl").read_text() == "" and not (run / "checkpoints").exists()


def assert_no_run(tmp_path):
    """Nothing but the lock that a run's folder has from its first moment."""
    left = {p.name for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    assert left <= {".lock"}, left


# --- folders of runs ------------------------------------------------------------------------------

STEP = {"step": 1, "seconds": 3.0, "reward": 0.5, "accuracy": 0.5}
EXAMPLE = {"when": "after", "problem": "What?", "answer": "1", "response": "1", "accuracy": 1.0}
# name → (file, its content, what the line names besides the file)
RUNS = {
    "step-list": ("metrics.jsonl", jsonl([1], [2]), "line 1"),
    "step-noise": ("metrics.jsonl", b"\0\1\n", "line 1"),
    "step-text": ("metrics.jsonl", jsonl(STEP | {"step": "one"}), "step"),
    "reward-text": ("metrics.jsonl", jsonl(STEP, STEP | {"reward": "much"}), "row 2: reward"),
    "alarms-number": ("metrics.jsonl", jsonl(STEP | {"alarms": 3}), "alarms"),
    "settings-list": ("config.json", b"[]", "list"),
    "summary-text": ("summary.json", b'"done"', "str"),
    "accuracy-number": ("summary.json", b'{"accuracy_after": 3}', "accuracy_after"),
    "accuracy-text": ("summary.json", b'{"accuracy_after": {"a": "b"}}', "accuracy_after"),
    "steps-text": ("summary.json", b'{"steps": "many"}', "steps"),
    "right-text": ("examples.jsonl", jsonl(EXAMPLE | {"accuracy": "yes"}), "accuracy"),
    "earned-text": ("examples.jsonl", jsonl(EXAMPLE | {"reward": "much"}), "reward"),
    "image-number": ("examples.jsonl", jsonl(EXAMPLE | {"image": 7}), "image"),
    "picture-folder": ("report.png", None, "cannot be written"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_damaged_run_is_one_line_that_names_file_and_key(tmp_path, capfd, name):
    file, content, what = RUNS[name]
    (tmp_path / "metrics.jsonl").write_bytes(jsonl(STEP))
    if content is None:
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).write_bytes(content)
    refused(capfd, ["report", tmp_path], file, what)


# --- model folders --------------------------------------------------------------------------------


def config_with(**changes):
    """Change keys of config.json; `section__key` stands for a key within a section."""

    def change(folder):
        file = folder / "config.json"
        settings = json.loads(file.read_text())
        for name, value in changes.items():
            section, _, key = name.rpartition("__")
            part = settings[section] if section else settings
            if value is ...:
                del part[key]
            else:
                part[key] = value
        file.write_text(json.dumps(settings))

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


# name → (change, what the line names besides the folder, whether `plan` reads that file)
MODELS = {
    "nothing": (lambda folder: shutil.rmtree(folder), "model", True),
    "config-missing": (without("config.json"), "config.json", True),
    "config-empty": (written("config.json", b""), "config.json", True),
    "config-list": (written("config.json", b"[1, 2]"), "config.json", True),
    "config-binary": (written("config.json", bytes(range(256))), "config.json", True),
    "config-deep": (written("config.json", b"[" * 100_000), "config.json", True),
    "family-missing": (config_with(model_type=...), "model_type", True),
    "family-other": (config_with(model_type="llama"), "llama", True),
    "family-number": (config_with(model_type=7), "model_type", True),
    "vision-missing": (config_with(vision_config=...), "vision_config", True),
    "vision-list": (config_with(vision_config=[1]), "vision_config", True),
    "vision-none": (config_with(vision_config=None), "vision_config", True),
    "text-list": (config_with(text_config=[1]), "text_config", True),
    "depth-text": (config_with(vision_config__depth="two"), "depth", True),
    "depth-zero": (config_with(vision_config__depth=0), "depth", True),
    "depth-absurd": (config_with(vision_config__depth=10**9), "depth", True),
    "patch-zero": (config_with(vision_config__patch_size=0), "patch_size", True),
    "hidden-text": (config_with(text_config__hidden_size="wide"), "hidden_size", True),
    "hidden-none": (config_with(text_config__hidden_size=None), "hidden_size", True),
    "hidden-absurd": (config_with(text_config__hidden_size=10**15), "hidden_size", True),
    "hidden-negative": (config_with(text_config__hidden_size=-32), "hidden_size", True),
    "layers-absurd": (config_with(text_config__num_hidden_layers=10**9), "num_hidden_layers", True),
    "layers-list": (config_with(text_config__num_hidden_layers=[2]), "num_hidden_layers", True),
    "heads-zero": (config_with(text_config__num_attention_heads=0), "num_attention_heads", True),
    "heads-odd": (config_with(text_config__num_attention_heads=3), "num_attention_heads", True),
    "vocab-nan": (config_with(text_config__vocab_size=float("nan")), "vocab_size", True),
    "vocab-small": (config_with(text_config__vocab_size=9), "vocab_size", False),
    "dropout": (config_with(text_config__attention_dropout=0.5), "attention_dropout", True),
    "image-token": (config_with(image_token_id=10**6), "image_token_id", False),
    "activation": (config_with(text_config__hidden_act="wave"), "wave", True),
    "rope-list": (config_with(text_config__rope_parameters=[1]), "rope_parameters", True),
    "sections-text": (
        config_with(text_config__rope_parameters={"rope_theta": 1e4, "mrope_section": "abc"}),
        "mrope_section", True,
    ),
    "sections-few": (
        config_with(text_config__rope_parameters={"rope_theta": 1e4, "mrope_section": [1, 1, 1]}),
        "mrope_section", True,
    ),
    "theta-nan": (
        config_with(text_config__rope_parameters={"rope_theta": "nan", "rope_type": "default"}),
        "rope_theta", True,
    ),
    "window-zero": (config_with(vision_config__window_size=0), "window_size", True),
    "blocks-text": (config_with(vision_config__fullatt_block_indexes="all"), "fullatt", True),
    "epsilon-nan": (config_with(text_config__rms_norm_eps=float("nan")), "rms_norm_eps", True),
    "epsilon-text": (config_with(text_config__rms_norm_eps="small"), "rms_norm_eps", True),
    "out-other": (config_with(vision_config__out_hidden_size=48), "out_hidden_size", True),
    "image-id-text": (config_with(image_token_id="<image>"), "image_token_id", True),
    "eos-text": (written("generation_config.json", b'{"eos_token_id": "x"}'), "eos", False),
    "eos-list": (written("generation_config.json", b"[]"), "generation_config.json", False),
    "processor-absurd": (
        written("preprocessor_config.json", b'{"patch_size": 1000000000}'), "patch_size", False,
    ),
    "tokenizer-missing": (without("tokenizer.json"), "tokenizer.json", False),
    "tokenizer-list": (written("tokenizer.json", b"[]"), "tokenizer.json", False),
    "template-broken": (written("chat_template.jinja", b"{% for %}"), "chat_template.jinja", False),
    "processor-missing": (without("preprocessor_config.json"), "preprocessor_config.json", False),
    "processor-std": (
        written("preprocessor_config.json", b'{"image_std": 0}'), "preprocessor_config.json", False,
    ),
    "weights-missing": (without("model.safetensors"), "model.safetensors", False),
    "weights-cut": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-100]
        ), "model.safetensors", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_model_folder_is_one_line_that_names_file_and_key(place, tmp_path, capfd, name):
    change, what, _ = MODELS[name]
    folder = shutil.copytree(place / "model", tmp_path / "model")
    change(folder)
    argv = train_on(place, tmp_path, place / "good.parquet")
    argv[argv.index("--model.path") + 1] = folder
    line = refused(capfd, argv, str(folder), what)
    assert len(line) < 1000, line
    assert_no_run(tmp_path)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][2]])
def test_a_wrong_model_folder_cannot_be_planned_with(place, tmp_path, capfd, name):
    change, what, _ = MODELS[name]
    folder = shutil.copytree(place / "model", tmp_path / "model")
    change(folder)
    line = refused(capfd, ["plan", "--model.path", folder], str(folder), what)
    assert len(line) < 1000, line
