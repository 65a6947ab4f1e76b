"""The plain path's statistics and gradients: families beyond Qwen's three, and Qwen's own on it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForImageTextToText

from papo_fast.config import ModelConfig
from papo_fast.data.encoder import FAMILIES
from papo_fast.errors import InputError
from papo_fast.model.choice import is_plain, load_encoder
from papo_fast.model.plain import BANNED_UNDER_CAP, PlainPolicy, check_head
from papo_fast.model.policy import Policy, SharedReference, inference
from support.in_float64 import logprobs_in_float64
from support.plain_checkpoints import PLAIN
from support.plain_policies import (
    DATA,
    KINDS,
    assert_same_gradients,
    gradients,
    groups_of,
    loaded,
    often,
)

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in PLAIN]


def own_logprobs(path, encoder, groups, pixels_of):
    """log-probs of all response tokens by the family's own forward, one sequence at a time."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for group in groups:
        prompt = group.prompt.encoded
        for sample in group.samples:
            response = torch.tensor(sample.completion.token_ids)
            inputs = {"input_ids": torch.cat([prompt.input_ids, response])[None]}
            n = inputs["input_ids"].shape[1]
            for name, value in getattr(prompt, "tokens", {}).items():
                inputs[name] = torch.zeros(1, n, dtype=torch.int64)
                inputs[name][:, : value.shape[1]] = value
            if prompt.pixel_values is not None:
                inputs |= prompt.pictures | {"pixel_values": pixels_of(group)}
            if "mm_token_type_ids" in inputs and path.name not in MROPE:
                del inputs["mm_token_type_ids"]
            with torch.no_grad():
                logits = model(**inputs).logits[0].float()
            logits[:, encoder.banned_token_ids] = -1e9
            rows = logits[len(prompt) - 1 : n - 1].log_softmax(-1)
            found.append(rows.gather(1, response[:, None])[:, 0])
    return torch.cat(found)


MROPE = ("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "glm4v", "glm4v_moe")


@pytest.mark.parametrize("name", SLOW)
def test_statistics_are_those_of_the_familys_own_logits(name, tiny, questions):
    encoder, policy = loaded(tiny(name), "plain")
    groups = groups_of(encoder, questions)
    with inference(policy):
        full = policy.stats(policy.pack(groups))[0].logprobs
        both = policy.stats(policy.pack(groups, aug=True))[0]
    own = own_logprobs(tiny(name), encoder, groups, lambda g: g.prompt.encoded.pixel_values)
    torch.testing.assert_close(full, own, atol=1e-5, rtol=1e-5)
    aug = own_logprobs(tiny(name), encoder, groups, lambda g: g.aug_pixels)
    torch.testing.assert_close(both.aug_logprobs, aug, atol=1e-5, rtol=1e-5)
    # the third question has no picture; of those with one the corrupted stream differs
    differs = (both.aug_logprobs - both.logprobs).abs().split([7, 7, 7])
    assert differs[0].max() > 1e-3 and differs[1].max() > 1e-3 and differs[2].max() < 1e-5


@pytest.mark.parametrize("name", often(KINDS))
def test_gradients_of_a_batch_are_those_of_one_sequence_after_the_other(name, tiny, questions):
    encoder, policy = loaded(tiny(name), "plain")
    groups = groups_of(encoder, questions)
    alone = [
        [dataclasses.replace(group, samples=[sample])]
        for group in groups
        for sample in group.samples
    ]
    policy.train()
    assert_same_gradients(gradients(policy, groups), gradients(policy, *alone))


@pytest.mark.parametrize("name", often(KINDS))
def test_a_batch_of_text_alone_can_run_the_vision_tower(name, tiny, questions):
    """As processes have to that share its weights; nothing else may change."""
    encoder, policy = loaded(tiny(name), "plain")
    groups = groups_of(encoder, questions)
    text = groups[2]
    assert not text.prompt.encoded.has_pictures
    policy.train()
    without = gradients(policy, [text])
    policy.always_run_vision = True
    with pytest.raises(ValueError, match="no stand_in"):
        policy.pack([text])
    policy.stand_in = encoder.one_picture
    including = gradients(policy, [text])
    assert_same_gradients({n: including[n] for n in without}, without)
    tower = including.keys() - without.keys()
    assert any("vis" in n for n in tower)
    assert not any(including[n].any() for n in tower)
    batch = policy.pack([text], aug=True)
    assert [len(s["input_ids"]) for s in batch.streams] == [3, 3]
    assert len(policy.pack(groups).streams[0]["input_ids"]) == 6  # they have pictures


@pytest.mark.parametrize("name", FAMILIES)
def test_both_paths_agree(name, tiny, checkpoints, questions):
    """On the families that have both: statistics and gradients."""
    path = checkpoints.get(name) or tiny(name)
    found, exact = {}, {}
    for forward in ("fast", "plain"):
        encoder, policy = loaded(path, forward)
        assert type(policy) is {"fast": Policy, "plain": PlainPolicy}[forward]
        groups = groups_of(encoder, questions)
        with inference(policy):
            stats = policy.stats(policy.pack(groups, aug=True))[0]
        found[forward] = encoder, groups, stats, gradients(policy, groups)
        if not name.startswith("qwen3_5") and "moe" not in name:  # float32 alone, in part
            exact[forward] = logprobs_in_float64(policy, policy.pack(groups), 1.0)
    (encoder, groups, fast, of_fast), (other, others, plain, of_plain) = found.values()
    assert encoder.banned_token_ids == other.banned_token_ids
    for ours, theirs in zip(groups, others, strict=True):
        assert torch.equal(ours.prompt.encoded.input_ids, theirs.prompt.encoded.input_ids)
        for a, b in (
            (ours.aug_pixels, theirs.aug_pixels),
            (ours.prompt.encoded.pixel_values, theirs.prompt.encoded.pixel_values),
        ):
            assert a is b is None or torch.equal(a, b)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if exact:
        torch.testing.assert_close(exact["fast"], exact["plain"], atol=1e-12, rtol=0)
        torch.testing.assert_close(exact["fast"].float(), fast.logprobs, atol=1e-5, rtol=1e-5)
    # of 9e-6 on one machine; chunks of linear attention round, and test_packing.py has float64
    assert_same_gradients(of_plain, of_fast, most=3e-5 if "qwen3_5" in name else 1e-5)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_hybrids_agree_with_adapters_a_reference_and_a_frozen_stream(name, tiny, questions):
    """All that a step asks of a policy, with layers that run again in the backward."""
    pytest.importorskip("peft", reason="pip install -e '.[lora]'")
    assert not is_plain(ModelConfig(path=str(tiny(name))))
    found = []
    for forward, kind in (("fast", Policy), ("plain", PlainPolicy)):
        model = ModelConfig(path=str(tiny(name)), dtype="float32", forward=forward, lora_rank=2)
        encoder = load_encoder(model, DATA)
        policy = kind.load(model, encoder.banned_token_ids, torch.device("cpu")).train()
        adapters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        torch.manual_seed(3)
        for weight in adapters.values():
            torch.nn.init.normal_(weight, std=0.1)
        groups = groups_of(encoder, questions)
        stats, kl = policy.stats(
            policy.pack(groups),
            frozen_aug=policy.pack(groups, full=False, aug=True),
            kl_to=SharedReference(policy),
        )
        assert policy.model.model.language_model.layers[0].gradient_checkpointing
        assert kl.min() > 1e-3 and stats.kl_prcp.max() > 1e-3
        loss = stats.logprobs.sum() - 0.1 * stats.kl_prcp.sum() + 0.2 * kl.sum()
        of_loss = torch.autograd.grad(loss, list(adapters.values()))
        found.append(([*stats, kl], dict(zip(adapters, of_loss, strict=True))))
    (fast, of_fast), (plain, of_plain) = found
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert any("linear_attn" in n for n in of_fast)
    assert_same_gradients(of_plain, of_fast, most=1e-4)  # float32 rounds here more than there


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logit_scale"])
def test_caps_and_scales_of_the_logits_are_part_of_the_statistics(setting, tiny, questions):
    """No family above has one, so a model is given it; its own logits show what is meant."""
    encoder, policy = loaded(tiny("internvl"), "plain")
    groups = groups_of(encoder, questions)
    with inference(policy):
        batch = policy.pack(groups)
        hidden = policy._hidden(batch)[0]
        policy._cap, policy._scale = (5.0, 1.0) if "cap" in setting else (None, 0.25)
        if policy._cap:
            policy.banned_V[policy.banned_V < 0] = BANNED_UNDER_CAP
        got = policy.stats(batch)[0]
    logits = (policy._scale * hidden @ policy.model.lm_head.weight.T).double()
    if policy._cap:
        logits = policy._cap * (logits / policy._cap).tanh()
    logits[:, encoder.banned_token_ids] = -torch.inf
    log = logits.log_softmax(-1)
    want = log.gather(1, batch.targets_N[:, None])[:, 0]
    torch.testing.assert_close(got.logprobs.double(), want, atol=1e-5, rtol=1e-5)
    entropy = -torch.special.xlogy(log.exp(), log.exp()).sum(-1)
    torch.testing.assert_close(got.entropy.double(), entropy, atol=1e-5, rtol=1e-5)


def test_logits_that_are_not_the_heads_are_refused(tiny):
    """A model that caps its logits by a name that nothing here knows."""
    model = AutoModelForImageTextToText.from_pretrained(tiny("internvl"), dtype=torch.float32)
    check_head(model)
    model.config.text_config.final_logit_softcapping = 30.0  # its forward does not look at it
    with pytest.raises(InputError, match=r"internvl.*capped at 30\.0 and scaled by 1\.0"):
        check_head(model)
