"""Every setting has bounds, and a value outside of them is one line before anything is loaded."""

import dataclasses
import math

import pytest
import torch

from papo_fast.config import Config
from papo_fast.config_checks import check
from papo_fast.errors import InputError
from papo_fast.model.policy import BANNED_LOGIT
from papo_fast.presets import PRESETS
from papo_fast.setting_bounds import BOUNDS, MAX_THREADS, check_urls, leaves, numeric

TINY = PRESETS["tiny"][1]
NUMBERS = {name: hint for name, hint, _ in leaves(Config()) if numeric(hint)}


def with_setting(name, value, config=TINY):
    *groups, field = name.split(".")
    if groups:
        inner = dataclasses.replace(getattr(config, groups[0]), **{field: value})
        return dataclasses.replace(config, **{groups[0]: inner})
    return dataclasses.replace(config, **{field: value})


def refusal(name, value):
    with pytest.raises(InputError) as caught:
        check(with_setting(name, value))
    message = str(caught.value)
    assert name in message and "\n" not in message
    return message


def values_like(name, value):
    """`value` itself, or in each place of a pair."""
    pair = {n: v for n, _, v in leaves(Config())}[name]
    if isinstance(pair, tuple):
        return [(value, pair[1]), (pair[0], value)]
    return [value]


def test_every_numeric_setting_has_bounds_and_every_bound_a_setting():
    assert set(NUMBERS) == set(BOUNDS)


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_not_a_number_and_infinities_are_refused(name):
    for wrong in (math.nan, math.inf, -math.inf):
        for value in values_like(name, wrong):
            refusal(name, value)


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_numbers_beyond_the_bounds_and_other_types_are_refused(name):
    low, high = BOUNDS[name]
    step = 1 if numeric(NUMBERS[name]) is int else 1e-31 + abs(low) / 2
    beyond = type(step)(low - step), type(step)(high * 2)
    for wrong in (*beyond, "3", True):
        for value in values_like(name, wrong):
            refusal(name, value)


def test_a_negative_number_is_allowed_for_entropies_and_the_filter_alone():
    assert sorted(name for name, (low, _) in BOUNDS.items() if low < 0) == [
        "objective.aug_entropy_coef",
        "objective.entropy_coef",
        "rollout.filter_range",
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_within_the_bounds(preset):
    config = with_setting("model.path", "x", with_setting("data.train", "y", PRESETS[preset][1]))
    check(config)


def test_so_many_threads_that_torch_would_crash_are_refused():
    check(with_setting("threads", MAX_THREADS))
    assert "threads is 1000000" in refusal("threads", 1_000_000)


@pytest.mark.parametrize("name", ["rollout.temperature", "eval.temperature"])
def test_no_temperature_allows_a_banned_token(name):
    low, high = BOUNDS[name]
    for temperature in (low, high):
        check(with_setting(name, temperature))
        # the banned token is the likeliest by far without its ban
        logits = torch.tensor([0.0, 100.0 + BANNED_LOGIT, 0.0]) / temperature
        probabilities = logits.softmax(0)
        assert probabilities[1] == 0 and torch.isfinite(probabilities).all()
    assert f"{name} is 1000.0" in refusal(name, 1000.0)


def test_pixel_limits_in_the_wrong_order_are_refused_at_the_door():
    config = with_setting("data.max_pixels", 9, with_setting("data.min_pixels", 10))
    with pytest.raises(InputError, match=r"min_pixels = 10, data.max_pixels = 9"):
        check(config)


def test_an_unknown_choice_is_refused_with_the_choices():
    assert "one of hf, vllm, vllm_server" in refusal("rollout.engine", "sglang")
    refusal("objective.average", "median")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8000",
        "http://127.0.0.1",
        "http://:8000",
        "http://host:port",
        "http://host:99999",
        "http://host:-1",
        "http://host:0",
        "http://[::1:8000",
        "https://host:8000",
        "ftp://host:8000",
        "http://host:8000/v1",
        "http://host:8000?x=1",
        "http://me:word@host:8000",
        "http://ho st:8000",
        "http://host:8000\nHost: other",
    ],
)
def test_a_malformed_server_url_is_refused(url):
    message = refusal("rollout.server_urls", ("http://127.0.0.1:8000", url))
    assert "http://HOST:PORT" in message


def test_servers_by_name_and_by_either_protocol_of_the_internet_are_taken():
    check_urls(("http://127.0.0.1:8000", "http://[::1]:8001/", "http://gpu-3.cluster:80"))
