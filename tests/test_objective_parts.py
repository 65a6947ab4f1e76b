"""What the objective is put together from: KL estimators, token mask, annealing, metrics."""

import dataclasses
import math

import pytest
import torch

from papo_fast.config import ObjectiveConfig
from papo_fast.config_checks import check
from papo_fast.errors import InputError
from papo_fast.estimators import (
    above_quantile_per_sequence,
    annealed,
    at_update,
    kl_penalty,
    largest_per_sequence,
)
from papo_fast.objective import mean_metrics
from papo_fast.presets import get_preset
from papo_fast.token_batch import TokenBatch


def sequences(*lengths):
    """A batch of which only the sequences matter."""
    zeros = torch.zeros(sum(lengths))
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return TokenBatch(zeros, zeros, zeros, ids)


def test_token_mask_keeps_the_largest_of_each_sequence():
    batch = sequences(10, 1, 4)
    values = torch.tensor(
        [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.0, 0.0, 0.0, 0.0, 0.01, 3.0, 3.0, 5.0, 3.0],
        dtype=torch.float64,
    )
    kept = largest_per_sequence(values, batch, 0.2).nonzero().flatten().tolist()
    assert kept == [1, 3, 10, 13]  # 2 of 10, 1 of 1, 1 of 4
    kept = largest_per_sequence(values, batch, 0.6).nonzero().flatten().tolist()
    assert kept == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13]  # among equals the earlier
    assert largest_per_sequence(values, batch, 1.0).all()


def test_token_mask_is_not_inflated_by_rounding():
    # In float64, 0.07 × 100 is 7.000000000000001.
    values = torch.arange(100.0)
    assert largest_per_sequence(values, sequences(100), 0.07).sum() == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 0.5, 0.9, 1.0])
def test_the_authors_token_mask_is_torchs_quantile_of_each_response(share, dtype):
    """They compare with `torch.nanquantile` of a padded row, whose ties all count."""
    generator = torch.Generator().manual_seed(0)
    lengths = [*range(1, 31), 100]
    values = torch.rand(sum(lengths), generator=generator, dtype=dtype)
    values[::3] = (values[::3] * 4).round() / 4  # ties
    kept = above_quantile_per_sequence(values, sequences(*lengths), share)
    for mine, row in zip(kept.split(lengths), values.split(lengths), strict=True):
        padded = torch.cat([row, torch.full((7,), math.nan, dtype=dtype)])
        assert torch.equal(mine, row >= padded.nanquantile(1.0 - share)), len(row)


def test_the_authors_token_mask_by_hand():
    def kept(values):
        return above_quantile_per_sequence(torch.tensor(values), sequences(4), 0.3).tolist()

    # 1 + ⌊0.3 × 3⌋ = 1 of 4, where ⌈0.3 × 4⌉ = 2
    assert kept([0.4, 0.1, 0.3, 0.2]) == [True, False, False, False]
    assert kept([0.4, 0.4, 0.1, 0.4]) == [True, True, False, True]  # ties all count


def test_kl_estimators_by_hand():
    p, q = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert kl_penalty(p, q, "k1").tolist() == [0.5, -1.0]
    assert kl_penalty(p, q, "k2").tolist() == [0.125, 0.5]
    assert kl_penalty(p, q, "abs").tolist() == [0.5, 1.0]
    expected = [math.exp(-0.5) - 0.5, math.e - 2]
    assert kl_penalty(p, q, "k3").tolist() == pytest.approx(expected)
    with pytest.raises(InputError, match="k1, k2, k3, abs"):
        kl_penalty(p, q, "k4")


def test_k1_and_k3_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        assert (p.exp() * kl_penalty(p, q, kind)).sum() == pytest.approx(exact.item(), rel=1e-12)


def test_k3_is_clamped_only_where_asked():
    p = torch.tensor([-30.0], requires_grad=True)
    q = torch.zeros(1)
    assert kl_penalty(p, q, "k3").item() == pytest.approx(math.exp(20) - 21)
    clamped = kl_penalty(p, q, "k3", clamp_value=True)
    clamped.sum().backward()
    assert clamped.item() == 10 and p.grad.item() == 0


def test_annealing_ends_at_zero_and_stays_there():
    assert annealed(0.02, 0, 10) == 0.02
    assert annealed(0.02, 5, 10) == pytest.approx(0.01)
    assert annealed(0.02, 10, 10) == 0 == annealed(0.02, 99, 10)
    assert annealed(0.02, 10**9, 0) == 0.02


def test_annealing_takes_both_entropies_along_in_official_parity_alone():
    fields = dict(kl_prcp_coef=0.4, entropy_coef=0.2, aug_entropy_coef=0.1, kl_prcp_anneal_steps=8)
    for parity, expected in (("official", (0.1, 0.05, 0.025)), ("ours", (0.1, 0.2, 0.1))):
        now = at_update(ObjectiveConfig(parity=parity, **fields), 6)
        found = (now.kl_prcp_coef, now.entropy_coef, now.aug_entropy_coef)
        assert found == pytest.approx(expected), parity
    without = dataclasses.replace(ObjectiveConfig(parity="official", **fields), kl_prcp_coef=0.0)
    assert at_update(without, 6) == without


def test_metrics_of_several_updates_are_averaged_by_their_weights():
    first = {"loss": (torch.tensor(1.0), 0.25), "ratio_max": (torch.tensor(3.0), 1)}
    second = {"loss": (torch.tensor(2.0), 0.75), "ratio_max": (torch.tensor(2.0), 1)}
    third = {"loss": (torch.tensor(5.0), 1.0), "ratio_min": (torch.tensor(0.5), 1)}
    merged = mean_metrics([first, second, third])
    assert merged == {"loss": 4.0, "ratio_max": 3.0, "ratio_min": 0.5}


@pytest.mark.parametrize(
    ("fields", "runs"),
    [
        ({}, "frozen"),
        ({"aug": "trained"}, "trained"),
        ({"parity": "official"}, "stored"),
        ({"parity": "official", "entropy_estimator": "exact"}, "frozen"),
        ({"parity": "paper"}, "trained"),
        ({"aug": "frozen", "kl_prcp_direction": "reverse"}, "frozen"),
        ({"kl_prcp_coef": 0.0}, "none"),
    ],
    ids=str,
)
def test_how_the_corrupted_stream_runs_is_decided_once(fields, runs):
    assert ObjectiveConfig(**fields).resolved().aug_stream == runs


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"parity": "ours", "aug": "stored"}, r"objective\.aug is stored"),
        ({"parity": "official", "kl_prcp_direction": "reverse"}, r"kl_prcp_direction is reverse"),
    ],
    ids=str,
)
def test_a_stream_or_direction_that_the_estimators_cannot_serve_is_refused(fields, named):
    config = get_preset("tiny")
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, **fields))
    with pytest.raises(InputError, match=named):
        check(config)
