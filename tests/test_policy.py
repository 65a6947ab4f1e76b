"""The policy's statistics against the HuggingFace model's own logits, one sequence at a time."""

from __future__ import annotations

import json

import pytest
import torch

from papo_fast.config import DataConfig, ModelConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.model.packing import pack
from papo_fast.model.policy import Policy
from papo_fast.rollout.hf import HFRollout
from support.family_checkpoints import FAMILIES, write_checkpoint
from support.groups import group_of
from support.whole_logits import picture, plain_logits

DATA = DataConfig(prompt_suffix="", min_pixels=56 * 56, max_pixels=112 * 112)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    encoder = PromptEncoder(path, DATA)
    config = ModelConfig(path=str(path), dtype="float32", gradient_checkpointing=False)
    policy = Policy.load(config, encoder.banned_token_ids, torch.device("cpu"))
    return path, encoder, policy


def some_prompts(encoder):
    return [
        encoder.encode("What is it?", [picture(64, 64, 1)]),
        encoder.encode("No picture here.", []),
        encoder.encode(
            "Two of them: <image> and <image>", [picture(60, 90, 2), picture(99, 64, 3)]
        ),
    ]


def test_no_gradient_reaches_the_aug_stream_when_it_must_not(loaded):
    _, encoder, policy = loaded
    prompt, response = some_prompts(encoder)[0], [65, 66, 67]
    corrupted = torch.randn_like(prompt.pixel_values).requires_grad_()
    groups = [group_of(prompt, [response], corrupted)]
    full = pack(groups, policy.prompt_positions)
    aug = pack(groups, policy.prompt_positions, full=False, aug=True)
    stats, _ = policy.stats(full, frozen_aug=aug)
    stats.kl_prcp.sum().backward()
    assert corrupted.grad is None
    both, _ = policy.stats(pack(groups, policy.prompt_positions, aug=True))
    both.kl_prcp.sum().backward()
    assert corrupted.grad.abs().max() > 0
    torch.testing.assert_close(stats.kl_prcp, both.kl_prcp, rtol=1e-4, atol=1e-6)


def test_exact_reference_kl_matches_the_two_models_own_logits(loaded):
    path, encoder, policy = loaded
    config = ModelConfig(path=str(path), dtype="float32", gradient_checkpointing=False)
    reference = Policy.load(config, encoder.banned_token_ids, torch.device("cpu"))
    reference.requires_grad_(False)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn_like(p))
    prompt, response = some_prompts(encoder)[0], [65, 66, 67, 68]
    batch = pack([group_of(prompt, [response])], policy.prompt_positions)
    _, kl = policy.stats(batch, kl_to=reference)
    log_p = plain_logits(policy, prompt, response, prompt.pixel_values)
    log_r = plain_logits(reference, prompt, response, prompt.pixel_values)
    expected = (log_p.exp() * (log_p - log_r)).sum(-1)
    print("exact KL", kl.tolist(), "expected", expected.tolist())
    torch.testing.assert_close(kl.double(), expected, rtol=1e-4, atol=1e-5)
    kl.sum().backward()
    assert policy.model.lm_head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("ends", ["seldom", "often"])
def test_sampler_and_trainer_agree_and_banned_tokens_are_never_drawn(loaded, ends):
    _, encoder, policy = loaded
    prompts = some_prompts(encoder)
    eos = encoder.eos_token_ids
    if ends == "often":  # responses leave the batch at every step
        eos = [*eos, *range(0, len(policy.banned_V), 3)]
    engine = HFRollout(policy, eos, encoder.pad_token_id, batch_size=64)
    patches = []
    visual = policy.model.model.visual
    hook = visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    groups = engine.generate(
        prompts, 20, temperature=1.3, max_new_tokens=12, seed=5, advance=lambda n: None
    )
    hook.remove()
    assert sum(patches) == sum(len(p.pixel_values) for p in prompts if p.pixel_values is not None)
    assert [len(g) for g in groups] == [20, 20, 20]
    completions = [c for group in groups for c in group]
    assert len({len(c.token_ids) for c in completions}) >= (5 if ends == "often" else 1)
    drawn = {t for c in completions for t in c.token_ids}
    assert not drawn & set(encoder.banned_token_ids)
    for c in completions:
        last = [t in eos for t in c.token_ids]
        assert last == [False] * (len(last) - 1) + [c.finished]
        assert c.finished or len(c.token_ids) == 12
    packed = [
        group_of(p, [c.token_ids for c in group]) for p, group in zip(prompts, groups, strict=True)
    ]
    batch = pack(packed, policy.prompt_positions)
    with torch.no_grad():
        stats, _ = policy.stats(batch, temperature=1.3)
    sampled = torch.tensor([x for c in completions for x in c.logprobs])
    print("max |sampler - trainer|:", (sampled - stats.logprobs).abs().max().item())
    assert (sampled - stats.logprobs).abs().max() < 2e-5


def test_sampling_is_seeded_and_the_checkpoints_own_sampling_options_are_ignored(loaded, tmp_path):
    path, encoder, policy = loaded
    prompt = some_prompts(encoder)[0]

    def draw(policy, seed):
        engine = HFRollout(policy, encoder.eos_token_ids, encoder.pad_token_id, batch_size=8)
        return engine.generate(
            [prompt], 8, temperature=1.0, max_new_tokens=8, seed=seed, advance=lambda n: None
        )

    assert draw(policy, 1) == draw(policy, 1)
    assert draw(policy, 1) != draw(policy, 2)
    shipped = {"repetition_penalty": 5.0, "top_k": 1, "min_p": 0.5, "temperature": 1e-6}
    copy = write_checkpoint(tmp_path / "copy", path.name[:-1], generation=shipped)
    config = ModelConfig(path=str(copy), dtype="float32", gradient_checkpointing=False)
    other = Policy.load(config, encoder.banned_token_ids, torch.device("cpu"))
    assert draw(other, 1) == draw(policy, 1)
    other.save(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert kept["repetition_penalty"] == 5.0
