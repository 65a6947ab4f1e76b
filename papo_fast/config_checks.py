"""The door: what a configuration must be, and the fields that follow others filled in."""

from __future__ import annotations

import dataclasses
import importlib.util

from papo_fast.config import Config, ObjectiveConfig
from papo_fast.corruption_settings import check_corruption
from papo_fast.errors import InputError
from papo_fast.reward_settings import check_rewards
from papo_fast.setting_bounds import check_bounds, check_urls
from papo_fast.term_settings import OF_AUG, OF_REFERENCE, own_terms
from papo_fast.user_function import forget_files
from papo_fast.weight_settings import WEIGHT_NAMES, load_weight


def resolve(config: Config) -> Config:
    """The configuration that a command runs: checked, and with no field left to follow another.

    Raises `InputError`, naming the field and what it should be, before anything is loaded.
    """
    forget_files()
    check(config)
    return dataclasses.replace(config, objective=config.objective.resolved())


def check(config: Config) -> None:
    """Raise `InputError`, naming the field and what it should be."""
    rollout, objective, train = config.rollout, config.objective, config.train
    check_bounds(config)
    check_urls(rollout.server_urls)
    if rollout.group_size < 2:
        raise InputError(
            f"rollout.group_size is {rollout.group_size}: group-relative advantages compare "
            "the responses of one prompt, so it must be at least 2"
        )
    data = config.data
    if data.min_pixels > data.max_pixels:
        raise InputError(
            f"data.min_pixels = {data.min_pixels}, data.max_pixels = {data.max_pixels}: "
            "expected 0 < min_pixels <= max_pixels"
        )
    most = rollout.filter_prompts * rollout.max_filter_rounds
    if rollout.dynamic_filter and most < rollout.prompts:
        raise InputError(
            f"rollout.max_filter_rounds = {rollout.max_filter_rounds} rounds of "
            f"rollout.filter_prompts = {rollout.filter_prompts} are fewer than rollout.prompts "
            f"= {rollout.prompts}: raise either"
        )
    if rollout.gpu_memory == 0:
        raise InputError(f"rollout.gpu_memory is {rollout.gpu_memory}: expected a share in (0, 1]")
    if 0 < rollout.importance_cap < 1:
        raise InputError(
            f"rollout.importance_cap is {rollout.importance_cap}: expected at least 1, or 0"
        )
    if rollout.overlap:
        check_overlap(config)
    if rollout.server_transfer != "disk":
        check_transfer(config)
    if rollout.prompts % train.update_prompts:
        raise InputError(
            f"rollout.prompts ({rollout.prompts}) must be a multiple of train.update_prompts "
            f"({train.update_prompts}): every update takes the same number of prompts"
        )
    if config.resume and config.overwrite:
        raise InputError("--resume continues a run and --overwrite deletes it: pass one of them")
    check_corruption(config.corruption)
    check_rewards(config.reward)
    if config.reward.overlong_buffer > rollout.max_new_tokens:
        raise InputError(
            f"reward.overlong_buffer is {config.reward.overlong_buffer}: expected at most "
            f"rollout.max_new_tokens = {rollout.max_new_tokens}"
        )
    check_memory(config)
    check_objective(objective)
    second = config.corruption.second
    if objective.needs_second and not second:
        raise InputError(
            "corruption.second is empty, but objective.dvrp_*, objective.margin_coef or one of "
            "objective.terms compares two corrupted views: name the second one, such as diffusion"
        )
    if second and not objective.needs_second:
        raise InputError(
            f"corruption.second is {second!r}, but no term looks at a second view: set "
            "objective.dvrp_robustness or objective.margin_coef"
        )
    low, high = rollout.filter_range
    if not low < high:
        raise InputError(f"rollout.filter_range is ({low}, {high}): expected low < high")
    if not config.digits.enabled:
        if not config.model.path:
            raise InputError("model.path is empty: pass --model.path, a folder or a hub name")
        if not config.data.train:
            raise InputError("data.train is empty: pass --data.train FILE (.parquet or .jsonl)")


def check_overlap(config: Config) -> None:
    """Raise `InputError` where nothing else samples, or nothing corrects for its older weights."""
    if config.rollout.engine != "vllm_server":
        raise InputError(
            f"rollout.overlap is on, but rollout.engine is {config.rollout.engine}, which samples "
            "in the process that trains: set rollout.engine to vllm_server"
        )
    if not config.corrects_for_sampler:
        why = (
            "the authors' objective (objective.parity official) has none"
            if config.objective.parity == "official"
            else "rollout.importance_cap is 0"
        )
        raise InputError(
            "rollout.overlap samples with weights of one step before, which importance weights "
            f"correct for, and {why}: set rollout.old_logprobs to sampler, so that the policy "
            "ratio is taken to what the sampler reported"
        )


def check_transfer(config: Config) -> None:
    """Raise `InputError` where weights cannot go from GPU to GPU."""
    rollout = config.rollout
    setting = f"rollout.server_transfer is {rollout.server_transfer}"
    if rollout.engine != "vllm_server":
        raise InputError(
            f"{setting}, which is a way to vLLM servers, but rollout.engine is {rollout.engine}: "
            "set it to vllm_server"
        )
    check_transfer_device(config, config.device.partition(":")[0])
    servers, gpus = len(rollout.server_urls), rollout.tensor_parallel
    if rollout.server_transfer == "ipc" and (servers > 1 or gpus > 1):
        raise InputError(
            f"{setting}, which is for one server on one GPU, but rollout.server_urls names "
            f"{servers} and rollout.tensor_parallel is {gpus}: take nccl"
        )


def check_transfer_device(config: Config, kind: str) -> None:
    """Raise `InputError` where weights should go from GPU to GPU and there is none.

    Args:
        kind: of the device on which the policy is, such as cuda.
    """
    if config.rollout.server_transfer != "disk" and kind == "cpu":
        raise InputError(
            f"rollout.server_transfer is {config.rollout.server_transfer}, which sends weights "
            "from GPU to GPU, but the policy is on the CPU: take disk"
        )


def check_memory(config: Config) -> None:
    """Raise `InputError` where options that save memory do not go together."""
    model, train, parallel = config.model, config.train, config.parallel
    halves = model.weights_dtype == "bfloat16"
    if halves and model.dtype != "bfloat16":
        raise InputError(
            "model.weights_dtype is bfloat16, but model.dtype is float32: weights that are kept in "
            "bfloat16 are computed with in bfloat16 too"
        )
    if halves and model.lora_rank:
        raise InputError(
            "model.weights_dtype is bfloat16, but model.lora_rank trains adapters alone: they stay "
            "in float32, and the frozen weights are in model.dtype already"
        )
    if train.master_weights and not halves:
        raise InputError(
            "train.master_weights is on, but model.weights_dtype is float32: the weights are what "
            "a float32 copy would be"
        )
    if model.quantize != "none" and not model.lora_rank:
        raise InputError(
            f"model.quantize is {model.quantize}, but weights in 4 bits cannot be trained: set "
            "model.lora_rank, whose adapters are"
        )
    if parallel.offload_activations and not model.gradient_checkpointing:
        raise InputError(
            "parallel.offload_activations moves what gradient checkpointing stores: set "
            "model.gradient_checkpointing"
        )
    if parallel.offload and parallel.offload_optimizer:
        raise InputError(
            "parallel.offload moves the optimizer's state too: leave out parallel.offload_optimizer"
        )
    if parallel.offload and halves:
        raise InputError(
            "parallel.offload shards the model, and FSDP adds up gradients of micro-batches in the "
            "dtype of its shards: set model.weights_dtype to float32"
        )


def check_processes(config: Config, processes: int) -> None:
    """Raise `InputError` for options that are for a single process alone."""
    if processes == 1:
        return
    if config.rollout.server_transfer == "ipc":
        raise InputError(
            "rollout.server_transfer is ipc, by which a server reads the memory of a single "
            f"process, but there are {processes}: take nccl"
        )
    if config.model.weights_dtype == "bfloat16":
        raise InputError(
            f"model.weights_dtype is bfloat16, but there are {processes} processes: FSDP would add "
            "up gradients of micro-batches in bfloat16; leave it at float32, of which each "
            "process holds a part"
        )
    if config.parallel.offload_optimizer:
        raise InputError(
            f"parallel.offload_optimizer is for a single process, but there are {processes}: set "
            "parallel.offload"
        )


def check_libraries(config: Config) -> None:
    """Raise `InputError`, with the command that installs it, for an option whose library is
    missing. A plan needs none of them."""
    model, train = config.model, config.train
    for setting, asked, library, extra in (
        (f"model.lora_rank {model.lora_rank}", model.lora_rank > 0, "peft", "lora"),
        (f"model.quantize {model.quantize}", model.quantize == "nf4", "bitsandbytes", "quant"),
        (
            f"train.optimizer {train.optimizer}",
            train.optimizer == "adamw_8bit",
            "bitsandbytes",
            "quant",
        ),
    ):
        if asked and importlib.util.find_spec(library) is None:
            raise InputError(f"{setting} needs {library}: pip install -e '.[{extra}]'")


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
            "objective.kl_prcp_estimator to exact, or objective.kl_prcp_direction to forward"
        )
    if terms.weighs_on != "none":
        _check_weights(terms)
    _check_terms(terms)


def _check_terms(objective: ObjectiveConfig) -> None:
    """Whether the vectors that the user's terms need will be there."""
    kl = "ref_kl" if objective.kl_estimator == "exact" else "ref_logprobs"
    for term in own_terms(objective.terms):
        for name in term.needs:
            if name in OF_REFERENCE and (not objective.needs_reference or name != kl):
                have = f"has {kl}" if objective.needs_reference else "loads no reference model"
                raise InputError(
                    f"objective.terms: {term.name} needs {name}, but the run {have}: set "
                    "objective.kl_coef above 0 and objective.kl_estimator to "
                    f"{'exact' if name == 'ref_kl' else 'sampled'}"
                )
            stored = objective.aug_stream == "stored"
            if name in OF_AUG and stored and name != "aug_logprobs":
                raise InputError(
                    f"objective.terms: {term.name} needs {name}, but objective.aug stored keeps "
                    "log-probs of the sampled tokens alone: take frozen or trained"
                )


def _check_weights(objective: ObjectiveConfig) -> None:
    names, current = objective.weight_names, objective.weighs_on == "current"
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"objective.token_weights names {name} twice")
        if name in WEIGHT_NAMES:
            continue
        if ":" not in name:
            raise InputError(
                f"objective.token_weights: {name!r} is neither {', '.join(WEIGHT_NAMES)} nor "
                "FILE.py:name"
            )
        _, needs = load_weight(name)
        if needs and current:
            raise InputError(
                f"objective.dependency_of is current, but {needs[0]}, which {name} needs, is "
                "measured after sampling alone: take rollout"
            )
    if "vepo" in names and current and objective.vepo_score != "H":
        raise InputError(
            "objective.dependency_of is current, but the divergence that vepo needs is measured "
            "after sampling alone: take rollout, or objective.vepo_score H"
        )
    if "tor" in names and current and objective.tor_nucleus != 1:
        raise InputError(
            f"objective.tor_nucleus is {objective.tor_nucleus}, but that entropy is measured after "
            "sampling alone: with objective.dependency_of current it must be 1"
        )
    if current and objective.aug_stream == "stored" and objective.dependency == "exact":
        raise InputError(
            "objective.dependency is exact, but objective.aug stored keeps log-probs of the "
            "sampled tokens alone: take frozen, or objective.dependency_of rollout"
        )


def steps_of_epochs(config: Config, rows: int) -> int:
    """Steps that `train.epochs` passes over so many rows make.

    Raises `InputError` where they are none.
    """
    steps = config.train.epochs * rows // config.rollout.prompts
    if steps < 1:
        raise InputError(
            f"data.train has {rows} rows, fewer in {config.train.epochs} epoch(s) than "
            f"rollout.prompts = {config.rollout.prompts}: lower it, or set train.steps"
        )
    return steps
