"""The door: what a configuration must be, and the fields that follow others filled in."""

from __future__ import annotations

import dataclasses
import math

from papo_fast.config import Config, ObjectiveConfig
from papo_fast.errors import InputError


def resolve(config: Config) -> Config:
    """The configuration that a command runs: checked, and with no field left to follow another.

    Raises `InputError`, naming the field and what it should be, before anything is loaded.
    """
    check(config)
    return dataclasses.replace(config, objective=config.objective.resolved())


def check(config: Config) -> None:
    """Raise `InputError`, naming the field and what it should be."""
    rollout, objective, train = config.rollout, config.objective, config.train
    if rollout.group_size < 2:
        raise InputError(
            f"rollout.group_size is {rollout.group_size}: group-relative advantages compare "
            "the responses of one prompt, so it must be at least 2"
        )
    for name, value in (
        ("rollout.prompts", rollout.prompts),
        ("rollout.max_new_tokens", rollout.max_new_tokens),
        ("rollout.batch_size", rollout.batch_size),
        ("rollout.tensor_parallel", rollout.tensor_parallel),
        ("train.update_prompts", train.update_prompts),
        ("train.max_tokens", train.max_tokens),
        ("train.keep_checkpoints", train.keep_checkpoints),
        ("parallel.replicas", config.parallel.replicas),
        ("eval.samples", config.eval.samples),
        ("reward.workers", config.reward.workers),
        ("data.max_prompt_length", config.data.max_prompt_length),
    ):
        if value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    if config.model.lora_rank < 0 or config.model.lora_alpha < 0:
        raise InputError(
            f"model.lora_rank = {config.model.lora_rank}, lora_alpha = {config.model.lora_alpha}: "
            "they must be at least 0"
        )
    for name, value in (
        ("rollout.temperature", rollout.temperature),
        ("eval.temperature", config.eval.temperature),
        ("rollout.server_timeout", rollout.server_timeout),
        ("reward.timeout", config.reward.timeout),
        ("train.lr", train.lr),
        ("train.grad_clip", train.grad_clip),
    ):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{name} is {value}: it must be a positive number")
    most = rollout.filter_prompts * rollout.max_filter_rounds
    if rollout.dynamic_filter and most < rollout.prompts:
        raise InputError(
            f"rollout.max_filter_rounds = {rollout.max_filter_rounds} rounds of "
            f"rollout.filter_prompts = {rollout.filter_prompts} are fewer than rollout.prompts "
            f"= {rollout.prompts}: raise either"
        )
    if not 0 < rollout.gpu_memory <= 1:
        raise InputError(f"rollout.gpu_memory is {rollout.gpu_memory}: expected a share in (0, 1]")
    if rollout.importance_cap < 0 or 0 < rollout.importance_cap < 1:
        raise InputError(
            f"rollout.importance_cap is {rollout.importance_cap}: expected at least 1, or 0"
        )
    if rollout.prompts % train.update_prompts:
        raise InputError(
            f"rollout.prompts ({rollout.prompts}) must be a multiple of train.update_prompts "
            f"({train.update_prompts}): every update takes the same number of prompts"
        )
    if config.resume and config.overwrite:
        raise InputError("--resume continues a run and --overwrite deletes it: pass one of them")
    if not 0 <= config.corruption.ratio <= 1:
        raise InputError(
            f"corruption.ratio is {config.corruption.ratio}: it must be between 0 and 1"
        )
    check_objective(objective)
    low, high = rollout.filter_range
    if not low < high:
        raise InputError(f"rollout.filter_range is ({low}, {high}): expected low < high")
    if not config.digits.enabled:
        if not config.model.path:
            raise InputError("model.path is empty: pass --model.path DIR, a local checkpoint")
        if not config.data.train:
            raise InputError("data.train is empty: pass --data.train FILE (.parquet or .jsonl)")


def check_objective(objective: ObjectiveConfig) -> None:
    """Raise `InputError` where coefficients are out of range or fields do not go together."""
    if not 0 <= objective.clip_low < 1 or objective.clip_high < 0:
        raise InputError(
            f"objective.clip_low = {objective.clip_low}, clip_high = {objective.clip_high}: "
            "expected 0 <= clip_low < 1 and clip_high >= 0"
        )
    if objective.clip_dual is not None and objective.clip_dual <= 1:
        raise InputError(f"objective.clip_dual is {objective.clip_dual}: it must be above 1")
    if objective.kl_prcp_top_p is not None and not 0 < objective.kl_prcp_top_p <= 1:
        raise InputError(
            f"objective.kl_prcp_top_p is {objective.kl_prcp_top_p}: expected a share in (0, 1]"
        )
    terms = objective.resolved()
    exact = "exact" in (terms.kl_prcp_estimator, terms.entropy_estimator)
    if terms.aug == "stored" and exact:
        raise InputError(
            "objective.aug is stored, which keeps log-probs of the sampled tokens alone, but exact "
            "terms need the corrupted stream's whole distribution: take frozen, or set "
            "objective.kl_prcp_estimator and objective.entropy_estimator to sampled"
        )
    if terms.kl_prcp_direction == "reverse" and terms.kl_prcp_estimator != "exact":
        raise InputError(
            "objective.kl_prcp_direction is reverse, which exists as an exact term only: set "
            "objective.kl_prcp_estimator to exact"
        )
