"""Between which values each numeric setting makes sense, in one table.

A value outside of them is refused before anything is loaded. What several settings must be to each
other stands in `papo_fast.config_checks`. The fields are found in the dataclasses themselves, so
that a new one without bounds is noticed.
"""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from papo_fast.errors import InputError

_MANY = 10**9
"""More of anything than a run has."""
_POSITIVE = 1e-30

MAX_THREADS = max(256, os.cpu_count() or 1)
"""OpenMP ends the process where it cannot start as many threads as it was asked for."""

# A banned token's logit is -1e4: divided by 10 its probability is still 0 in float32, divided by
# 1000 it is drawn. Below a hundredth, vLLM samples at another temperature than it is asked for.
_TEMPERATURE = (0.01, 10.0)

URL_FORM = "http://HOST:PORT"
"""What a vLLM server's URL looks like."""

BOUNDS: dict[str, tuple[float, float]] = {
    # numpy takes no more, nor less
    "seed": (0, 2**32 - 1),
    "threads": (0, MAX_THREADS),
    "model.lora_rank": (0, 65_536),
    "model.lora_alpha": (0, 1e6),
    "data.max_prompt_length": (1, 10**7),
    "data.min_pixels": (1, 10**8),
    "data.max_pixels": (1, 10**8),
    "corruption.ratio": (0, 1),
    "corruption.noise_std": (0, 1e6),
    "corruption.noise_step": (0, 999),
    "corruption.noise_anneal": (0, 1000),
    "corruption.blur_sigma": (0.1, 1000),
    "rollout.prompts": (1, _MANY),
    # 1 is refused with its reason in config_checks
    "rollout.group_size": (1, 10**6),
    "rollout.temperature": _TEMPERATURE,
    "rollout.max_new_tokens": (1, 10**7),
    "rollout.batch_size": (1, 10**6),
    "rollout.filter_range": (-_MANY, _MANY),
    "rollout.filter_prompts": (1, _MANY),
    "rollout.max_filter_rounds": (1, _MANY),
    "rollout.importance_cap": (0, 1e6),
    "rollout.gpu_memory": (0, 1),
    "rollout.tensor_parallel": (1, 4096),
    "rollout.server_timeout": (1e-3, 1e6),
    "reward.accuracy_weight": (0, 1e6),
    "reward.format_weight": (0, 1e6),
    "reward.timeout": (1e-3, 1e6),
    "reward.workers": (1, 4096),
    "reward.http_timeout": (1e-3, 1e6),
    "reward.http_retries": (0, 1000),
    "reward.http_parallel": (1, 4096),
    "reward.overlong_buffer": (0, 10**7),
    "reward.overlong_coef": (0, 1e6),
    "objective.clip_low": (0, 1),
    "objective.clip_high": (0, 1e6),
    "objective.clip_dual": (1, 1e6),
    "objective.kl_coef": (0, 1e6),
    "objective.kl_prcp_coef": (0, 1e6),
    "objective.kl_prcp_top_p": (0, 1),
    "objective.kl_prcp_clip": (_POSITIVE, 1e6),
    "objective.kl_prcp_anneal_steps": (0, _MANY),
    # an entropy may also be rewarded
    "objective.entropy_coef": (-1e6, 1e6),
    "objective.aug_entropy_coef": (-1e6, 1e6),
    "objective.sft_coef": (0, 1e6),
    "objective.vppo_top_p": (1e-6, 1),
    "objective.vppo_entropy_top_p": (0, 1),
    "objective.vppo_scaling_min": (0, 1),
    # both sides of PGPO's rule divide by their part of [0, 1]
    "objective.pgpo_threshold": (1e-6, 1 - 1e-6),
    "objective.pgpo_boost": (0, 1e6),
    "objective.tor_entropy_share": (0, 1),
    "objective.tor_perception_share": (0, 1),
    "objective.tor_perception_weight": (0, 1e6),
    "objective.tor_nucleus": (1e-6, 1),
    "objective.cgpo_entropy_share": (0, 1),
    "objective.cgpo_perception_share": (0, 1),
    "objective.cgpo_scale": (0, 1),
    "objective.vepo_alpha": (0, 1),
    "objective.vepo_top_p": (1e-6, 1),
    "objective.vepo_lambda": (0, 1e6),
    "objective.dvrp_sensitivity": (0, 1e6),
    "objective.dvrp_robustness": (0, 1e6),
    "objective.dvrp_masked_entropy": (0, 1e6),
    "objective.dvrp_noised_entropy": (0, 1e6),
    "objective.margin_coef": (0, 1e6),
    "objective.margin_bound": (0, 1e6),
    "objective.margin_kl_bound": (0, 1e6),
    "train.lr": (_POSITIVE, 1e6),
    "train.warmup_steps": (0, _MANY),
    "train.weight_decay": (0, 1e6),
    # AdamW divides by 1 - beta
    "train.betas": (0, 1 - 1e-9),
    "train.grad_clip": (_POSITIVE, 1e30),
    "train.update_prompts": (1, _MANY),
    "train.max_tokens": (1, _MANY),
    "train.epochs": (0, _MANY),
    "train.steps": (0, _MANY),
    "train.checkpoint_every": (0, _MANY),
    "train.keep_checkpoints": (1, _MANY),
    "train.max_bad_updates": (1, _MANY),
    "parallel.replicas": (1, 10**6),
    "eval.samples": (1, 10**6),
    "eval.limit": (0, _MANY),
    "eval.temperature": _TEMPERATURE,
    "eval.examples": (0, _MANY),
    "digits.train_questions": (1, 10**7),
    "digits.test_questions": (1, 10**7),
    "digits.warm_accuracy": (0, 1),
    "digits.warm_max_steps": (1, _MANY),
}


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, value) of every setting in a dataclass and those within it."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name], value


def numeric(hint: Any) -> type | None:
    """int or float where a setting's type is one, may be None, or is a tuple of them."""
    if hint in (int, float):
        return hint
    kinds = {numeric(part) for part in get_args(hint) if part not in (type(None), Ellipsis)}
    return kinds.pop() if len(kinds) == 1 and get_origin(hint) is not Literal else None


def check_bounds(config: Any) -> None:
    """Raise `InputError` for a number that is not between its bounds, or a choice of no list."""
    for name, hint, value in leaves(config):
        kind = numeric(hint)
        if kind is not None:
            _check_number(name, kind, hint, value)
            continue
        choices = [
            c
            for part in (hint, *get_args(hint))
            if get_origin(part) is Literal
            for c in get_args(part)
        ]
        if (
            choices
            and value not in choices
            and not (value is None and type(None) in get_args(hint))
        ):
            raise InputError(f"{name} is {value!r}: expected one of {', '.join(map(str, choices))}")


def _check_number(name: str, kind: type, hint: Any, value: Any) -> None:
    if value is None and type(None) in get_args(hint):
        return
    low, high = BOUNDS[name]
    values: Sequence[Any] = value if isinstance(value, tuple | list) else (value,)
    if get_origin(hint) is tuple and len(values) != len(get_args(hint)):
        raise InputError(f"{name} is {value}: expected {len(get_args(hint))} numbers")
    for number in values:
        fits = numbers.Integral if kind is int else numbers.Real
        if isinstance(number, bool) or not isinstance(number, fits):
            expected = "an integer" if kind is int else "a number"
            raise InputError(f"{name} is {value!r}: expected {expected}")
        if not low <= number <= high:  # NaN and infinity are not, either
            raise InputError(f"{name} is {value}: {_expected(low, high)}")


def _expected(low: float, high: float) -> str:
    if low == _POSITIVE:
        return "it must be a positive number"
    if high == _MANY and low != -_MANY:
        return f"it must be at least {low}"
    return f"it must be between {low:g} and {high:g}"


def check_urls(urls: Any) -> None:
    """Raise `InputError` for a server's URL that is not of `URL_FORM`."""
    for url in urls:
        try:
            parts = urlsplit(url)
            fits = (
                parts.scheme == "http"
                and parts.hostname
                and parts.port
                and parts.path in ("", "/")
                and not (parts.query or parts.fragment or "@" in parts.netloc)
                and url.isprintable()
                and not any(c.isspace() for c in url)
            )
        except (ValueError, TypeError, AttributeError):  # a port of letters, a bracket left open
            fits = False
        if not fits:
            raise InputError(
                f"rollout.server_urls: {url!r} is not of the form {URL_FORM}, such as "
                "http://127.0.0.1:8000"
            )
