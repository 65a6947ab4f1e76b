"""The engine that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from papo_fast.config import Config
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.plain_encoder import PlainEncoder
from papo_fast.errors import InputError
from papo_fast.model.policy import Policy
from papo_fast.rollout.hf import HFRollout
from papo_fast.rollout.plain import PlainRollout
from papo_fast.rollout.protocol import RolloutEngine

_GLM = "given a picture, vLLM's log-probs of a small model were nats away from the trainer's"
NOT_BY_VLLM = {"glm4v": _GLM, "glm4v_moe": _GLM}
"""Family → why vLLM is refused, beside those whose pictures are tiles."""


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
    engine, family = engine_class(config.rollout.engine), policy.model.config.model_type
    why_not = "its pictures are tiles, and vLLM gets pictures put together again from patches"
    if encoder.tiles is None:
        why_not = NOT_BY_VLLM.get(family, "")
    if config.rollout.engine != "hf" and why_not:
        raise InputError(
            f"rollout.engine is {config.rollout.engine}, which cannot sample for {family!r} "
            f"models: {why_not}. Pass --rollout.engine hf"
        )
    if config.rollout.engine == "vllm":
        return engine(config, encoder, policy.device)
    if config.rollout.engine == "vllm_server":
        return engine(config, encoder, run_dir)
    sampler = policy
    if policy.is_sharded:  # transformers' generate needs whole weights
        sampler = type(policy).load(config.model, encoder.banned_token_ids, policy.device)
        sampler.requires_grad_(False)
    if isinstance(encoder, PlainEncoder):
        engine = PlainRollout
    return engine(sampler, encoder.eos_token_ids, encoder.pad_token_id, config.rollout.batch_size)
