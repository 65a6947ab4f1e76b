"""The objective against sums written out token by token, finite differences, and hand numbers."""

import dataclasses
import math

import pytest
import torch

from papo_fast.config import ObjectiveConfig
from papo_fast.errors import InputError
from papo_fast.objective import mean_metrics, objective
from papo_fast.token_batch import Denominators, TokenBatch

LENGTHS = (3, 1, 7, 5)
FLOAT_FIELDS = (
    *("logprobs", "old_logprobs", "advantages", "entropy", "aug_logprobs", "aug_entropy"),
    *("kl_prcp", "kl_reverse", "ref_logprobs", "ref_kl", "rollout_weights"),
)
LEAVES = ("logprobs", "entropy", "aug_logprobs", "aug_entropy", "kl_prcp", "kl_reverse", "ref_kl")


def make_batch(lengths=LENGTHS, seed=0, **replaced) -> TokenBatch:
    """float64 vectors; no ratio is near a bound of a clip, where slopes would be undefined."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    sign = torch.tensor([1.0, -1.0, -0.5, 2.0], dtype=torch.float64)[: len(lengths)][ids]
    # log-ratios that are inside the clip range, beyond either bound, or beyond the dual clip
    choices = torch.tensor([0.0, 0.11, -0.12, 0.6, -0.7, 1.9], dtype=torch.float64)
    log_ratio = choices[torch.randint(len(choices), (n,), generator=generator)]
    logprobs = uniform(-3.0, -0.1)
    values = {
        "logprobs": logprobs,
        "old_logprobs": logprobs - log_ratio,
        "advantages": sign,
        "sequence_ids": ids + 40,
        "entropy": uniform(0.1, 2.0),
        "aug_logprobs": uniform(-4.0, -0.1),
        "aug_entropy": uniform(0.1, 3.0),
        "kl_prcp": uniform(0.01, 1.0),
        "ref_logprobs": logprobs + uniform(-0.3, 0.3),
        "ref_kl": uniform(0.01, 0.2),
        "correct": torch.tensor([True, False, False, True])[: len(lengths)][ids],
        "rollout_weights": uniform(0.3, 2.0),
        "kl_reverse": uniform(0.01, 1.0),
    }
    return TokenBatch(**(values | replaced))


def part_of(batch: TokenBatch, part: slice) -> dict[str, torch.Tensor]:
    """The vectors of these tokens."""
    vectors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: x[part] for name, x in vectors.items() if x is not None}


def denominators(lengths=LENGTHS, max_new_tokens=9) -> Denominators:
    correct = torch.tensor([True, False, False, True])[: len(lengths)]
    return Denominators.from_lengths(
        torch.tensor(lengths, dtype=torch.int64), max_new_tokens, correct
    )


def everything(**replaced) -> ObjectiveConfig:
    """Every term switched on."""
    values = {
        "kl_coef": 0.3,
        "kl_prcp_coef": 0.2,
        "entropy_coef": 0.07,
        "aug_entropy_coef": 0.05,
        "sft_coef": 0.11,
    }
    if replaced.get("parity") != "official":
        values["aug"] = "trained"
    return ObjectiveConfig(**(values | replaced)).resolved()


EXACT = everything(kl_estimator="exact")
SAMPLED = everything(kl_prcp_estimator="sampled", entropy_estimator="sampled")
PAPER = everything(parity="paper")
REVERSE = everything(kl_prcp_direction="reverse")


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
