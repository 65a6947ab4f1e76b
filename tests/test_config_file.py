"""A configuration from a file: what it changes, what it is refused for, and a run given back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest

from papo_fast import __version__, launch
from papo_fast.cli import main
from papo_fast.config import Config
from papo_fast.config_file import read_settings, with_settings
from papo_fast.errors import InputError
from papo_fast.presets import PRESETS, get_preset
from support.small_runs import VOLATILE, run, small


def test_every_preset_comes_back_from_its_own_json_and_yaml(tmp_path):
    yaml = pytest.importorskip("yaml")
    for name, (_, config) in PRESETS.items():
        settings = json.loads(json.dumps(dataclasses.asdict(config)))
        assert with_settings(Config(), settings, "x") == config
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        assert with_settings(Config(), read_settings(file), "x") == config


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "seed: 3\n"
        "train: {lr: 1e-6, betas: [0.9, 0.95], steps: 7}\n"
        "rollout.prompts: 8\n"
        "rollout.group_size: 4\n"
        "model:\n  liger: off\n  gradient_checkpointing: false\n"
        "objective: {kl_prcp_clip: null, terms: [a.py:b=2]}\n"
    )
    found = with_settings(Config(), read_settings(file), "run.yaml")
    changes = dict(
        seed=3,
        train=dataclasses.replace(Config().train, lr=1e-6, betas=(0.9, 0.95), steps=7),
        rollout=dataclasses.replace(Config().rollout, prompts=8, group_size=4),
        model=dataclasses.replace(Config().model, liger="off", gradient_checkpointing=False),
        objective=dataclasses.replace(Config().objective, terms=("a.py:b=2",)),
    )
    assert found == dataclasses.replace(Config(), **changes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rollout": {"promts": 3}}, "unknown key rollout.promts; .* one is rollout.prompts"),
        ({"rollout.promts": 3}, "unknown key rollout.promts; .* one is rollout.prompts"),
        ({"lr": 1e-6}, "unknown key lr; .* one is train.lr"),
        ({"train": {"kl_coef": 0}}, "unknown key train.kl_coef; .* one is objective.kl_coef"),
        ({"seed.x": 3}, "unknown key seed.x"),
        ({"xyzzy": 3}, "unknown key xyzzy$"),
        ({"train": 3}, "train is 3, expected settings by name, such as train.optimizer"),
        ({"train": {"lr": "fast"}}, "train.lr is 'fast': expected a number"),
        ({"train": {"steps": 1.5}}, "train.steps is 1.5: expected an integer"),
        ({"train": {"steps": True}}, "train.steps is True: expected an integer"),
        ({"train": {"steps": None}}, "train.steps is None: expected an integer"),
        ({"train": {"betas": [0.9]}}, "expected a list of 2"),
        ({"reward": {"functions": "accuracy"}}, "reward.functions is 'accuracy': expected a list"),
        ({"resume": "yes"}, "resume is 'yes': expected true or false"),
        ({"rollout": {"engine": "sglang"}}, "expected one of hf, vllm, vllm_server"),
        ({"name": ["a"]}, "expected a text"),
        ({"name": True}, "name is True: expected a text, in quotes"),
        ({"name": 1.1}, "name is 1.1: expected a text, in quotes"),
        ({"track": False}, "track is False: expected one of none, auto"),
        ({"train": {"steps": float("inf")}}, "train.steps is inf: expected an integer"),
        ({"train": {"lr": 10**400}}, "expected a number"),
        ({"train": {"lr": 1}, "train.lr": 2}, "train.lr is given twice"),
        ({"train.lr": 1, "train": {"lr": 2}}, "train.lr is given twice"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_file(settings, said):
    with pytest.raises(
        InputError, match=f"^run.yaml: .*{said}".replace(".", r"\.").replace(r"\.*", ".*")
    ):
        with_settings(Config(), settings, "run.yaml")


def refusal(capsys, *argv):
    assert main(list(argv)) == 2
    return " ".join(capsys.readouterr().err.split())


def test_files_that_hold_no_settings_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text, said in (
        ("a.json", "{", "a.json is not JSON"),
        ("a.yaml", "a: [", "a.yaml is not YAML"),
        ("list.yaml", "- a", "list.yaml holds list, expected settings"),
        ("a.toml", "", "expected a .yaml, .yml or .json file"),
        ("preset.yaml", "preset: papo-3b", "preset.yaml: unknown preset"),
        ("presets.yaml", "preset: [tiny]", "presets.yaml: unknown preset ['tiny']"),
        ("twice.yaml", "train: {lr: 1}\ntrain: {steps: 2}", "twice.yaml is not YAML: train stands"),
        ("deep.yaml", "train: {lr: 1, steps: 2, lr: 3}", "lr stands in it twice"),
        ("twice.json", '{"train": {"lr": 1, "lr": 2}}', "twice.json is not JSON: lr stands"),
        ("nested.json", "[" * 100_000, "nested.json is not JSON: maximum recursion depth"),
        ("nested.yaml", "[" * 3_000, "nested.yaml is not YAML: maximum recursion depth"),
        ("date.yaml", "name: 2020-13-45", "date.yaml is not YAML: month must be in 1..12"),
        ("zero.yaml", "0", "zero.yaml holds int, expected settings"),
        ("bounds.yaml", "preset: tiny\ntrain: {lr: -1}", "train.lr is -1"),
    ):
        (tmp_path / name).write_text(text)
        assert said in refusal(capsys, "train", "--config", name)
    assert "gone.yaml cannot be read" in refusal(capsys, "train", "--config=gone.yaml")
    assert "needs a preset or --config FILE" in refusal(capsys, "train")


def test_options_change_the_file_which_changes_the_preset(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "train", lambda config, console: seen.append(config))
    file = tmp_path / "run.yaml"
    file.write_text("preset: papo-d\ntrain: {lr: 0.5, steps: 9}\n")
    assert main(["train", "--config", str(file), "--train.lr", "0.25"]) == 0
    assert main(["train", "tiny", "--train.lr=0.25", f"--config={file}"]) == 0
    for config, name in zip(seen, ("papo-d", "tiny"), strict=True):
        train = dataclasses.replace(PRESETS[name][1].train, lr=0.25, steps=9)
        assert config == dataclasses.replace(PRESETS[name][1], train=train)


def test_anchors_and_merges_of_yaml_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: &a\n  <<: {steps: 3, lr: 1}\n  steps: 4\n", encoding="utf-8-sig")
    assert read_settings(file) == {"train": {"steps": 4, "lr": 1}}
    file = tmp_path / "run.json"
    file.write_text('{"seed": 3}', encoding="utf-8-sig")
    assert read_settings(file) == {"seed": 3}


def test_the_version(capsys):
    assert main(["--version"]) == 0 and __version__ in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory):
    """A finished run with held-out questions, and its rows and summary."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from support.small_runs import png

    place = tmp_path_factory.mktemp("finished")
    rows = [
        {"problem": "<image>What?", "answer": str(i), "images": [png(i)], "kind": "text_leaning"}
        for i in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    config = small(
        get_preset("papo-g-3b"), checkpoints["qwen2_5_vl"], place / "train.parquet", place / "runs"
    )
    train = dataclasses.replace(config.train, steps=1, update_prompts=4, lr=0.05)
    return run(dataclasses.replace(config, train=train))


def test_a_runs_own_config_reproduces_it(finished):
    folder, rows, summary = finished
    assert main(["train", "--config", str(folder / "config.json")]) == 0
    again = folder.with_name(f"{folder.name}-2")
    found = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in VOLATILE} for row in found] == rows
    of_again = json.loads((again / "summary.json").read_text())
    assert of_again | {"seconds": 0} == summary | {"seconds": 0}
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


def test_the_evaluation_of_a_run_is_its_own_bit_for_bit(finished, monkeypatch, capsys):
    folder, _, summary = finished
    found = []
    evaluate = launch.evaluate
    monkeypatch.setattr(launch, "evaluate", lambda *args: found.append(evaluate(*args)))
    responses = []
    score = launch.Scorer.score
    monkeypatch.setattr(
        launch.Scorer,
        "score",
        lambda self, texts, *a: responses.append(texts) or score(self, texts, *a),
    )
    assert main(["eval", str(folder)]) == 0
    (own,) = found
    assert own == {key: summary[key] for key in own}
    assert {"accuracy_after", "accuracy_after_corrupted", "honesty_after"} <= set(own)
    assert "Accuracy on held-out questions" in capsys.readouterr().out
    # an untrained model is never right: what it says has to be the same too
    examples = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    said = [row["response"] for row in examples if row["when"] == "after"]
    assert responses[0][::2] == said and len(set(said)) > 6
    # every setting of rollout and data may be changed
    assert main(["eval", str(folder), "--eval.samples", "1", "--rollout.max-new-tokens", "3"]) == 0
    assert found[1]["samples_per_question"] == 1 and max(map(len, responses[2])) <= 3 * 20
    assert main(["eval", str(folder), "--seed", "1", "--eval.no-corrupted"]) == 0
    assert responses[-1] != responses[0] and "honesty_after" not in found[2]


def test_a_run_with_functions_of_python_is_evaluated_without_them(finished, monkeypatch):
    folder, _, summary = finished
    found = []
    evaluate = launch.evaluate
    monkeypatch.setattr(launch, "evaluate", lambda *args: found.append(evaluate(*args)))
    file = folder / "config.json"
    text = file.read_text()
    settings = json.loads(text)
    settings["reward"]["functions"] = ["python:gone=2", "http://127.0.0.1:9/judge"]
    settings["objective"] |= {"terms": ["python:gone"], "token_weights": "python:gone"}
    settings["corruption"]["second"] = "diffusion"
    settings["model"] |= {"lora_rank": 4, "quantize": "nf4"}  # and without their libraries
    settings["train"]["optimizer"] = "adamw_8bit"
    find = importlib.util.find_spec
    libraries = ("peft", "bitsandbytes")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in libraries else find(n, *a)
    )
    try:
        file.write_text(json.dumps(settings))
        assert main(["eval", str(folder)]) == 0
    finally:
        file.write_text(text)
    (own,) = found
    assert own == {key: summary[key] for key in own}


def test_questions_that_are_not_there_are_missed_before_a_model_is_loaded(
    finished, monkeypatch, capsys
):
    def load(*_):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("papo_fast.model.policy.Policy.load", load)
    folder, gone = finished[0], ["--data.test", "gone.parquet"]
    assert "no file gone.parquet" in refusal(capsys, "eval", str(folder), *gone)
    again = ["--config", str(folder / "config.json")]
    assert "no file gone.parquet" in refusal(capsys, "train", *again, *gone)
    boxes = ["--corruption.kind", "evidence"]
    assert "no column 'boxes'" in refusal(capsys, "eval", str(folder), *boxes)


def test_commands_without_options_say_so(capsys):
    for command in ("presets", "doctor"):
        assert main([command, "--help"]) == 0
        assert f"papo-fast {command} takes no options" in capsys.readouterr().out
        assert f"{command} takes no options; got x" in refusal(capsys, command, "x")


def test_what_is_no_finished_run_is_refused(finished, tmp_path, capsys):
    assert "holds no config.json" in refusal(capsys, "eval", str(tmp_path))
    (tmp_path / "config.json").write_text((finished[0] / "config.json").read_text())
    assert "holds no model" in refusal(capsys, "eval", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert "data.test is empty" in refusal(capsys, "eval", str(tmp_path), "--data.test", "")
