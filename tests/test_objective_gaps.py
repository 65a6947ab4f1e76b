"""The objective of batches that lack something: a vector, tokens, right responses, a term."""

import dataclasses
import math

import pytest
import torch

from papo_fast.config import ObjectiveConfig
from papo_fast.errors import InputError
from papo_fast.objective import mean_metrics, objective
from papo_fast.token_batch import TokenBatch
from support.objective_batches import (
    EXACT,
    LENGTHS,
    REVERSE,
    SAMPLED,
    denominators,
    everything,
    make_batch,
    part_of,
)


def test_terms_of_coefficient_zero_need_nothing_and_contribute_no_nan():
    bare = dict.fromkeys(
        ("entropy", "aug_logprobs", "aug_entropy", "kl_prcp", "ref_logprobs", "ref_kl")
    )
    config = ObjectiveConfig(kl_coef=0, kl_prcp_coef=0, aug="trained").resolved()
    loss, metrics = objective(make_batch(**bare, correct=None), config, denominators())
    assert set(metrics).isdisjoint({"kl_prcp", "kl_ref", "aug_entropy", "sft_loss"})

    nan = torch.full((sum(LENGTHS),), math.nan, dtype=torch.float64)
    poisoned = make_batch(**{name: nan.clone().requires_grad_() for name in bare})
    logprobs = poisoned.logprobs.requires_grad_()
    again, _ = objective(poisoned, config, denominators())
    again.backward()
    assert again.item() == loss.item()
    assert logprobs.grad.isfinite().all()
    assert all(getattr(poisoned, name).grad is None for name in bare)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (EXACT, "ref_kl"),
        (EXACT, "kl_prcp"),
        (REVERSE, "kl_reverse"),
        (EXACT, "entropy"),
        (EXACT, "aug_entropy"),
        (EXACT, "correct"),
        (SAMPLED, "ref_logprobs"),
        (SAMPLED, "aug_logprobs"),
    ],
)
def test_a_missing_vector_is_named(config, name):
    with pytest.raises(InputError, match=rf"TokenBatch\.{name} is missing"):
        objective(make_batch(**{name: None}), config, denominators())


def test_a_missing_denominator_is_named():
    over = dataclasses.replace(denominators(), correct_tokens=None)
    with pytest.raises(InputError, match="correct_tokens"):
        objective(make_batch(), EXACT, over)
    over = dataclasses.replace(denominators(), constant=None)
    with pytest.raises(InputError, match="constant"):
        objective(make_batch(), everything(average="constant"), over)
    with pytest.raises(InputError, match="resolved"):
        objective(make_batch(), ObjectiveConfig(), denominators())


def test_malformed_batches_are_refused():
    with pytest.raises(InputError, match="kl_prcp has shape"):
        make_batch(kl_prcp=torch.zeros(3))
    with pytest.raises(InputError, match="bfloat16"):
        make_batch(logprobs=torch.zeros(sum(LENGTHS), dtype=torch.bfloat16))
    with pytest.raises(InputError, match="stand next to each other"):
        make_batch(sequence_ids=torch.arange(sum(LENGTHS)) % 4)


def test_sft_without_right_responses_is_zero():
    wrong = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    for over in ("global", "micro"):
        config = everything(average_over=over)
        no_right = dataclasses.replace(denominators(), correct_tokens=0)
        _, metrics = objective(make_batch(correct=wrong), config, no_right)
        assert metrics["sft_loss"][0].item() == 0


def test_an_empty_micro_batch_is_a_zero_with_a_gradient():
    empty = make_batch(lengths=())
    logprobs = empty.logprobs.requires_grad_()
    for config in (EXACT, everything(average="sequence"), everything(average_over="micro")):
        loss, metrics = objective(empty, config, denominators())
        loss.backward()
        assert loss.item() == 0 and logprobs.grad.shape == (0,)
        part = objective(make_batch(), config, denominators())[1]
        assert mean_metrics([part, metrics]) == mean_metrics([part])


def test_a_response_without_counted_tokens_weighs_in_its_micro_batch():
    """Four responses, one of them all masked: a micro-batch of it and another is half of them."""
    config, over = everything(average_over="micro", sft_coef=0.0), denominators()
    first = TokenBatch(**part_of(make_batch(), slice(0, 3)))
    alone, metrics = objective(first, config, over)
    with_empty = dataclasses.replace(first, responses=2)
    both, of_both = objective(with_empty, config, over)
    assert both.item() == pytest.approx(2 * alone.item(), rel=1e-12)
    assert of_both["kl_prcp"][1] == 2 * metrics["kl_prcp"][1] == 0.5
    assert mean_metrics([of_both]) == pytest.approx(mean_metrics([metrics]), rel=1e-12)
    with pytest.raises(InputError, match="responses is 3, but sequence_ids has 4 sequences"):
        dataclasses.replace(make_batch(), responses=3)


def test_metrics_of_a_batch_without_tokens_are_zero_and_not_nan():
    for lengths, responses in (((), None), ((), 2)):
        empty = make_batch(lengths=lengths, responses=responses)
        _, metrics = objective(empty, EXACT, denominators())
        _, others = objective(make_batch(), EXACT, denominators())
        means = mean_metrics([metrics])
        assert means.keys() == others.keys()  # ranks gather them by name
        assert {means.pop("ratio_max"), means.pop("ratio_min")} == {1.0}
        assert set(means.values()) == {0.0}
        assert mean_metrics([metrics, others])["ratio_min"] == mean_metrics([others])["ratio_min"]
