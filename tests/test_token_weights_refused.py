"""Token weights that are refused: files, names and settings, and what a weight returns."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from papo_fast.config import ObjectiveConfig
from papo_fast.config_checks import check, check_objective
from papo_fast.errors import InputError
from papo_fast.integrations.verl import papo_loss
from papo_fast.presets import get_preset
from papo_fast.token_weights import named_weights, token_weights
from papo_fast.view_terms import dvrp_term, evidence_kls, margin_loss
from papo_fast.weighing import TokenWeigher
from support.groups import group_of
from support.weighted import seen, weighted_by


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        ("x = 1 +", "mine", "cannot be run .SyntaxError"),
        ("raise ValueError('two\\nlines')", "mine", "cannot be run .ValueError: two lines"),
        ("mine = 3", "mine", "has no function mine"),
        (
            "def mine(b, c): return b\nmine.needs = ('colour',)",
            "mine",
            r"has needs = \('colour',\)",
        ),
    ],
)
def test_a_file_that_has_no_such_weight_is_one_line(tmp_path, body, name, message):
    goal = weighted_by(tmp_path, body, name)
    with pytest.raises(InputError, match=message) as caught:
        check_objective(goal)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_weights": "vpo"}, "'vpo' is neither vppo, pgpo, tor, cgpo, vepo nor FILE.py:name"),
        ({"token_weights": "vppo,vppo"}, "names vppo twice"),
        ({"token_weights": "nowhere.py:mine"}, "nowhere.py is not a file"),
        ({"token_weights": "nowhere:mine"}, "not of the form FILE.py:name"),
        ({"token_weights": "vepo", "dependency_of": "current"}, "dependency_of is current"),
        ({"token_weights": "tor", "dependency_of": "current"}, "tor_nucleus is 0.95"),
        (
            {"token_weights": "vppo", "dependency_of": "current", "parity": "official"},
            "objective.dependency is exact, but objective.aug stored",
        ),
    ],
    ids=str,
)
def test_settings_of_weights_that_cannot_be_are_refused(fields, message):
    config = dataclasses.replace(get_preset("tiny"), objective=ObjectiveConfig(**fields))
    with pytest.raises(InputError, match=message) as caught:
        check(config)
    assert "\n" not in str(caught.value)


def test_what_costs_the_whole_vocabulary_is_measured_after_sampling_alone(tmp_path):
    body = "def mine(b, c): return b.js_divergence\nmine.needs = ('js_divergence',)"
    goal = weighted_by(tmp_path, body)
    check_objective(goal)
    batch = seen()
    assert torch.equal(token_weights(batch, goal, named_weights(goal)), batch.js_divergence)
    with pytest.raises(InputError, match=r"js_divergence, which .* needs, is measured after"):
        check_objective(dataclasses.replace(goal, dependency_of="current"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.0", "returned float: expected a tensor of shape"),
        ("return batch.dependency[:2]", r"returned \(2,\): expected a tensor of shape \(13,\)"),
        ("return batch.dependency / 0", "not finite"),
    ],
)
def test_a_weight_that_returns_no_factors_is_named(tmp_path, body, message):
    goal = weighted_by(tmp_path, f"def mine(batch, config):\n    {body}\n")
    with pytest.raises(InputError, match=message):
        token_weights(seen(), goal, named_weights(goal))


def test_groups_that_were_not_measured_and_loops_without_weights_are_refused():
    goal = ObjectiveConfig(token_weights="vppo")
    config = dataclasses.replace(get_preset("grpo"), objective=goal.resolved())
    with pytest.raises(InputError, match=r"samples\[0\]\.seen is missing"):
        TokenWeigher(config).weigh([group_of(None, [[1, 2], [3]])])
    x, mask = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(InputError, match="papo_loss applies none"):
        papo_loss(x, x, x, mask, "token-mean", goal)


def test_terms_of_three_views_refuse_what_does_not_fit():
    batch = seen()
    x, short = batch.logprobs, batch.logprobs[:3]
    with pytest.raises(InputError, match="noised_logprobs has shape"):
        dvrp_term(x, x, short)
    with pytest.raises(InputError, match="control_logprobs has shape"):
        evidence_kls(batch, x, short)
    with pytest.raises(InputError, match="penalty is 'k2'"):
        evidence_kls(batch, x, x, penalty="k2")
    kls = evidence_kls(batch, x - 1, x)
    with pytest.raises(InputError, match="valid have shapes"):
        margin_loss(*kls, torch.ones(2, dtype=torch.bool))
    with pytest.raises(InputError, match="transform is"):
        margin_loss(*kls, torch.ones(3, dtype=torch.bool), transform="square")
    assert margin_loss(*kls, torch.zeros(3, dtype=torch.bool)) == 0
