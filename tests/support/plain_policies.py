"""What tests of the plain path share: policies of small models, their groups and gradients."""

from __future__ import annotations

import pytest
import torch

from papo_fast.config import CorruptionConfig, DataConfig, ModelConfig
from papo_fast.data.corruption import PromptCorruption
from papo_fast.data.prompts import PromptDataset
from papo_fast.model.choice import load_encoder
from papo_fast.model.plain import PlainPolicy
from papo_fast.model.policy import Policy
from papo_fast.samples import Completion, Group, Sample
from support.plain_checkpoints import PLAIN

DATA = DataConfig(min_pixels=56 * 56, max_pixels=112 * 112, prompt_suffix="", max_prompt_length=512)
# One of each way to lay out pictures. They are trained as PAPO; the other families, which share
# their code, by the command, so that `make test` trains each once and `make test-all` in both ways.
KINDS = ("gemma3", "internvl", "smolvlm", "qwen3_5_moe", "glm4v")


def often(names):
    """All families, of which `make test` runs these."""
    rare = [pytest.mark.slow, pytest.mark.exhaustive]
    return [pytest.param(n, marks=rare if n not in names else pytest.mark.slow) for n in PLAIN]


def loaded(path, forward="auto"):
    """Encoder and policy of a checkpoint, in float32."""
    model = ModelConfig(path=str(path), dtype="float32", forward=forward)
    encoder = load_encoder(model, DATA)
    kind = Policy if type(encoder).__name__ == "PromptEncoder" else PlainPolicy
    return encoder, kind.load(model, encoder.banned_token_ids, torch.device("cpu"))


def groups_of(encoder, questions, corruption=None, count=3):
    """Groups of two responses of unequal length to the first questions, with corrupted pictures."""
    corrupt = PromptCorruption(corruption or CorruptionConfig(), encoder)
    data = PromptDataset(str(questions), DATA, encoder)
    prompts = [data[i] for i in range(count)]
    made = []
    for i, prompt in enumerate(prompts):
        ids = [[65 + i, 66, 67, 68, 69], [70, 71 + i]]
        samples = [Sample(Completion(x, [0.0] * len(x), True)) for x in ids]
        made.append(Group(prompt, samples, aug_pixels=corrupt(prompt, 7 + i)))
    return made


def gradients(policy, *batches):
    policy.zero_grad(set_to_none=True)
    for groups in batches:
        stats = policy.stats(policy.pack(groups, aug=True))[0]
        loss = stats.logprobs.sum() - 0.1 * stats.kl_prcp.sum() + 0.2 * stats.aug_entropy.sum()
        loss.backward()
    return {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, most=1e-5):
    """To `most` of each weight's largest; some are 0, as of a bias that a softmax undoes."""
    assert ours.keys() == theirs.keys() and len(ours) > 20
    least = 1e-2 * max(grad.abs().max() for grad in theirs.values())
    for name, grad in ours.items():
        scale = theirs[name].abs().max().clamp(min=least)
        worst = (grad - theirs[name]).abs().max() / scale
        assert worst < most, (name, worst)
