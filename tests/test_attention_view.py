"""A stream whose text sees no picture, against the plain model with a mask that says so."""

from __future__ import annotations

import pytest
import torch

from papo_fast.model.packing import pack
from support.family_checkpoints import FAMILIES
from support.groups import group_of, load_policy, token_ids
from support.whole_logits import picture


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    return load_policy(tmp_path_factory.mktemp(request.param), request.param)


def groups_with_pictures(encoder):
    two = encoder.encode("a<image>bc<image>d", [picture(60, 110, 1), picture(90, 60, 2)])
    one = encoder.encode("<image>why?", [picture(70, 70, 3)])
    none = encoder.encode("no picture", [])
    return [
        group_of(two, [[70, 71, 72], [90]]),
        group_of(one, [[65, 66, 67, 68], [80, 81]]),
        group_of(none, [[100, 101, 102]]),
    ]


def masked_logprobs(policy, prompt, response, hidden):
    """(T, V) log-probs of one sequence through the model's own forward, every token in its place.

    With `hidden` no text attends to a picture's tokens.
    """
    n = len(prompt)
    ids = torch.cat([prompt.input_ids, torch.tensor(response)])
    is_picture = torch.cat([prompt.mm_token_type_ids, torch.zeros(len(response)).long()]) == 1
    sees = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    if hidden:
        sees &= ~(is_picture[None, :] & ~is_picture[:, None])
    mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~sees, torch.finfo(torch.float32).min)
    axes = policy.prompt_positions(prompt)
    after = torch.arange(int(axes.max()) + 1, int(axes.max()) + 1 + len(response))
    places = torch.cat([axes, after.expand(3, -1)], 1)[:, None]
    inputs = {}
    if prompt.pixel_values is not None:
        inputs = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    policy.model.model.rope_deltas = None
    out = policy.model(
        input_ids=ids[None],
        attention_mask=mask,
        position_ids=places,
        mm_token_type_ids=is_picture.long()[None],
        **inputs,
    )
    logits = out.logits[0, n - 1 : -1].double() + policy.banned_V.double()
    return logits.log_softmax(-1)


def test_text_that_sees_no_picture_equals_a_mask_over_its_tokens(loaded):
    policy, encoder = loaded
    groups = groups_with_pictures(encoder)
    stats, _ = policy.stats(pack(groups, policy.prompt_positions, aug=True))
    full, hidden, kl, loss = [], [], [], 0.0
    for group in groups:
        for response in token_ids(group):
            p, q = (masked_logprobs(policy, group.prompt.encoded, response, h) for h in (0, 1))
            at = torch.tensor(response)[:, None]
            full.append(p.gather(1, at)[:, 0])
            hidden.append(q.gather(1, at)[:, 0])
            kl.append((p.exp() * (p - q)).sum(-1))
            loss = loss + hidden[-1].sum() + 2 * kl[-1].sum()
    full, hidden, kl = (torch.cat(x) for x in (full, hidden, kl))
    assert (stats.logprobs.double() - full).abs().max() < 1e-5
    assert (stats.aug_logprobs.double() - hidden).abs().max() < 1e-5
    assert (stats.kl_prcp.double() - kl).abs().max() < 1e-5
    # pictures matter, and text alone is the same in both streams
    assert kl[:10].min() > 1e-7 and kl[10:].abs().max() == 0
    want = gradients(policy, loss)
    got = gradients(policy, stats.aug_logprobs.sum() + 2 * stats.kl_prcp.sum())
    size = torch.stack([g.norm() for g in want.values()]).norm()
    worst = max((got[n] - g).norm() / torch.maximum(g.norm(), 1e-3 * size) for n, g in want.items())
    assert worst < 1e-5


def gradients(policy, loss):
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def test_such_a_stream_runs_no_vision_tower_and_fewer_tokens(loaded):
    policy, encoder = loaded
    groups = groups_with_pictures(encoder)
    both = pack(groups, policy.prompt_positions, aug=True)
    full = pack(groups, policy.prompt_positions)
    alone = pack(groups, policy.prompt_positions, full=False, aug=True)
    pictures = sum(int(g.prompt.encoded.mm_token_type_ids.sum()) for g in groups)
    assert len(alone.input_ids_T) == len(full.input_ids_T) - pictures
    assert alone.pixel_values is None
    assert torch.equal(both.pixel_values, full.pixel_values)
    stats, _ = policy.stats(full, frozen_aug=alone)
    together, _ = policy.stats(both)
    assert torch.allclose(stats.aug_logprobs, together.aug_logprobs, atol=1e-6)
