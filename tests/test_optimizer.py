"""The optimizer's ways to keep weights and moments: what they change of the weights."""

from __future__ import annotations

import pytest
import torch

from papo_fast import optimizer
from papo_fast.optimizer import CompactAdamW, stochastic_rounding_
from support.memory_options import CPU, needs


def weights_of(dtype, seed=0):
    torch.manual_seed(seed)
    shapes = ((96, 200), (300,), (7, 3, 2, 5, 5))
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def steps(optimizer, parameters, count=5, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in parameters:
            p.grad_dtype = torch.float32
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()


def test_without_a_saving_it_gives_the_weights_of_torchs_adamw_bit_for_bit(monkeypatch):
    monkeypatch.setattr(optimizer, "PIECE", 1000)  # several pieces, and rows longer than none
    theirs, ours = weights_of(torch.float32), weights_of(torch.float32)
    how = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    steps(torch.optim.AdamW(theirs, **how), theirs)
    steps(CompactAdamW(ours, **how, offload=True, device=CPU), ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_master_weights_are_those_of_float32_and_the_weights_are_their_rounding():
    halves = weights_of(torch.bfloat16)
    full = [torch.nn.Parameter(p.detach().float()) for p in halves]
    steps(torch.optim.AdamW(full, lr=1e-3), full)
    compact = CompactAdamW(halves, lr=1e-3, master=True, device=CPU)
    steps(compact, halves)
    for half, whole in zip(halves, full, strict=True):
        assert torch.equal(compact.state[half]["master"], whole)
        assert torch.equal(half, whole.bfloat16())


def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average():
    value = 1 + 0.3 * 2**-7  # bfloat16 has 1 and 1 + 2^-7
    for sign in (1.0, -1.0):
        rounded = stochastic_rounding_(
            torch.full((40_000,), sign * value), torch.Generator().manual_seed(0)
        )
        assert set(rounded.tolist()) == {sign, sign * (1 + 2**-7)}
        # 30 % of them, by a binomial's standard deviation of 0.23 %
        assert (rounded.abs() > 1).float().mean().item() == pytest.approx(0.3, abs=0.01)
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(stochastic_rounding_(exact.clone(), torch.Generator()), exact)


def test_small_updates_are_not_rounded_away():
    """50 updates of 1e-4 of a weight of 1, where bfloat16's next number is 4e-3 below."""
    moved = {}
    for master in (False, True):
        weight = torch.nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16))
        compact = CompactAdamW([weight], lr=1e-4, weight_decay=0.0, master=master, device=CPU)
        for _ in range(50):
            weight.grad_dtype = torch.float32
            weight.grad = torch.ones(256, 256)
            compact.step()
        moved[master] = 1 - weight.float().mean().item()
    lost = torch.ones(256, 256, dtype=torch.bfloat16)
    for _ in range(50):
        lost -= 1e-4
    assert (lost == 1).all()  # what the options are for
    assert moved[False] == pytest.approx(50e-4, rel=0.05)
    assert moved[True] == pytest.approx(50e-4, abs=2**-9)  # half of a step of bfloat16


def test_moments_in_8_bits_take_a_quarter_and_move_weights_alike():
    needs("8bit")
    ours, theirs = weights_of(torch.float32), weights_of(torch.float32)
    start = [p.detach().clone() for p in theirs]
    plain = torch.optim.AdamW(theirs, lr=0.01)
    compact = CompactAdamW(ours, lr=0.01, eight_bits=True, device=CPU)
    steps(plain, theirs, 20)
    steps(compact, ours, 20)
    matrix = ours[0]
    size = sum(x.nbytes for x in compact.state[matrix].values())
    assert size < 0.27 * sum(x.nbytes for x in plain.state[theirs[0]].values())
    assert all(type(x) is torch.Tensor for s in compact.state.values() for x in s.values())
    a, b = matrix - start[0], theirs[0] - start[0]
    error = ((a - b).norm() / b.norm()).item()
    print(f"8-bit moments: updates of 20 steps differ by {error:.1%}")
    assert 0 < error < 0.05
    assert torch.equal(ours[1], theirs[1])  # vectors keep theirs
