"""Presets of the methods around PAPO, two steps each on a tiny checkpoint."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from papo_fast.errors import InputError
from papo_fast.presets import get_preset
from support.small_runs import run, small


@pytest.fixture
def questions_with_boxes(questions):
    """Every second row has a box in each picture, the others have none."""
    rows = pq.read_table(questions).to_pylist()
    for i, row in enumerate(rows):
        row["boxes"] = [[[4, 4, 30, 40]] * (i % 2) for _ in row["images"] or []]
    pq.write_table(pa.Table.from_pylist(rows), questions)
    return questions


def preset(name, checkpoint, data, out):
    """Without DAPO's filter: a model of random weights is always wrong."""
    config = small(get_preset(name), checkpoint, data, out)
    rollout = dataclasses.replace(config.rollout, dynamic_filter=False)
    return dataclasses.replace(config, rollout=rollout)


@pytest.mark.parametrize(
    ("name", "family"),
    [("pgpo", "qwen3_vl"), ("tor-d", "qwen2_5_vl"), ("cgpo", "qwen2_5_vl"),
     ("vepo-7b", "qwen2_vl"), ("dvrp-d", "qwen2_5_vl")],
)  # fmt: skip
def test_each_method_trains(name, family, checkpoints, questions_with_boxes, tmp_path):
    config = preset(name, checkpoints[family], questions_with_boxes, tmp_path)
    _, rows, summary = run(config)
    assert len(rows) == 2 and "accuracy_after_corrupted" in summary
    for row in rows:
        assert row["bad_updates"] == 0 and row["grad_norm"] >= 0
        if name == "dvrp-d":
            # the entropies of both views are most of it: some nats per token, times .05 each
            assert 0.1 < row["dvrp"] < 2 and "token_weight" not in row
        else:
            assert row["dependency"] > 0
        if name == "pgpo":
            assert row["token_weight"] == pytest.approx(1, abs=1e-5)
        if name in ("vepo-7b", "tor-d", "cgpo"):
            assert 0 < row["tokens_left_out"] < 0.9


def test_the_margin_trains_and_repeats_itself(checkpoints, questions_with_boxes, tmp_path):
    config = preset("grpo", checkpoints["qwen2_5_vl"], questions_with_boxes, tmp_path)
    corruption = dataclasses.replace(config.corruption, kind="evidence", second="control")
    goal = dataclasses.replace(config.objective, margin_coef=10.0, aug="trained")
    config = dataclasses.replace(config, corruption=corruption, objective=goal)
    _, rows, _ = run(config)
    _, again, _ = run(dataclasses.replace(config, name="again"))
    assert rows == again
    assert all(row["margin_loss"] != 0 for row in rows)


def test_a_run_without_the_column_says_which_one_it_needs(checkpoints, questions, tmp_path):
    """Before anything is sampled: the run has not even an evaluation with corrupted pictures."""
    config = preset("cgpo", checkpoints["qwen2_5_vl"], questions, tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, test=""))
    with pytest.raises(InputError, match="no column 'boxes'"):
        run(config)
