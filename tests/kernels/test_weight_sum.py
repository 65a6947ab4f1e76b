"""The Triton backward's sum of a bfloat16 weight's gradient, which has 24 bits."""

import pytest
import torch
from kernel_oracle import FAST, policy_case, random_upstream

from papo_kernels import record_certificates, rows, token_stats

if FAST != "triton":
    pytest.skip("only the Triton backend sums in 24 bits", allow_module_level=True)

from papo_kernels.triton import backward, groups, lists, words


class Sum:
    """A sum of (R, D) numbers in 24 bits, as `words.GradientSum` has one."""

    def __init__(self, shape):
        self.high = torch.zeros(shape, dtype=torch.bfloat16)
        self.rest = torch.zeros(shape, dtype=torch.int8)

    def add(self, x):
        at = torch.arange(len(x), dtype=torch.int32)
        words._add_rows(self.high.view(torch.int16), self.rest, x, at, True)

    def value(self):
        """What the 24 bits say, in float64."""
        bits = self.high.view(torch.int16).int() * 65536 + self.rest.int() * 256
        return bits.view(torch.float32).double()


def test_a_sum_is_the_nearest_bfloat16_and_remembers_eight_bits_more():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(7, 300, generator=g) * 2.0 ** torch.randint(-60, 60, (7, 300), generator=g)
    x[:, :4] = torch.tensor([0.0, -0.0, 1e-39, -3e38])
    total = Sum(x.shape)
    total.add(x)
    away = (total.value() - x.double()).abs()
    print(f"  lost {(away / x.double().abs().clamp_min(1e-37)).max():.2e} of a number")
    assert (away <= x.double().abs() * 2**-16 + 2.0**-141).all()
    ulp = x.abs() * 2**-7  # at most
    assert ((total.high.double() - x.double()).abs() <= ulp * (0.5 + 2**-8) + 2.0**-133).all()
    # Rounding carries into the exponent, and a half goes up.
    edges = torch.tensor([[1.9999999, -1.9999999, 255.99998, 1.00390625]])
    total = Sum(edges.shape)
    total.add(edges)
    assert total.high.tolist() == [[2.0, -2.0, 256.0, 1.0078125]]


def test_what_is_no_number_stays_none():
    bits = [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x7F800000, -0x800000]
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    total = Sum(x.shape)
    total.add(x)
    assert total.high[0, :4].isnan().all()
    assert total.high[0, 4:].tolist() == [torch.inf, -torch.inf]
    total.add(torch.ones_like(x))
    assert total.high[0, :4].isnan().all()


def test_small_terms_add_up_beside_a_large_one():
    """In bfloat16 itself, 300 times a 500th of the sum adds nothing."""
    total, naive = Sum((1, 64)), torch.ones(1, 64, dtype=torch.bfloat16)
    total.add(torch.ones(1, 64))
    term = torch.full((1, 64), 1 / 700)
    for _ in range(300):
        total.add(term)
        naive += term.bfloat16()
    exact = 1 + 300 / 700
    assert (naive.double() == 1).all()
    assert (total.value() - exact).abs().max() < 300 * 2**-16


@pytest.mark.parametrize("way", ["lists", "groups", "dense", "dense after groups"])
def test_the_weights_gradient_is_that_in_float32_rounded_once(way, monkeypatch):
    """Whatever adds to it: words of lists, columns, groups, or all words."""
    monkeypatch.setattr(groups, "GROUP_ROWS", 32)
    monkeypatch.setattr(backward, "DENSE_ROWS", 48)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 48 * 1000)
    if way == "lists":
        monkeypatch.setattr(lists, "MOST_WORDS", 4096)
        monkeypatch.setattr(lists, "SPARSITY", 4)
        monkeypatch.setattr(lists, "ROW_SPARSITY", 2)
    if way == "dense after groups":
        monkeypatch.setattr(groups, "ASSUMED_TIGHTNESS", 1e-7)
        monkeypatch.setattr(groups, "ATTEMPTS", 1)
    case = policy_case(139, 2048, sharpness=36.0)
    case.weight = case.weight.bfloat16().float()
    budget = 0.0 if way == "dense" else 3e-3
    options = dict(backend="triton", grad_budget=budget)
    upstream = random_upstream(case)
    exact = case.gradients(token_stats, upstream, ("weight",), **options)["weight"]
    case.weight = case.weight.bfloat16()
    with record_certificates() as found:
        got = case.gradients(token_stats, upstream, ("weight",), **options)["weight"]
    print(f"  kept {found.kept:.3f}, {found.dense_rows} rows dense")
    assert (found.kept < 0.02) == (way == "lists") and (found.dense_rows > 0) == ("dense" in way)
    assert got.dtype == torch.bfloat16
    error = (got.double() - exact.double()).norm() / exact.double().norm()
    rounding = (exact.bfloat16().double() - exact.double()).norm() / exact.double().norm()
    print(f"  {way}: {error:.3e}, and {rounding:.3e} by rounding alone")
    assert error < 1.01 * rounding
    same = (got == exact.bfloat16()).double().mean().item()
    print(f"  {same:.4f} of the elements are the nearest")
    assert same > 0.98
