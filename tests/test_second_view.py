"""Terms of two corrupted views in an update, against one sequence at a time in float64."""

from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch

from papo_fast.config import Config, ObjectiveConfig
from papo_fast.config_checks import check, resolve
from papo_fast.corruption_settings import CorruptionConfig
from papo_fast.data.views import CorruptedViews
from papo_fast.errors import InputError
from papo_fast.experience import add_logprobs
from papo_fast.planning.workload import update_streams
from papo_fast.presets import PRESETS
from papo_fast.samples import all_samples
from papo_fast.update import Updater
from support.groups import group_of, load_policy, token_ids
from support.whole_logits import picture

TERMS = {
    "dvrp": dict(
        dvrp_sensitivity=0.3, dvrp_robustness=0.2, dvrp_masked_entropy=0.05,
        dvrp_noised_entropy=0.07,
    ),
    "margin": dict(margin_coef=0.5, margin_bound=10.0),
    "softplus": dict(margin_coef=0.5, margin_transform="softplus", margin_penalty="k1"),
}  # fmt: skip


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def loaded(request, tmp_path_factory):
    return load_policy(tmp_path_factory.mktemp(request.param), request.param)


def groups_in_three_views(encoder):
    """Black patches and strong noise, so that neither view is close to the picture."""
    config = CorruptionConfig(second="gaussian", ratio=0.7, noise_std=1.5)
    views = CorruptedViews(config, encoder)
    groups = []
    for i, responses in enumerate(([[70, 71, 72], [90], [66, 67]], [[65, 66, 67, 68], [80, 81]])):
        image = picture(70 + 20 * i, 110, i)
        group = group_of(encoder.encode("why?", [image]), responses)
        group.prompt.images.append(image)
        group.aug_pixels, group.second_pixels = views(group.prompt, 17 + i)
        groups.append(group)
    for i, sample in enumerate(all_samples(groups)):
        sample.advantage = (-1.0) ** i * (1 + i / 4)
    return groups


def settings(aug, terms, max_tokens=10**6):
    goal = ObjectiveConfig(kl_coef=0, kl_prcp_coef=0, aug=aug, **terms)
    base = PRESETS["grpo"][1]
    return dataclasses.replace(
        base,
        objective=goal.resolved(),
        rollout=dataclasses.replace(base.rollout, prompts=2, group_size=2, max_new_tokens=8),
        train=dataclasses.replace(
            base.train, update_prompts=2, max_tokens=max_tokens, lr=1e-30, grad_clip=1e9
        ),
    )


def logprobs(policy, group, response, pixels):
    """(T,) float64 log-probs of one response through the model's own forward."""
    prompt = group.prompt.encoded
    ids = torch.cat([prompt.input_ids, torch.tensor(response)])[None]
    types = torch.zeros_like(ids)
    types[0, : len(prompt)] = prompt.mm_token_type_ids
    policy.model.model.rope_deltas = None
    logits = policy.model(
        input_ids=ids,
        mm_token_type_ids=types,
        pixel_values=pixels,
        image_grid_thw=prompt.image_grid_thw,
    ).logits[0, len(prompt) - 1 : -1]
    log = (logits.double() + policy.banned_V.double()).log_softmax(-1)
    return log.gather(1, torch.tensor(response)[:, None])[:, 0]


def plain_loss(policy, groups, goal):
    """The loss by its equations, and the part of it that is of two views."""
    rows = []
    for group in groups:
        clean = group.prompt.encoded.pixel_values
        for response, sample in zip(token_ids(group), group.samples, strict=True):
            p, m, n = (
                logprobs(policy, group, response, x)
                for x in (clean, group.aug_pixels, group.second_pixels)
            )
            if goal.aug != "trained":
                m, n = m.detach(), n.detach()
            rows.append((p, m, n, sample.advantage))
    tokens, responses = sum(len(p) for p, *_ in rows), len(rows)
    loss = of_views = 0.0
    for p, m, n, advantage in rows:
        loss = loss - (advantage * (p - p.detach()).exp()).sum() / tokens

        def k3(q, p=p):
            return (q - p).exp() - (q - p) - 1

        if goal.has_dvrp_term:
            terms = goal.dvrp_robustness * k3(n) - goal.dvrp_sensitivity * k3(m)
            terms = terms - goal.dvrp_masked_entropy * m - goal.dvrp_noised_entropy * n
            of_views = of_views + terms.sum() / tokens
        else:
            kl = (lambda q, p=p: p - q) if goal.margin_penalty == "k1" else k3
            margin = kl(m).mean() - kl(n).mean()
            linear = goal.margin_transform == "linear"
            value = -margin if linear else (1 + (-margin).exp()).log()
            of_views = of_views + value / responses
    coef = 1.0 if goal.has_dvrp_term else goal.margin_coef
    return loss + coef * of_views, of_views.item()


def gradients(policy):
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("aug", ["trained", "frozen", "stored"])
def test_an_update_equals_the_plain_loss_of_three_views(loaded, name, aug):
    policy, encoder = loaded
    groups = groups_in_three_views(encoder)
    terms = dict(TERMS[name])
    if aug == "stored":
        terms |= dict(kl_prcp_estimator="sampled", entropy_estimator="sampled")
    # one batch, and then one for every sample
    for max_tokens in (10**6, 40):
        config = settings(aug, terms, max_tokens)
        policy.zero_grad(set_to_none=True)
        want, of_views = plain_loss(policy, groups, config.objective)
        want.backward()
        expected = gradients(policy)
        add_logprobs(groups, policy, None, config)
        updater = Updater(config, policy, None, total_updates=1)
        found = updater.update(groups, lambda n: None)
        metric = "dvrp" if name == "dvrp" else "margin_loss"
        assert found[metric] == pytest.approx(of_views, abs=1e-5)
        assert found["loss"] == pytest.approx(want.item(), abs=1e-5)
        got = gradients(policy)
        assert got.keys() == expected.keys()
        size = torch.stack([g.norm() for g in expected.values()]).norm()
        worst = max(
            ((got[n] - g).norm() / torch.maximum(g.norm(), 1e-3 * size)).item()
            for n, g in expected.items()
        )
        print(f"{name}, {aug}: gradients {worst:.1e}")
        assert worst < 2e-5
        for sample in all_samples(groups):
            sample.aug = sample.second = None


def test_the_views_change_the_gradient(loaded):
    """What the test above compares is not the policy loss alone."""
    policy, encoder = loaded
    groups = groups_in_three_views(encoder)
    found = []
    for terms in ({}, TERMS["dvrp"], TERMS["margin"]):
        goal = settings("frozen", terms).objective
        policy.zero_grad(set_to_none=True)
        plain_loss(policy, groups, goal)[0].backward()
        found.append(torch.cat([g.flatten() for g in gradients(policy).values()]))
    plain, dvrp, margin = found
    assert (dvrp - plain).norm() > 1e-3 * plain.norm()
    assert (margin - plain).norm() > 1e-3 * plain.norm()


def test_streams_of_a_pass_are_counted():
    counts = {aug: update_streams(settings(aug, TERMS["margin"])) for aug in ("trained", "frozen")}
    assert counts == {"trained": 3, "frozen": 2}
    assert update_streams(settings("trained", {"aug_entropy_coef": 0.1})) == 2
    assert update_streams(settings("frozen", {"aug_entropy_coef": 0.1})) == 1
    stored = dict(TERMS["dvrp"], kl_prcp_estimator="sampled", entropy_estimator="sampled")
    assert update_streams(settings("stored", stored)) == 1


def test_a_term_and_its_second_view_must_come_together():
    base = PRESETS["tiny"][1]
    goal = dataclasses.replace(base.objective, margin_coef=0.02)
    with pytest.raises(InputError, match=r"corruption\.second is empty"):
        check(dataclasses.replace(base, objective=goal))
    with pytest.raises(InputError, match=r"corruption\.second is 'blur', but no term"):
        check(dataclasses.replace(base, corruption=CorruptionConfig(second="blur")))
    both = dataclasses.replace(base, objective=goal, corruption=CorruptionConfig(second="blur"))
    assert isinstance(resolve(both), Config)


def test_pixels_are_made_where_they_are_used_and_once_for_who_holds_them(loaded):
    _, encoder = loaded
    config = CorruptionConfig(kind="diffusion", noise_anneal=8.0, second="gaussian")
    views = CorruptedViews(config, encoder)
    image = picture(70, 110, 0)
    group = group_of(encoder.encode("why?", [image]), [[70, 71], [90]])
    group.prompt.images.append(image)
    views.progress = 0.3
    eager = views(group.prompt, 5)
    group.aug_pixels, group.second_pixels = views.later(group.prompt, 5)
    views.progress = 0.9  # the next batch is sampled before this one is used
    assert not torch.equal(views(group.prompt, 5)[0], eager[0])
    for stream, expected in zip(("aug", "second"), eager, strict=True):
        held = group.pixels(stream)
        assert torch.equal(held, expected)
        assert group.pixels(stream) is held
        address = id(held)
        pieces = [dataclasses.replace(group, samples=[s]) for s in group.samples]
        assert {id(piece.pixels(stream)) for piece in pieces} == {address}
    assert group.pixels("full") is group.prompt.encoded.pixel_values
    made = weakref.ref(group.pixels("aug"))
    assert made() is None  # nobody holds them
