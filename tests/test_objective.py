"""The objective against sums written out token by token, finite differences, and hand numbers."""

import dataclasses
import math

import pytest
import torch

from papo_fast.config import ObjectiveConfig
from papo_fast.objective import mean_metrics, objective
from papo_fast.token_batch import Denominators, TokenBatch
from support.objective_batches import (
    EXACT,
    FLOAT_FIELDS,
    LEAVES,
    LENGTHS,
    PAPER,
    REVERSE,
    SAMPLED,
    denominators,
    everything,
    make_batch,
    part_of,
)


def by_hand(batch: TokenBatch, config: ObjectiveConfig) -> float:
    """docs/design.md with Python floats, token after token; clips by `if`, not by min and max."""
    get = {name: getattr(batch, name).tolist() for name in (*FLOAT_FIELDS, "correct")}
    ids = batch.sequence_ids.tolist()
    n, sequences = len(ids), sorted(set(ids))
    total = 0.0
    for i in range(n):
        at = {name: values[i] for name, values in get.items()}
        ratio, advantage = math.exp(at["logprobs"] - at["old_logprobs"]), at["advantages"]
        if advantage > 0 and ratio > 1 + config.clip_high:
            ratio = 1 + config.clip_high
        if advantage < 0 and ratio < 1 - config.clip_low:
            ratio = 1 - config.clip_low
        if advantage < 0 and config.clip_dual and ratio > config.clip_dual:
            ratio = config.clip_dual
        value = -ratio * advantage * at["rollout_weights"]

        def k3(other, at=at):
            d = at[other] - at["logprobs"]
            return math.exp(d) - 1 - d

        ref = at["ref_kl"] if config.kl_estimator == "exact" else k3("ref_logprobs")
        exact = config.kl_prcp_estimator == "exact"
        prcp = at["kl_prcp"] if exact else k3("aug_logprobs")
        prcp = at["kl_reverse"] if config.kl_prcp_direction == "reverse" else prcp
        exact = config.entropy_estimator == "exact"
        entropies = (at["entropy"] if exact else -at["logprobs"]) * config.entropy_coef
        entropies += (at["aug_entropy"] if exact else -at["aug_logprobs"]) * config.aug_entropy_coef
        value += config.kl_coef * ref - config.kl_prcp_coef * prcp + entropies
        weight = {
            "token": 1 / n,
            "sequence": 1 / (len(sequences) * ids.count(ids[i])),
            "constant": 1 / (len(sequences) * 9),
        }[config.average]
        total += weight * value
        if at["correct"]:
            total += config.sft_coef * -at["logprobs"] / sum(get["correct"])
    return total


CASES = {
    "exact": EXACT,
    "sampled": SAMPLED,
    "paper": PAPER,
    "reverse": REVERSE,
    "no_dual_clip": everything(clip_dual=None),
    "exact_constant": everything(average="constant"),
    "exact_sequence": everything(average="sequence"),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_is_the_sum_written_out_token_by_token(name):
    batch = make_batch()
    loss, _ = objective(batch, CASES[name], denominators())
    assert loss.item() == pytest.approx(by_hand(batch, CASES[name]), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_match_finite_differences_of_that_sum(name):
    config, batch = CASES[name], make_batch()
    leaves = {field: getattr(batch, field).clone().requires_grad_() for field in LEAVES}
    loss, _ = objective(dataclasses.replace(batch, **leaves), config, denominators())
    loss.backward()
    step = 1e-6
    nonzero = 0
    for field, leaf in leaves.items():
        slope = torch.zeros_like(leaf)
        for i in range(leaf.numel()):
            ends = []
            for delta in (step, -step):
                moved = getattr(batch, field).clone()
                moved[i] += delta
                ends.append(by_hand(dataclasses.replace(batch, **{field: moved}), config))
            slope[i] = (ends[0] - ends[1]) / (2 * step)
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(grad, slope, rtol=1e-6, atol=1e-9)
        nonzero += int(slope.count_nonzero() > 0)
    assert nonzero >= 2


@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_micro_batches_add_up_to_the_whole_batch(average):
    config, whole = everything(average=average), make_batch()
    over = denominators()

    def gradients(parts):
        leaves = {field: getattr(whole, field).clone().requires_grad_() for field in LEAVES}
        total, metrics = 0.0, []
        for part in parts:
            fields = part_of(whole, part)
            fields |= {name: leaf[part] for name, leaf in leaves.items()}
            loss, metric = objective(TokenBatch(**fields), config, over)
            loss.backward()
            total += loss.item()
            metrics.append(metric)
        return total, {name: leaf.grad for name, leaf in leaves.items()}, mean_metrics(metrics)

    ends = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    one = gradients([slice(0, ends[-1])])
    uneven = gradients([slice(ends[0], ends[2]), slice(ends[2], ends[3]), slice(ends[3], ends[4])])
    assert uneven[0] == pytest.approx(one[0], rel=1e-13)
    for name, grad in one[1].items():
        if grad is None:
            assert uneven[1][name] is None
        else:
            torch.testing.assert_close(uneven[1][name], grad, rtol=1e-13, atol=0)
    assert uneven[2] == pytest.approx(one[2], rel=1e-12)


def test_micro_average_weighs_each_micro_batch_by_its_sequences():
    config = everything(average_over="micro", sft_coef=0.0)
    over = denominators()
    whole, total = make_batch(), 0.0
    parts = (slice(0, 4), slice(4, 16))  # two sequences of 4 tokens, two of 12
    expected = 0.0
    for part in parts:
        fields = part_of(whole, part)
        total += objective(TokenBatch(**fields), config, over)[0].item()
        expected += 0.5 * by_hand(TokenBatch(**fields), config)
    assert total == pytest.approx(expected, rel=1e-12)
    assert total != pytest.approx(by_hand(whole, config), rel=1e-3)


def tiny(log_ratio, advantage, **config):
    """Policy loss and its gradient of a single token."""
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    batch = TokenBatch(
        logprobs=logprobs,
        old_logprobs=torch.tensor([-1.0 - log_ratio], dtype=torch.float64),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        sequence_ids=torch.tensor([0]),
    )
    goal = ObjectiveConfig(kl_coef=0, kl_prcp_coef=0, **config).resolved()
    loss, metrics = objective(batch, goal, Denominators(tokens=1, sequences=1))
    loss.backward()
    return loss.item(), logprobs.grad.item(), mean_metrics([metrics])


def test_clip_is_asymmetric_and_stops_the_gradient_on_the_side_it_should():
    up, down = math.log(1.5), math.log(0.5)
    assert tiny(up, 2.0)[:2] == pytest.approx((-1.3 * 2, 0.0))
    assert tiny(up, -2.0)[:2] == pytest.approx((1.5 * 2, 1.5 * 2))
    assert tiny(down, 2.0)[:2] == pytest.approx((-0.5 * 2, -0.5 * 2))
    assert tiny(down, -2.0)[:2] == pytest.approx((0.8 * 2, 0.0))
    assert tiny(0.1, 2.0)[1] == pytest.approx(-2 * math.exp(0.1))
    assert tiny(up, 2.0)[2]["clip_fraction_high"] == 1
    assert tiny(up, -2.0)[2]["clip_fraction_high"] == 0


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    loss, grad, metrics = tiny(5.0, -0.5)
    assert (loss, grad, metrics["clip_fraction_low"]) == (pytest.approx(3.0 * 0.5), 0.0, 1.0)
    loss, grad, _ = tiny(5.0, -0.5, clip_dual=None)
    assert loss == pytest.approx(math.exp(5) * 0.5) and grad == pytest.approx(loss)
    assert tiny(5.0, 0.5)[0] == pytest.approx(-1.3 * 0.5)


def test_absurd_ratios_stay_finite():
    for log_ratio in (-1e4, 1e4):
        for advantage in (-1.0, 1.0):
            loss, grad, _ = tiny(log_ratio, advantage, clip_dual=None)
            assert math.isfinite(loss) and math.isfinite(grad)


@pytest.mark.parametrize("parity", ["ours", "official"])
@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_no_gradient_into_the_aug_stream_unless_asked(estimator, parity):
    def aug_gradients(aug):
        config = everything(
            parity=parity,
            aug=aug,
            kl_prcp_estimator="sampled",
            entropy_estimator=estimator,
        )
        leaves = {n: getattr(make_batch(), n).requires_grad_() for n in LEAVES}
        objective(make_batch(**leaves), config, denominators())[0].backward()
        assert leaves["logprobs"].grad.abs().sum() > 0
        return leaves["aug_logprobs"].grad, leaves["aug_entropy"].grad

    assert aug_gradients("frozen") == (None, None)
    logprobs_grad, entropy_grad = aug_gradients("trained")
    assert logprobs_grad.abs().sum() > 0
    assert (entropy_grad is not None) == (estimator == "exact")


def test_the_clip_of_a_sampled_kl_has_a_floor_in_official_parity_alone():
    """k1 of three tokens is -0.5, 0.1 and 0.9 nats: the authors clamp it to [0, 0.4]."""
    k1 = torch.tensor([-0.5, 0.1, 0.9], dtype=torch.float64)
    batch = make_batch(lengths=(3,))
    batch = dataclasses.replace(batch, aug_logprobs=batch.logprobs - k1)
    for parity, expected in (("official", 0.5 / 3), ("paper", 0.0)):
        config = everything(
            parity=parity, kl_prcp_penalty="k1", kl_prcp_clip=0.4, average="token", sft_coef=0.0
        )
        metrics = mean_metrics([objective(batch, config, denominators((3,)))[1]])
        assert metrics["kl_prcp"] == pytest.approx(expected, abs=1e-12), parity


def test_a_nan_is_not_masked_away_by_the_authors_token_mask():
    batch = make_batch()
    batch.aug_logprobs[5] = math.nan
    config = everything(parity="official", kl_prcp_top_p=0.3, aug_entropy_coef=0.0, sft_coef=0.0)
    assert objective(batch, config, denominators())[0].isnan()


def test_token_mask_and_clip_apply_to_exact_kl_too():
    kl = torch.tensor([0.5, 0.1, 0.3, 0.2, 0.05], dtype=torch.float64, requires_grad=True)
    batch = make_batch(lengths=(5,), kl_prcp=kl)
    config = everything(kl_prcp_top_p=0.4, kl_prcp_clip=0.4, kl_prcp_coef=1.0)
    loss, metrics = objective(batch, config, denominators((5,)))
    loss.backward()
    assert metrics["kl_prcp"][0].item() == pytest.approx((0.4 + 0.3) / 5)
    assert kl.grad.tolist() == pytest.approx([0, 0, -1 / 5, 0, 0])


def test_annealed_gamma_replaces_the_configured_one():
    kl = make_batch().kl_prcp.requires_grad_()
    batch = make_batch(kl_prcp=kl)
    config = everything(kl_prcp_coef=0.2)
    _, metrics = objective(batch, dataclasses.replace(config, kl_prcp_coef=0.0), denominators())
    assert "kl_prcp" in metrics  # still monitored
    objective(batch, dataclasses.replace(config, kl_prcp_coef=0.05), denominators())[0].backward()
    assert kl.grad.tolist() == pytest.approx([-0.05 / 16] * 16)


def test_signs_perception_is_maximised_and_entropies_minimised():
    leaves = {name: getattr(make_batch(), name).requires_grad_() for name in LEAVES}
    objective(make_batch(**leaves), EXACT, denominators())[0].backward()
    assert (leaves["kl_prcp"].grad < 0).all()
    assert all((leaves[name].grad > 0).all() for name in ("entropy", "aug_entropy", "ref_kl"))


def test_ratio_metrics_by_hand():
    batch = make_batch()
    ratio = (batch.logprobs - batch.old_logprobs).exp()
    metrics = mean_metrics([objective(batch, EXACT, denominators())[1]])
    assert metrics["ratio_max"] == pytest.approx(ratio.max().item())
    assert metrics["ratio_min"] == pytest.approx(ratio.min().item())
    positive = batch.advantages > 0
    clipped = torch.where(positive, ratio > 1.3, ratio < 0.8)
    assert metrics["clip_fraction_high"] == pytest.approx(clipped.double().mean().item())
    dual = ~positive & (ratio > 3)
    assert 0 < metrics["clip_fraction_low"] == pytest.approx(dual.double().mean().item())
    assert metrics["sampled_entropy"] == pytest.approx(-batch.logprobs.mean().item())
