"""The engine that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from papo_fast.config import Config
from papo_fast.data.encoder import PromptEncoder
from papo_fast.model.policy import Policy
from papo_fast.rollout.hf import HFRollout
from papo_fast.rollout.protocol import RolloutEngine


def engine_class(name: str) -> type[RolloutEngine]:
    """The class of a `rollout.engine`; vLLM itself is imported only where one is made."""
    if name == "vllm":
        from papo_fast.rollout.vllm import VLLMRollout

        return VLLMRollout
    if name == "vllm_server":
        from papo_fast.rollout.vllm_server import VLLMServerRollout

        return VLLMServerRollout
    return HFRollout


def make_engine(
    config: Config, policy: Policy, encoder: PromptEncoder, run_dir: Path
) -> RolloutEngine:
    """`rollout.engine` for this rank. Every rank makes its own, at the same time."""
    engine = engine_class(config.rollout.engine)
    if config.rollout.engine == "vllm":
        return engine(config, encoder, policy.device)
    if config.rollout.engine == "vllm_server":
        return engine(config, encoder, run_dir)
    sampler = policy
    if policy.is_sharded:  # transformers' generate needs whole weights
        sampler = Policy.load(config.model, encoder.banned_token_ids, policy.device)
        sampler.requires_grad_(False)
    return engine(sampler, encoder.eos_token_ids, encoder.pad_token_id, config.rollout.batch_size)
