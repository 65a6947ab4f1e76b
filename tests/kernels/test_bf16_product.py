"""Products of bfloat16 matrices on the CPU in float32: exact operands, no rounding of results."""

import logging

import pytest
import torch
from kernel_oracle import OUTPUTS, check, make_case, random_upstream

from papo_kernels import bf16_product, token_stats

needs_bf16 = pytest.mark.skipif(
    bf16_product._library() is None, reason="no CPU that multiplies bfloat16, or no compiler"
)


def operands(n, v, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, d, generator=g).bfloat16() for rows in (n, v))
    return x, w, torch.full((n, v), torch.nan)


@needs_bf16
@pytest.mark.parametrize(
    "n,v,d", [(1, 1, 1), (3, 31, 7), (13, 33, 257), (40, 96, 576), (25, 301, 1025), (0, 5, 8)]
)
def test_products_are_as_near_to_float64_as_float32_ones(n, v, d):
    x, w, z = operands(n, v, d)
    room = torch.full((n, v + 5), torch.nan)
    assert bf16_product.product(x, w, z) and bf16_product.product(x, w, room[:, :v])
    exact = x.double() @ w.double().T
    allowed = 2e-6 * x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)
    assert ((z - exact).abs() <= allowed).all()
    assert torch.equal(room[:, :v], z) and room[:, v:].isnan().all()


@needs_bf16
def test_threads_and_strides_change_nothing(monkeypatch):
    x, w, z = operands(24, 515, 65)
    bf16_product.product(x, w, z)
    padded = torch.full((515, 80), torch.nan, dtype=torch.bfloat16)
    padded[:, :65] = w
    other = torch.full_like(z, torch.nan)
    monkeypatch.setattr(bf16_product, "THREAD_WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    bf16_product.product(x.T.contiguous().T, padded[:, :65], other)
    assert torch.equal(other, z)


@needs_bf16
def test_a_nan_stays_in_its_row_and_column():
    x, w, z = operands(15, 40, 33)
    x[7, 32], w[9, 0] = torch.nan, torch.inf
    bf16_product.product(x, w, z)
    touched = torch.zeros_like(z, dtype=torch.bool)
    touched[7], touched[:, 9] = True, True
    assert torch.equal(z.isfinite(), ~touched) and z[7].isnan().all()


@pytest.mark.parametrize("change", ["float32 x", "float16 out", "columns of weight apart"])
def test_other_operands_are_refused_and_out_is_left_alone(change):
    x, w, z = operands(4, 6, 8)
    if change == "float32 x":
        x = x.float()
    elif change == "float16 out":
        z = z.half()
    else:
        w = w.T.contiguous().T
    assert not bf16_product.product(x, w, z)
    assert z.isnan().all()


def without_the_library(monkeypatch):
    monkeypatch.setattr(bf16_product, "_library", lambda: None)


def test_results_are_those_of_upcast_operands(monkeypatch):
    case = make_case(50, 72, 1003, dtype=torch.bfloat16, bias=True, softcap=20.0)
    upstream = random_upstream(case)
    fast = case.call(token_stats, backend="torch")
    gradients = case.gradients(token_stats, upstream, backend="torch")
    without_the_library(monkeypatch)
    plain = case.call(token_stats, backend="torch")
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=1e-5, atol=1e-5)
    exact = case.gradients(token_stats, upstream, backend="torch")
    errors = {
        g: ((gradients[g] - x).double().norm() / x.double().norm()).item() for g, x in exact.items()
    }
    # Gradients are bfloat16: a few fall on the other side of a rounding.
    check(errors, 2e-3)


def test_a_compiler_that_fails_is_reported_and_float32_runs(monkeypatch, caplog):
    if bf16_product._library() is None:
        pytest.skip("no CPU that multiplies bfloat16, or no compiler")
    monkeypatch.setattr(bf16_product, "_library", bf16_product._library.__wrapped__)
    monkeypatch.setattr(bf16_product, "SOURCE", "this is not C++")
    x, w, z = operands(4, 6, 8)
    with caplog.at_level(logging.WARNING, logger="papo_kernels"):
        assert not bf16_product.product(x, w, z)
    assert "half the speed" in caplog.text and "error" in caplog.text
