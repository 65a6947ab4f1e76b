"""A run with a user's reward, corruption, token weight and loss term, by CLI and by Python."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

import papo_fast
from papo_fast.cli import main
from papo_fast.config import Config, ObjectiveConfig
from papo_fast.config_checks import check_objective
from papo_fast.corruption_settings import check_corruption
from papo_fast.data.corruption import PromptCorruption
from papo_fast.data.views import CorruptedViews
from papo_fast.errors import InputError
from papo_fast.hand_over import hand_over
from papo_fast.objective import objective
from papo_fast.presets import get_preset
from papo_fast.token_batch import Denominators, TokenBatch
from papo_fast.user_function import load_function, name_given
from support.small_runs import VOLATILE, small

REWARD = """
def letters(response, reference, level, **others):
    assert others["prompt"] and reference == others["row"]["answer"]
    return (sum(map(ord, response)) % 7) / 7 + level
"""
CORRUPTION = """
import torch

def noise(pixel_values, image_grid_thw, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(pixel_values.shape, generator=generator)
"""
WEIGHT = """
def half(batch, config):
    return (batch.dependency > 0).to(batch.logprobs.dtype) / 2
"""
TERM = """
def drift(batch, config):
    return (batch.logprobs - batch.aug_logprobs).square()

drift.needs = ("aug_logprobs",)
"""
FILES = {"reward.py": REWARD, "corruption.py": CORRUPTION, "weight.py": WEIGHT, "term.py": TERM}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The functions by name, from files that lie outside the package."""
    place = tmp_path / "mine"
    place.mkdir()
    functions = {}
    for name, text in FILES.items():
        (place / name).write_text(text)
        exec(text, functions)
    monkeypatch.chdir(place)
    return functions


@pytest.fixture
def rows_with_levels(questions):
    """The questions with a column that only a reward knows of."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pq.read_table(questions).to_pylist()
    rows = [{**row, "level": 100, "row": {"answer": row["answer"]}} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows), questions)
    return questions


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]


def test_the_command_line_and_python_train_with_the_same_functions(
    files, checkpoints, rows_with_levels, tmp_path
):
    config = small(get_preset("papo-g-3b"), checkpoints["qwen2_5_vl"], rows_with_levels, tmp_path)
    data = dataclasses.replace(config.data, test="")
    config = dataclasses.replace(config, data=data)
    options = {
        "out": tmp_path / "cli", "device": "cpu", "model.path": config.model.path,
        "model.dtype": "float32", "data.train": rows_with_levels,
        "data.min-pixels": config.data.min_pixels, "data.max-pixels": config.data.max_pixels,
        "rollout.prompts": 4, "rollout.group-size": 3, "rollout.max-new-tokens": 6,
        "rollout.filter-prompts": 4, "train.update-prompts": 2, "train.max-tokens": 400,
        "train.steps": 2, "train.lr": 1e-3, "eval.samples": 2, "reward.workers": 1,
        "train.checkpoint-every": config.train.checkpoint_every,
        "corruption.kind": "corruption.py:noise", "objective.token-weights": "weight.py:half",
    }  # fmt: skip
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    argv += ["--reward.functions", "reward.py:letters=2", "accuracy=0"]
    argv += ["--objective.terms", "term.py:drift=0.5"]
    assert main(["train", "papo-g-3b", *argv]) == 0
    by_cli = metrics(tmp_path / "cli" / "papo-g-3b-seed0")

    given = dict(
        reward=[(files["letters"], 2), ("accuracy", 0)],
        corruption=files["noise"],
        token_weight=files["half"],
        terms=(files["drift"], 0.5),
    )
    folder = papo_fast.train(config, Console(file=io.StringIO()), **given)
    assert metrics(folder) == by_cli

    for row in by_cli:
        assert 100 < row["reward_letters"] < 101
        assert row["reward"] == pytest.approx(2 * row["reward_letters"])
        assert row["reward_failures"] == 0 and row["alarms"] == []
        assert row["token_weight"] <= 0.5 and row["term_drift"] > 0
    # each of them makes a difference
    plain = metrics(papo_fast.train(config, Console(file=io.StringIO()), reward=given["reward"]))
    assert plain[0]["kl_prcp"] != by_cli[0]["kl_prcp"] and "token_weight" not in plain[0]
    assert plain[0]["reward"] == by_cli[0]["reward"]  # sampled before anything was learnt


def batch_of(n=4):
    logprobs = torch.linspace(-2, -1, n).requires_grad_()
    return TokenBatch(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        advantages=torch.ones(n),
        sequence_ids=torch.zeros(n, dtype=torch.int64),
        entropy=torch.ones(n),
    )


def test_a_term_is_averaged_as_all_terms_and_weighted_by_its_coefficient():
    def square(batch, config):
        return batch.logprobs**2

    plain = hand_over(Config(), terms=[]).objective
    goal = dataclasses.replace(plain, kl_coef=0.0, kl_prcp_coef=0.0).resolved()
    own = hand_over(Config(objective=goal), terms=(square, 3)).objective.resolved()
    assert own.terms == ("python:square=3.0",)
    over = Denominators.from_lengths(torch.tensor([4]), 8, torch.tensor([False]))
    without, _ = objective(batch_of(), goal, over)
    batch = batch_of()
    loss, parts = objective(batch, own, over)
    mean = (torch.linspace(-2, -1, 4) ** 2).mean()
    torch.testing.assert_close(loss - without, 3 * mean)
    torch.testing.assert_close(parts["term_square"][0], mean)
    loss.backward()
    torch.testing.assert_close(batch.logprobs.grad, -torch.ones(4) / 4 + 3 * 2 * batch.logprobs / 4)


def test_a_term_of_the_corrupted_stream_makes_the_run_look_at_it():
    def far(batch, config):
        return batch.kl_prcp

    far.needs = ("kl_prcp",)
    goal = ObjectiveConfig(kl_prcp_coef=0.0)
    assert not goal.needs_aug
    goal = hand_over(Config(objective=goal), terms=far).objective.resolved()
    assert goal.needs_aug and goal.aug_stream == "frozen"
    estimators = dict(kl_prcp_estimator="sampled", entropy_estimator="sampled")
    stored = dataclasses.replace(goal, aug="stored", **estimators)
    with pytest.raises(InputError, match=r"needs kl_prcp, but objective\.aug stored"):
        check_objective(stored)

    far.needs = ("ref_logprobs",)
    check_objective(goal)
    with pytest.raises(InputError, match="loads no reference model"):
        check_objective(dataclasses.replace(goal, kl_coef=0.0))
    far.needs = ("reflogprobs",)
    with pytest.raises(InputError, match="expected a tuple of names out of entropy"):
        check_objective(goal)


def test_a_term_of_another_shape_is_named():
    def mean(batch, config):
        return batch.logprobs.mean()

    goal = hand_over(Config(), terms=mean).objective
    goal = dataclasses.replace(goal, kl_coef=0.0, kl_prcp_coef=0.0).resolved()
    over = Denominators.from_lengths(torch.tensor([4]), 8, torch.tensor([False]))
    with pytest.raises(InputError, match=r"python:mean returned \(\), expected a tensor \(4,\)"):
        objective(batch_of(), goal, over)


def test_functions_of_one_name_do_not_take_each_others_place():
    rewards = [lambda response: 1, lambda response: 2]
    config = hand_over(
        Config(),
        reward=[(rewards[0], np.float32(0.5)), rewards[1], rewards[0]],
        corruption=lambda images, seed: images,
        token_weight=[lambda batch, config: 3, "vppo"],
        terms=(lambda batch, config: 4, np.int64(2)),
    )
    names = ("python:function=0.5", "python:function_2", "python:function")
    assert config.reward.functions == names
    assert [load_function(x.partition("=")[0], "")("") for x in names] == [1, 2, 1]
    assert load_function(config.corruption.kind, "")([5], 0) == [5]
    assert load_function(config.objective.weight_names[0], "")(None, None) == 3
    (term,) = config.objective.terms
    assert term == "python:function_5=2.0" and load_function(term[:-4], "")(None, None) == 4

    # and a configuration that has functions already keeps those that nothing replaces
    again = hand_over(config, corruption=lambda images, seed: [6])
    assert load_function(again.corruption.kind, "")([5], 0) == [6]
    assert load_function(names[1], "")("") == 2 and again.reward == config.reward


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(reward=3), "reward is 3: expected a function"),
        (dict(reward=[(len, "much")]), "is not a pair of a function and its weight"),
        (dict(terms=[(len, True)]), "is not a pair"),
        (dict(corruption=0.5), "corruption is 0.5"),
    ],
)
def test_what_is_no_function_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        hand_over(Config(), **given)


class Encoder:
    """What `PromptCorruption` asks of one, for a corruption of the user's."""

    image_processor = None
    tiles = None
    not_corrupted_by = ()


def test_a_second_corruption_is_named_by_its_own_setting():
    config = dataclasses.replace(Config().corruption, second=name_given(lambda p, g, s: None))
    check_corruption(config)
    views = CorruptedViews(dataclasses.replace(config, kind="attention"), Encoder())
    asked = Asked(Encoded(torch.ones(4, 6), torch.tensor([[1, 2, 2]])))
    with pytest.raises(InputError, match=r"^corruption\.second: python:function returned None"):
        views(asked, 7)


def corrupted(function, prompt):
    config = hand_over(Config(), corruption=function).corruption
    check_corruption(config)
    return PromptCorruption(config, Encoder())(prompt, 7)


@dataclasses.dataclass
class Encoded:
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    has_pictures: bool = True


@dataclasses.dataclass
class Asked:
    encoded: Encoded


def test_a_corruption_gets_a_copy_and_its_result_is_looked_at():
    asked = Asked(Encoded(torch.ones(4, 6), torch.tensor([[1, 2, 2]])))

    def dark(pixel_values, image_grid_thw, seed):
        return pixel_values.mul_(seed)

    assert corrupted(dark, asked).unique().tolist() == [7]
    assert asked.encoded.pixel_values.unique().tolist() == [1]
    for wrong in (lambda p, g, s: p[:2], lambda p, g, s: None, lambda p, g, s: p.long()):
        with pytest.raises(InputError, match=r"corruption.kind: python:function returned"):
            corrupted(wrong, asked)
    with pytest.raises(InputError, match="takes 1 arguments"):
        corrupted(lambda pictures: pictures, asked)
    with pytest.raises(InputError, match=r"'fog': expected one of patch, official, .* or FILE.py"):
        check_corruption(dataclasses.replace(Config().corruption, kind="fog"))
