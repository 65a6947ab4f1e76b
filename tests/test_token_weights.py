"""Token weights in a run: measured on whole logits and applied to advantages."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from papo_fast import launch
from papo_fast.config import DataConfig, ModelConfig, ObjectiveConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.dependency import WeightBatch, dependency, js_divergence, nucleus_entropy
from papo_fast.errors import InputError
from papo_fast.model.policy import Policy
from papo_fast.presets import get_preset
from papo_fast.rewards.scorer import Scorer
from papo_fast.token_weights import WEIGHTS, named_weights, pgpo, token_weights, vppo, vppo_scaling
from papo_fast.weighing import TokenWeigher
from papo_fast.weight_settings import WEIGHT_NAMES
from support.groups import group_of
from support.small_runs import run, small
from support.weighted import LENGTHS, seen, weighted_by
from support.whole_logits import picture, plain_logits

# --- what is measured -----------------------------------------------------------------------------


def test_what_weights_read_is_that_of_whole_logits_one_sequence_at_a_time(checkpoints):
    """VEPO's and ToR's statistics of a picture and its corruption, and the exact dependency."""
    path = checkpoints["qwen2_5_vl"]
    data = DataConfig(prompt_suffix="", min_pixels=56 * 56, max_pixels=112 * 112)
    encoder = PromptEncoder(path, data)
    model = ModelConfig(path=str(path), dtype="float32", gradient_checkpointing=False)
    policy = Policy.load(model, encoder.banned_token_ids, torch.device("cpu"))
    with torch.no_grad():  # a sharper policy than the random one
        policy.model.lm_head.weight.mul_(40)
    prompt = encoder.encode("What is it?", [picture(64, 64, 1)])
    responses = [[65, 66, 67, 68], [70], [71, 72]]
    corrupted = torch.randn_like(prompt.pixel_values)
    groups = [group_of(prompt, responses, corrupted)]
    goal = ObjectiveConfig(
        token_weights="tor, vepo", kl_prcp_coef=0.0, kl_coef=0.0, tor_nucleus=0.6
    )
    config = dataclasses.replace(get_preset("grpo"), objective=goal.resolved())
    metrics = TokenWeigher(config).measure(groups, policy)

    kls = []
    for sample, response in zip(groups[0].samples, responses, strict=True):
        log_p = plain_logits(policy, prompt, response, prompt.pixel_values)
        log_q = plain_logits(policy, prompt, response, corrupted)
        p, q = log_p.exp(), log_q.exp()
        middle = (0.5 * (p + q)).clamp(min=1e-300).log()
        kls.append((p * (log_p - log_q)).sum(-1))
        nucleus = []
        for row in p:
            kept, mass = [], 0.0
            for value in sorted(row.tolist(), reverse=True):
                if mass >= 0.6:
                    break
                kept.append(value)
                mass += value
            nucleus.append(-sum(x / mass * math.log(x / mass) for x in kept))
        chosen = torch.tensor(response)[:, None]
        expected = {
            "logprobs": log_p.gather(1, chosen)[:, 0],
            "aug_logprobs": log_q.gather(1, chosen)[:, 0],
            "entropy": -(p * log_p).sum(-1),
            "aug_entropy": -(q * log_q).sum(-1),
            "kl_prcp": kls[-1],
            "js_divergence": 0.5 * (p * (log_p - middle) + q * (log_q - middle)).sum(-1),
            "nucleus_entropy": torch.tensor(nucleus, dtype=torch.float64),
        }
        for name, values in expected.items():
            found = sample.seen[name].double()
            torch.testing.assert_close(found, values, rtol=1e-3, atol=1e-5, msg=name)
    assert metrics["dependency"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-3)


def test_divergence_of_policies_with_impossible_words_is_exact():
    """p = (½, ½, 0), q = (0, ½, ½): by hand ½ log 2; equal policies 0, disjoint ones log 2."""
    inf = math.inf
    p = torch.tensor([[0.0, 0.0, -inf], [1.0, 2.0, 3.0], [0.0, -inf, -inf]], dtype=torch.float64)
    q = torch.tensor([[-inf, 0.0, 0.0], [1.0, 2.0, 3.0], [-inf, 0.0, -inf]], dtype=torch.float64)
    expected = [0.5 * math.log(2), 0.0, math.log(2)]
    assert js_divergence(p, q).tolist() == pytest.approx(expected, abs=1e-15)


def test_nucleus_entropy_by_hand():
    """Of (.5, .3, .15, .05) the first two hold .8, and one of them .5."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log()
    two = -(0.625 * math.log(0.625) + 0.375 * math.log(0.375))
    assert nucleus_entropy(logits, 0.6).item() == pytest.approx(two)
    assert nucleus_entropy(logits, 0.4).item() == pytest.approx(0.0, abs=1e-15)
    with pytest.raises(InputError, match="mass is 0"):
        nucleus_entropy(logits, 0)


def test_dependency_is_the_kl_or_what_the_codes_sample():
    batch = seen()
    d = batch.aug_logprobs - batch.logprobs
    assert torch.equal(dependency(batch, ObjectiveConfig()), batch.kl_prcp)
    k3 = dependency(batch, ObjectiveConfig(dependency="sampled-k3"))
    torch.testing.assert_close(k3, d.exp() - d - 1)
    assert torch.equal(dependency(batch, ObjectiveConfig(dependency="sampled-k1")), d.abs())
    with pytest.raises(InputError, match=r"kl_prcp is missing"):
        dependency(seen(kl_prcp=None), ObjectiveConfig())


# --- properties of the weights --------------------------------------------------------------------


def test_vppo_moves_no_advantage_between_responses_on_average():
    config = ObjectiveConfig(vppo_top_p=1.0)
    batch = seen()
    factors = [part.unique().item() for part in vppo(batch, config).split(LENGTHS)]
    assert sum(factors) / 3 == pytest.approx(1, abs=1e-6) and min(factors) == pytest.approx(0.9)
    means = [part.mean().item() for part in batch.dependency.split(LENGTHS)]
    assert means.index(max(means)) == factors.index(max(factors))


def test_vppo_leaves_responses_equal_whose_dependencies_hardly_differ():
    """A range of 5e-7 nats is noise to its code, one of 2e-6 is not."""
    scores_B = torch.tensor([0.1, 0.1 + 5e-7, 0.1 + 2e-7], dtype=torch.float64)
    assert vppo_scaling(scores_B, 0.9).tolist() == [1, 1, 1]
    assert vppo_scaling(0.1 + 4 * (scores_B - 0.1), 0.9).min().item() == pytest.approx(0.9)


def test_pgpo_keeps_each_responses_mass_and_its_order():
    batch = seen()
    weights = pgpo(batch, ObjectiveConfig())
    for part, score in zip(weights.split(LENGTHS), batch.dependency.split(LENGTHS), strict=True):
        assert part.sum().item() == pytest.approx(len(part))
        assert torch.equal(part.argsort(), score.argsort())


def test_pgpo_takes_no_rounding_for_a_dependency():
    """Without a picture a dependency is 0, or what rounding makes of it."""
    nothing = torch.tensor([0, 8e-14, 2e-13, 1e-13, 8e-14], dtype=torch.float64)
    small = torch.tensor([1e-6, 3e-6, 2e-6, 0, 5e-6, 4e-6, 1e-6], dtype=torch.float64)
    batch = seen(dependency=torch.cat([nothing, nothing[:1], small]))
    weights = pgpo(batch, ObjectiveConfig()).split(LENGTHS)
    assert torch.equal(weights[0], torch.ones(5, dtype=torch.float64)) and weights[1] == 1
    assert weights[2].min() == 0 and weights[2].max() > 1.5


def test_weights_are_multiplied_and_carry_no_gradient():
    score = seen().dependency.requires_grad_()
    batch = seen(dependency=score)
    config = ObjectiveConfig(token_weights="vppo,cgpo")
    both = token_weights(batch, config, named_weights(config))
    assert not both.requires_grad
    alone = [WEIGHTS[name].function(batch, config).detach() for name in ("vppo", "cgpo")]
    torch.testing.assert_close(both, alone[0] * alone[1])
    assert 0 < both.count_nonzero() < len(both)


@pytest.mark.parametrize("name", WEIGHT_NAMES)
def test_no_tokens_have_no_weights_and_what_is_missing_is_named(name):
    assert set(WEIGHT_NAMES) == set(WEIGHTS)
    config = ObjectiveConfig(token_weights=name)
    fields = {f.name: getattr(seen(), f.name) for f in dataclasses.fields(WeightBatch)}
    none = WeightBatch(**{n: None if x is None else x[:0] for n, x in fields.items()})
    assert token_weights(none, config, named_weights(config)).shape == (0,)
    needed = WEIGHTS[name].needs(config)[0]
    with pytest.raises(InputError, match=rf"TokenBatch\.{needed} is missing"):
        token_weights(seen(**{needed: None}), config, named_weights(config))


# --- in a run -------------------------------------------------------------------------------------

CONSTANT = """import torch

def mine(batch, config):
    return torch.full_like(batch.dependency, {})
"""


class Different(Scorer):
    """The random model answers nothing right: rewards that differ give it advantages."""

    def score(self, responses, answers, questions=None):
        scores = super().score(responses, answers)
        return [
            dataclasses.replace(score, reward=(sum(map(ord, text)) % 7) / 7)
            for score, text in zip(scores, responses, strict=True)
        ]


@pytest.fixture(scope="module")
def rows_without_files():
    """{objective: metrics}: a run without a function of a file is the same in every test."""
    return {}


@pytest.fixture
def rows_of(checkpoints, questions, tmp_path, monkeypatch, rows_without_files):
    """Metrics of two steps, of one update each, with an objective."""
    monkeypatch.setattr(launch, "Scorer", Different)

    def rows(objective, name):
        out = tmp_path / name
        config = small(get_preset("papo-g-3b"), checkpoints["qwen2_5_vl"], questions, out)
        data = dataclasses.replace(config.data, test="")
        train = dataclasses.replace(config.train, update_prompts=4)
        changed = dataclasses.replace(config, objective=objective, data=data, train=train)
        return run(changed)[1]

    def known(objective, name):
        if ".py" in objective.token_weights:
            return rows(objective, name)
        if objective not in rows_without_files:
            rows_without_files[objective] = rows(objective, name)
        return copy.deepcopy(rows_without_files[objective])

    return known


@pytest.mark.parametrize("of", ["rollout", "current"])
def test_a_weight_from_a_file_scales_the_policy_loss_and_nothing_else(of, rows_of, tmp_path):
    """Factors of 1 give the run without weights bit for bit, and ½ half of its policy loss."""
    plain = rows_of(ObjectiveConfig(), "plain")
    assert all(row["pg_loss"] != 0 for row in plain)

    def constant(factor, **fields):
        goal = weighted_by(tmp_path, CONSTANT.format(factor), dependency_of=of, **fields)
        return rows_of(goal, str(factor))

    for a, b in zip(plain, constant(1.0), strict=True):
        assert b.pop("token_weight") == 1 and b.pop("tokens_left_out") == 0
        # each is the mean over tokens of the exact KL of the policy that sampled
        assert b.pop("dependency") == pytest.approx(a["kl_prcp"], rel=1e-3)
        assert a == b
    half = constant(0.5)
    assert half[0]["pg_loss"] == plain[0]["pg_loss"] / 2
    assert half[0]["kl_prcp"] == plain[0]["kl_prcp"] and half[1]["pg_loss"] != plain[1]["pg_loss"]
    for row in constant(0.0, kl_prcp_coef=0.0, kl_coef=0.0):
        assert row["pg_loss"] == 0 and row["grad_norm"] == 0 and row["tokens_left_out"] == 1


@pytest.mark.parametrize(
    ("names", "fields"),
    [
        ("vppo", {}),
        ("vppo", {"dependency_of": "current", "dependency": "sampled-k3"}),
        ("vepo", {}),
        ("pgpo", {"dependency_of": "current"}),
        ("cgpo,tor", {"dependency": "sampled-k1"}),
    ],
    ids=str,
)
def test_two_steps_with_weights_by_name(names, fields, rows_of, monkeypatch):
    """Each changes the policy loss in its own way, and leaves out what it says."""
    plain = rows_of(ObjectiveConfig(kl_prcp_coef=0.0, kl_coef=0.0), "plain")
    goal = ObjectiveConfig(token_weights=names, kl_prcp_coef=0.0, kl_coef=0.0, **fields)
    rows = rows_of(goal, "weighted")
    assert len(rows) == 2
    assert rows[0]["pg_loss"] != plain[0]["pg_loss"] and rows[0]["grad_norm"] > 0
    for row in rows:
        weight, left_out = row["token_weight"], row["tokens_left_out"]
        if row["response_length"] == 6:  # all of them: ⌈.4 · 6⌉ = 3 are kept, ⌈.2 · 6⌉ = 2
            assert left_out == pytest.approx({"vppo": 3 / 6, "vepo": 4 / 6}.get(names, left_out))
        if names == "vppo":
            assert weight == pytest.approx(1 - left_out, rel=0.1)
        elif names in ("vepo", "pgpo"):
            assert weight == pytest.approx(1, abs=1e-5)
        else:
            assert 0.3 < left_out < 0.8 and 0 < weight < 1 - left_out + 0.05


def test_the_preset_of_vppo_has_the_papers_numbers_and_runs(
    checkpoints, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr(launch, "Scorer", Different)
    preset = get_preset("vppo-7b")
    goal = preset.objective
    assert (goal.vppo_top_p, goal.vppo_scaling_min, goal.entropy_coef) == (0.4, 0.9, 0.06)
    assert (goal.clip_low, goal.clip_high, goal.clip_dual, goal.kl_coef) == (0.2, 0.28, 3.0, 0.0)
    assert (goal.dependency, goal.weighs_on, goal.kl_prcp_coef) == ("sampled-k3", "rollout", 0.0)
    assert preset.rollout.group_size == 8 and preset.rollout.dynamic_filter
    assert preset.corruption.ratio == 0.5
    config = small(preset, checkpoints["qwen2_5_vl"], questions, tmp_path)
    rollout = dataclasses.replace(config.rollout, filter_unfilled="top_up", max_filter_rounds=1)
    _, rows, _ = run(dataclasses.replace(config, rollout=rollout))
    for row in rows:
        assert row["pg_loss"] != 0 and 0.3 < row["tokens_left_out"] < 0.6
        # −log π of sampled tokens, minimised; the policy loss is added as it is
        assert row["entropy"] == pytest.approx(row["sampled_entropy"])
        assert row["loss"] == pytest.approx(row["pg_loss"] + 0.06 * row["entropy"], rel=1e-5)
