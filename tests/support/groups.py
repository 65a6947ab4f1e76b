"""Groups without a sampler, and a policy to look at them: what a test has made itself."""

from __future__ import annotations

import torch

from papo_fast.config import DataConfig, ModelConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.prompts import Prompt
from papo_fast.model.policy import Policy
from papo_fast.samples import Completion, Group, Sample
from support.family_checkpoints import write_checkpoint

# Pictures of 4 to 16 tokens, and a prompt that is the question alone.
DATA = DataConfig(prompt_suffix="", min_pixels=56 * 56, max_pixels=112 * 112)


def load_policy(folder, family):
    """A float32 policy of random weights, written into `folder`, and its encoder."""
    path = write_checkpoint(folder, family)
    encoder = PromptEncoder(path, DATA)
    config = ModelConfig(path=str(path), dtype="float32", gradient_checkpointing=False)
    return Policy.load(config, encoder.banned_token_ids, torch.device("cpu")), encoder


def as_prompt(encoded, index=0):
    return Prompt(index, "", "", "", [], encoded)


def group_of(encoded, responses, aug_pixels=None):
    """A group of these responses, each a list of token ids, without scores."""
    samples = [Sample(Completion(list(r), [-1.0] * len(r), True)) for r in responses]
    return Group(as_prompt(encoded), samples, aug_pixels)


def token_ids(group):
    return [sample.completion.token_ids for sample in group.samples]
