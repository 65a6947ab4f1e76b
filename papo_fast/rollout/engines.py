"""The engine that a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from papo_fast.config import Config
from papo_fast.data.corruption import PromptCorruption
from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.plain_encoder import PlainEncoder
from papo_fast.errors import InputError
from papo_fast.model.policy import Policy
from papo_fast.rollout.hf import HFRollout
from papo_fast.rollout.plain import PlainRollout
from papo_fast.rollout.protocol import RolloutEngine

_EXPERTS = "on the CPU its experts compute something else once they are given new weights"
NOT_ON_CPU = {
    "gemma3": "on the CPU its attention lets no token of a picture see those behind it, as the "
    "model's does",
    "qwen3_vl_moe": _EXPERTS,
    "qwen3_5_moe": _EXPERTS,
    "glm4v_moe": _EXPERTS,
}
"""Family → why the CPU build of vLLM 0.32 is refused."""


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
    if config.rollout.engine != "hf":
        _check_for_vllm(config, policy, encoder)
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


def _check_for_vllm(config: Config, policy: Policy, encoder: PromptEncoder) -> None:
    """Raise `InputError` where vLLM would not sample from the policy, or not in all of the run."""
    engine, family = config.rollout.engine, policy.model.config.model_type
    why_not = ""
    if policy.device.type == "cpu":
        why_not = NOT_ON_CPU.get(family, "")
        # vLLM 0.32 packs a head's weight there, and does so again for a weight of its own alone
        if not any("lm_head" in name for name, _ in policy.model.named_parameters()):
            why_not = why_not or (
                "on the CPU it keeps the old head where this is the embedding's weight too "
                "(tie_word_embeddings)"
            )
    if why_not:
        raise InputError(
            f"rollout.engine is {engine}, which cannot sample for this {family!r} model: "
            f"{why_not}. Pass --rollout.engine hf"
        )
    samples_corrupted = config.eval.corrupted and config.data.test
    if encoder.tiles is None or not samples_corrupted:
        return
    if not PromptCorruption(config.corruption, encoder).takes_pictures:
        raise InputError(
            f"corruption.kind is {config.corruption.kind}, which changes the tiles that the image "
            f"processor of a {family!r} model writes, and rollout.engine {engine} is given whole "
            "pictures: the evaluation with corrupted pictures cannot be sampled. Pass "
            "--eval.no-corrupted to leave it out, --corruption.kind official or diffusion, or "
            "--rollout.engine hf"
        )
