"""Values of the options of `token_stats`: what is refused, and the extremes of what is not."""

import math

import numpy as np
import pytest
import torch
from kernel_oracle import (
    BACKENDS,
    Oracle,
    check,
    gradient_error,
    make_case,
    random_upstream,
    statistic_errors,
)

from papo_kernels import token_stats

H, W, Y = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 6, 2, -100])
NO_SCALES = [
    1e-40, 1e39, 1e-7, 1e7, 5e-324, 1.8e308, math.nan, math.inf, -1.0, 0, 10**400, -(10**5000),
    True, np.bool_(True), np.float32(1e-40), np.float64(1e39), np.int64(0), "1", 1j,
    np.ones(1), torch.ones(9, 9),
]  # fmt: skip


@pytest.mark.parametrize("name", ["temperature", "softcap"])
@pytest.mark.parametrize("value", NO_SCALES, ids=range(len(NO_SCALES)))
def test_scales_that_overflow_are_refused_in_one_line(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*\[1e-06, 1e\+06\]") as error:
        token_stats(H, W, Y, **{name: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ignore_index", 1 << 63),
        ("ignore_index", -(1 << 63) - 1),
        ("ignore_index", 10**5000),
        ("ignore_index", True),
        ("ignore_index", -100.0),
        ("grad_budget", True),
        ("grad_budget", 10**400),
        ("grad_budget", math.nan),
        ("validate", 1),
        ("validate", "no"),
        ("aug_constant", np.bool_(True)),
    ],
    ids=lambda x: str(x)[:20] if not isinstance(x, int) else "",
)
def test_options_of_the_wrong_kind_are_refused_in_one_line(option, value):
    with pytest.raises(ValueError, match=rf"^{option} is .*; expected ") as error:
        token_stats(H, W, Y, **{option: value})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_numpys_numbers_are_numbers():
    got = token_stats(
        H, W, Y, temperature=np.float32(0.5), softcap=np.int64(3), ignore_index=np.int32(-100),
        grad_budget=np.float16(0.0),
    )  # fmt: skip
    want = token_stats(H, W, Y, temperature=0.5, softcap=3.0, ignore_index=-100, grad_budget=0.0)
    assert torch.equal(got.logprobs, want.logprobs) and torch.equal(got.entropy, want.entropy)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("temperature", "softcap"),
    [(1e-6, None), (1e6, None), (1e-6, 1e-6), (1e6, 1e6), (1e-6, 1e6), (1e6, 1e-6)],
)
def test_the_extreme_scales_keep_the_contract(backend, temperature, softcap):
    case = make_case(40, 16, 601, seed=12, temperature=temperature, softcap=softcap)
    size = temperature if softcap is None else min(temperature, softcap)
    case.hidden, case.aug_hidden = case.hidden * size, case.aug_hidden * size
    check(statistic_errors(case, token_stats, backend=backend), 1e-5)
    upstream = random_upstream(case)
    got = case.gradients(token_stats, upstream, backend=backend, grad_budget=0.0)
    exact = Oracle(case).gradients(upstream)
    check({g: gradient_error(got[g], exact[g]) for g in got}, 2e-5)
