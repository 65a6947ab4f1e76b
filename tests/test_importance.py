"""Weights of the trainer over the sampler: what they correct, and where they are used."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from papo_fast import update
from papo_fast.config import ObjectiveConfig
from papo_fast.config_checks import check
from papo_fast.data.encoder import PromptEncoder
from papo_fast.errors import InputError
from papo_fast.estimators import truncated_weights
from papo_fast.experience import add_logprobs
from papo_fast.model.policy import Policy
from papo_fast.objective import objective
from papo_fast.presets import get_preset
from papo_fast.token_batch import Denominators, TokenBatch
from papo_fast.update import Updater
from support.family_checkpoints import write_checkpoint
from support.ranks import DATA, fixed_groups

PLAIN = ObjectiveConfig(kl_coef=0, kl_prcp_coef=0).resolved()


def gradient_under(sampler_logprobs_V, logits_V, values_V, cap):
    """E over tokens of a sampler, of our objective's gradient with respect to the logits."""
    logits = logits_V.clone().requires_grad_()
    logprobs_V = logits.log_softmax(-1)
    n = len(logits)
    weights, _ = truncated_weights(logprobs_V.detach(), sampler_logprobs_V, cap)
    batch = TokenBatch(
        logprobs=logprobs_V,
        old_logprobs=logprobs_V.detach(),
        # every token stands for all draws of it: its probability is part of the advantage
        advantages=values_V * sampler_logprobs_V.exp(),
        sequence_ids=torch.arange(n),
        rollout_weights=weights,
    )
    objective(batch, PLAIN, Denominators(tokens=1.0, sequences=float(n)))[0].backward()
    return logits.grad


def test_tokens_of_another_sampler_give_the_policys_own_gradient():
    g = torch.Generator().manual_seed(0)
    logits, noise, values = (torch.randn(6, dtype=torch.float64, generator=g) for _ in range(3))
    sampler = (logits + 0.3 * noise).log_softmax(-1)
    exact = logits.clone().requires_grad_()
    (-(exact.softmax(-1) * values).sum()).backward()  # d/dz of -E_π[A]
    corrected = gradient_under(sampler, logits, values, cap=50.0)
    torch.testing.assert_close(corrected, exact.grad)
    uncorrected = gradient_under(sampler, logits, values, cap=1e-9) * 1e9
    assert (uncorrected - exact.grad).abs().max() > 0.01, "the check cannot tell them apart"


def test_weights_are_cut_at_the_cap_and_carry_no_gradient():
    old = torch.tensor([-1.0, -1.0, -1.0, -50.0], dtype=torch.float64, requires_grad=True)
    sampler = torch.tensor([-1.0, -1.4, -3.0, -0.1], dtype=torch.float64)
    weights, metrics = truncated_weights(old, sampler, 2.0)
    expected = torch.tensor([1.0, 1.4918246976412703, 2.0, 2.061153622438558e-09]).double()
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad
    assert metrics["rollout_capped"][0] == 1 and metrics["rollout_capped"][1] == 4
    assert metrics["rollout_weight"][0].item() == pytest.approx(4.4918246997)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen2_5_vl")
    encoder = PromptEncoder(path, DATA)
    preset = get_preset("grpo")
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(
            preset.model, path=str(path), dtype="float32", gradient_checkpointing=False
        ),
        objective=dataclasses.replace(preset.objective, kl_coef=0.0),
    )
    policy = Policy.load(config.model, encoder.banned_token_ids, torch.device("cpu"))
    return config, encoder, policy


def batches_of(job, monkeypatch, updates, parity="ours", **rollout):
    """What the objective was given, and the metrics, of each update of one rollout."""
    config, encoder, policy = job
    config = dataclasses.replace(
        config,
        objective=dataclasses.replace(config.objective, parity=parity).resolved(),
        rollout=dataclasses.replace(config.rollout, prompts=6, group_size=3, **rollout),
        train=dataclasses.replace(
            config.train, lr=1e-2, max_tokens=10_000, update_prompts=6 // updates
        ),
    )
    groups = fixed_groups(encoder)
    weights = {name: weight.clone() for name, weight in policy.state_dict().items()}
    scored = add_logprobs(groups, policy, None, config)
    updater = Updater(config, policy, None, total_updates=updates)
    seen, real = [], update.objective

    def recorded(batch, *args, **kwargs):
        seen[-1].append(batch)
        return real(batch, *args, **kwargs)

    monkeypatch.setattr(update, "objective", recorded)
    n, rows = len(groups) // updates, []
    for i in range(updates):
        seen.append([])
        some = groups[i * n : (i + 1) * n]
        rows.append(updater.update(some, lambda _: None, first=i == 0))
    policy.load_state_dict(weights)
    return seen, rows, scored


@pytest.mark.parametrize("updates", [1, 2])
def test_recomputed_log_probs_weigh_the_policy_loss(job, monkeypatch, updates):
    seen, rows, scored = batches_of(job, monkeypatch, updates, engine="vllm")
    for batches, row in zip(seen, rows, strict=True):
        for batch in batches:
            ratio = (batch.old_logprobs + 1.0).exp()  # the sampler said -1 of every token
            torch.testing.assert_close(batch.rollout_weights, ratio.clamp(max=2.0))
        assert 0 < row["rollout_weight"] < 2
    first = torch.cat([batch.old_logprobs for batch in seen[0]])
    logged = rows[0] if updates == 1 else scored
    if updates == 1:
        assert logged["sampler_mismatch"] == pytest.approx((first + 1).abs().mean().item())
    else:
        assert logged["sampler_mismatch"] > 0 and "sampler_mismatch" not in rows[1]


def test_the_samplers_own_log_probs_are_the_ratio_and_are_not_weighed_again(job, monkeypatch):
    seen, rows, _ = batches_of(job, monkeypatch, 2, engine="vllm", old_logprobs="sampler")
    for batches in seen:
        for batch in batches:
            assert batch.rollout_weights is None
            assert (batch.old_logprobs == -1).all()
    # of the weights that sampled: not of the second update
    assert rows[0]["sampler_mismatch"] > 0 and "sampler_mismatch" not in rows[1]


@pytest.mark.parametrize(
    "settings",
    [{"engine": "hf"}, {"engine": "vllm", "importance_cap": 0.0}, {"parity": "official"}],
    ids=str,
)
def test_no_weights_where_there_is_nothing_to_correct_or_none_are_wanted(
    job, monkeypatch, settings
):
    settings = {"engine": "vllm"} | settings
    seen, rows, _ = batches_of(job, monkeypatch, 1, **settings)
    assert all(batch.rollout_weights is None for batches in seen for batch in batches)
    assert "rollout_weight" not in rows[0] and rows[0]["sampler_mismatch"] > 0


def test_a_cap_below_one_is_refused():
    preset = get_preset("tiny")
    for cap in (-1.0, 0.5):
        config = dataclasses.replace(
            preset, rollout=dataclasses.replace(preset.rollout, importance_cap=cap)
        )
        with pytest.raises(InputError, match=r"rollout.importance_cap"):
            check(config)
