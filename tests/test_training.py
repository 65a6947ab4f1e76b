"""The whole loop on the three families, its determinism, and the command line's error messages."""

from __future__ import annotations

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText

from papo_fast.cli import main
from papo_fast.config import EvalConfig, ObjectiveConfig
from papo_fast.config_checks import check
from papo_fast.evaluate import limit_per_kind
from papo_fast.presets import PRESETS, get_preset
from papo_fast.rewards.scorer import Scorer
from papo_fast.update import Updater
from support.family_checkpoints import FAMILIES, write_processor_files
from support.small_runs import every_term, png, run, small


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_change_the_model_and_leave_a_loadable_one(
    family, checkpoints, questions, tmp_path
):
    config = small(every_term(), checkpoints[family], questions, tmp_path / "runs")
    folder, rows, summary = run(config, report=True)
    assert [r["step"] for r in rows] == [1, 2] and summary["steps"] == 2
    for row in rows:
        # every term of the objective is there and is a number
        for name in ("pg_loss", "kl_ref", "kl_prcp", "entropy", "aug_entropy", "loss"):
            assert isinstance(row[name], float), name
        assert row["kl_prcp"] > 0 and row["entropy"] > 0
        assert row["sampler_mismatch"] < 1e-4
    assert rows[0]["kl_ref"] != rows[1]["kl_ref"], "the second step has left the reference"
    trained = AutoModelForImageTextToText.from_pretrained(folder / "model")
    start = AutoModelForImageTextToText.from_pretrained(checkpoints[family])
    moved = [
        name
        for (name, a), b in zip(start.named_parameters(), trained.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert any("visual" in name for name in moved) and any("lm_head" in name for name in moved)
    assert (folder / "report.png").stat().st_size > 10_000
    assert main(["report", str(folder)]) == 0
    evaluate = ["--model", str(folder / "model"), "--data", str(questions), "--samples", "1"]
    assert main(["eval", *evaluate, "--preset", "tiny", "--limit", "2"]) == 0


def test_the_same_seed_gives_the_same_metrics_bit_for_bit(checkpoints, questions, tmp_path):
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = small(
            get_preset("papo-g-3b"), checkpoints["qwen2_5_vl"], questions, tmp_path / name
        )
        results.append(run(dataclasses.replace(config, seed=seed))[1])
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_bfloat16_with_checkpointing_still_moves_weights_at_the_papers_learning_rate(
    checkpoints, questions, tmp_path
):
    config = small(every_term(), checkpoints["qwen2_5_vl"], questions, tmp_path)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, dtype="bfloat16", gradient_checkpointing=True, train_vision=False
        ),
        data=dataclasses.replace(config.data, test=""),
        train=dataclasses.replace(config.train, lr=1e-6),
    )
    folder, rows, _ = run(config)
    # bfloat16 logits in the sampler, float32 logits of bfloat16 operands in the trainer
    assert 0 < rows[0]["sampler_mismatch"] < 0.1
    start = AutoModelForImageTextToText.from_pretrained(checkpoints["qwen2_5_vl"])
    trained = AutoModelForImageTextToText.from_pretrained(folder / "model")
    after = dict(trained.named_parameters())
    moved = {n: (p != after[n]).double().mean().item() for n, p in start.named_parameters()}
    assert all(share == 0 for name, share in moved.items() if "visual" in name)
    linear = [s for n, s in moved.items() if "visual" not in n and n.endswith("proj.weight")]
    print("share of weights moved:", min(linear), max(linear))
    assert min(linear) > 0.5


@pytest.mark.parametrize("parity", ["ours", "official", "paper"])
def test_parity_modes_run_and_only_official_keeps_gradient_out_of_the_corrupted_stream(
    parity, checkpoints, questions, tmp_path, monkeypatch
):
    from papo_fast.model.policy import Policy

    streams = []
    stats = Policy.stats_of_views

    def spy(self, batch, **kwargs):
        result = stats(self, batch, **kwargs)
        streams.append((len(batch.predictors) == 2, result[0].logprobs.requires_grad))
        return result

    monkeypatch.setattr(Policy, "stats_of_views", spy)
    config = small(every_term(), checkpoints["qwen2_5_vl"], questions, tmp_path, overwrite=True)
    aug = "trained" if parity == "ours" else None  # the other two have their own
    objective = dataclasses.replace(config.objective, parity=parity, aug=aug)
    _, rows, _ = run(dataclasses.replace(config, objective=objective))
    two_streams_with_gradient = [two for two, gradient in streams if gradient]
    assert two_streams_with_gradient
    assert all(two == (parity != "official") for two in two_streams_with_gradient)
    assert all(row["kl_prcp"] >= 0 for row in rows)


def test_learning_rate_warms_up_and_falls_to_zero(checkpoints, questions, tmp_path):
    config = small(get_preset("grpo"), checkpoints["qwen2_5_vl"], questions, tmp_path)
    schedule = dataclasses.replace(
        config.train, lr=0.4, lr_schedule="linear", warmup_steps=2, update_prompts=1
    )
    data = dataclasses.replace(config.data, test="")
    _, rows, _ = run(dataclasses.replace(config, train=schedule, data=data))
    # eight updates, four in each step; the first at half the rate
    rates = [0.5 * 8, 7, 6, 5, 4, 3, 2, 1]
    expected = [sum(rates[:4]) / 4 * 0.05, sum(rates[4:]) / 4 * 0.05]
    assert [r["lr"] for r in rows] == pytest.approx(expected)


def test_micro_batches_add_up_to_the_whole_batch(checkpoints, questions, tmp_path):
    losses = []
    for size in (100, 10_000):
        config = small(every_term(), checkpoints["qwen2_5_vl"], questions, tmp_path / str(size))
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, max_tokens=size)
        )
        losses.append([(r["loss"], r["grad_norm"]) for r in run(config)[1]])
    print("loss and gradient norm by token budget:", losses)
    torch.testing.assert_close(
        torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-6
    )


def test_a_gradient_that_is_not_finite_changes_nothing_and_then_stops_the_run(
    checkpoints, questions, tmp_path, monkeypatch
):
    from papo_fast.errors import InputError

    config = small(get_preset("grpo"), checkpoints["qwen2_5_vl"], questions, tmp_path)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, max_bad_updates=3, steps=9)
    )
    monkeypatch.setattr(
        "papo_fast.experience.group_advantages",
        lambda rewards, *_: torch.full_like(rewards, float("nan")),
    )
    with pytest.raises(InputError, match="in 3 updates in a row"):
        run(config)
    lines = (tmp_path / "grpo-seed0" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[0]["bad_updates"] == 2 and rows[0]["entropy"] > 0


def test_the_dynamic_filter_asks_until_it_is_full_and_says_when_it_cannot_or_tops_up(
    checkpoints, questions, tmp_path, monkeypatch
):
    from papo_fast.errors import InputError

    config = small(get_preset("papo-d"), checkpoints["qwen2_5_vl"], questions, tmp_path)
    with pytest.raises(InputError, match=r"kept 0 of the 4 groups.*max_filter_rounds"):
        run(config)  # an untrained model is never right

    score, calls = Scorer.score, []

    def sometimes_right(self, responses, answers, questions):
        scores = score(self, responses, answers)
        calls.append(len(scores))
        # in every second group one response is right
        return [
            dataclasses.replace(s, accuracy=1.0 if i % 6 == 0 else 0.0)
            for i, s in enumerate(scores)
        ]

    monkeypatch.setattr(Scorer, "score", sometimes_right)
    config = dataclasses.replace(config, overwrite=True, eval=EvalConfig(samples=1))
    _, rows, _ = run(config)
    assert [r["rollout_rounds"] for r in rows] == [2, 2]
    # what is reported is what was sampled, not what was kept
    assert all(abs(r["accuracy"] - 1 / 6) < 1e-6 for r in rows)
    assert [r["groups_kept"] for r in rows] == [0.5, 0.5]

    # two of the four groups come from the filter, and the update is of four all the same
    updated, update = [], Updater.update
    monkeypatch.setattr(
        Updater,
        "update",
        lambda self, groups, *a, **k: updated.append(groups) or update(self, groups, *a, **k),
    )
    short = dataclasses.replace(config.rollout, max_filter_rounds=1, filter_unfilled="top_up")
    _, rows, _ = run(dataclasses.replace(config, rollout=short))
    assert [r["rollout_rounds"] for r in rows] == [1, 1]
    assert [len(groups) for groups in updated] == [2, 2, 2, 2]
    differ = [len({s.score.accuracy for s in g.samples}) > 1 for groups in updated for g in groups]
    assert differ == 2 * [True, True, False, False]


def test_evaluation_limit_counts_questions_of_each_kind():
    class Item:
        def __init__(self, kind):
            self.kind = kind

    items = [Item(k) for k in "aabab"]
    assert [i.kind for i in limit_per_kind(items, 1)] == ["a", "b"]
    assert len(limit_per_kind(items, 0)) == 5


# --- the command line -----------------------------------------------------------------------------


def error_of(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    return " ".join(capsys.readouterr().err.split())


def test_unknown_names_get_a_suggestion(capsys):
    assert "did you mean 'train'" in error_of(capsys, "trian")
    assert "did you mean 'papo-g-3b'" in error_of(capsys, "train", "papo-g3b")
    assert "--rollout.prompts" in error_of(capsys, "train", "tiny", "--rollout.promts", "3")


def test_settings_that_cannot_work_are_named_before_anything_is_loaded(capsys):
    with_model = ("--model.path", "x", "--data.train", "y.parquet")
    cases = [
        (("train", "grpo"), "model.path is empty"),
        (("train", "grpo", "--model.path", "x"), "data.train is empty"),
        (("train", "tiny", "--rollout.group-size", "1"), "group_size is 1"),
        (("train", "tiny", "--rollout.temperature", "0"), "rollout.temperature is 0"),
        (("train", "tiny", "--corruption.ratio", "1.5"), "corruption.ratio is 1.5"),
        (("train", "tiny", "--train.update-prompts", "7"), "multiple of train.update_prompts"),
        (("train", "tiny", "--rollout.filter-prompts", "7"), "fewer than rollout.prompts = 16"),
        (("train", "tiny", "--objective.clip-dual", "0.5"), "clip_dual is 0.5"),
        (("train", "grpo", *with_model, "--train.lr", "nan"), "train.lr is nan"),
    ]
    for argv, expected in cases:
        assert expected in error_of(capsys, *argv)


def test_bad_models_and_data_are_named(capsys, checkpoints, questions, tmp_path):
    good = str(checkpoints["qwen2_5_vl"])

    def train_error(model, data, *more):
        out = ("--out", str(tmp_path / "runs"), "--overwrite", "--device", "cpu")
        return error_of(
            capsys, "train", "grpo", "--model.path", str(model), "--data.train", str(data),
            "--data.max-pixels", "12544", "--data.min-pixels", "3136", *out, *more,
        )  # fmt: skip

    assert "no such directory" in train_error("./nowhere", questions)
    bare = write_processor_files(tmp_path / "bare", "qwen2_5_vl")
    (bare / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in train_error(bare, questions)
    assert "12 rows" in train_error(good, questions)  # fewer than a rollout
    few = ("--rollout.prompts", "2", "--train.update-prompts", "2", "--train.steps", "1")
    assert "'question'" in train_error(good, questions, "--data.problem-key", "question")
    short = train_error(good, questions, *few, "--data.max-prompt-length", "8")
    assert "data.max_prompt_length = 8" in short and "row" in short
    for name, change, expected in (
        ("noise.parquet", {"images": [b"not an image"]}, "image"),
        ("empty.parquet", {"answer": ""}, "answer"),
    ):
        row = {"problem": "What?", "answer": "1", "images": [png(0)]} | change
        pq.write_table(pa.Table.from_pylist([row] * 4), tmp_path / name)
        message = train_error(good, tmp_path / name, *few)
        assert name in message and "row" in message and expected in message


def test_an_older_run_is_never_replaced_unasked(checkpoints, questions, tmp_path):
    config = small(get_preset("grpo"), checkpoints["qwen2_5_vl"], questions, tmp_path)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, test=""),
        train=dataclasses.replace(config.train, steps=1),
    )
    first, _, _ = run(config)
    before = (first / "metrics.jsonl").read_bytes()
    second, _, _ = run(config)
    assert (first.name, second.name) == ("grpo-seed0", "grpo-seed0-2")
    named = dataclasses.replace(config, name="grpo-seed0")
    with pytest.raises(ValueError, match=r"already holds a run.*--overwrite"):
        run(named)
    assert (first / "metrics.jsonl").read_bytes() == before
    run(dataclasses.replace(named, overwrite=True, seed=3))
    assert (first / "metrics.jsonl").read_bytes() != before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not a run"):
        run(dataclasses.replace(config, name="precious", overwrite=True))


def test_presets_are_the_papers_and_valid():
    table = {
        "papo-g-3b": (0.02, 0, 0.01, 0.2, 0.3),
        "papo-g-7b": (0.02, 0.05, 0.01, 0.2, 0.3),
        "papo-d": (0.01, 0.03, 0, 0.2, 0.28),
        "papo-g-noref": (0.01, 0.03, 0, 0.2, 0.3),
        "papo-qwen3-2b": (0.01, 0, 0.01, 0.2, 0.3),
        "grpo": (0, 0, 0.01, 0.2, 0.3),
        "dapo": (0, 0, 0, 0.2, 0.28),
    }
    for name, (gamma, eta, beta, low, high) in table.items():
        o: ObjectiveConfig = PRESETS[name][1].objective
        assert (o.kl_prcp_coef, o.entropy_coef, o.aug_entropy_coef) == (gamma, eta, eta), name
        assert (o.kl_coef, o.clip_low, o.clip_high, o.clip_dual) == (beta, low, high, 3.0), name
        rollout = PRESETS[name][1].rollout
        assert rollout.dynamic_filter == (name in ("papo-d", "dapo")), name
        assert rollout.filter_unfilled == "error", name
    for name, (_, config) in PRESETS.items():
        assert config.preset == name
        assert (config.train.checkpoint_every > 0) == (not config.digits.enabled), name
        check(
            dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, path="x"),
                data=dataclasses.replace(config.data, train="y"),
            )
        )
