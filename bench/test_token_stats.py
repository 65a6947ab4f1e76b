"""`make bench`: both streams, forward and backward, beside whole logits and the bare matmuls.

Each case does the same work on the same peaked policy (entropy printed by `kernel_report.py`):
exact statistics of both streams and gradients into both hidden states and the weight. Compare the
rows of pytest-benchmark's table with one another; absolute times are those of a noisy machine.
"""

from __future__ import annotations

import pytest
import torch
from kernel_report import synthetic

from papo_kernels import token_stats

ROWS, VOCAB, WIDTH = 512, 16_384, 576


@pytest.fixture(scope="module")
def case():
    inputs = synthetic(ROWS, VOCAB, WIDTH, sharpness=14.0)
    for name in ("weight", "hidden", "aug_hidden"):
        inputs[name].requires_grad_()
    return inputs


def six_matmuls(case):
    """Logits, dH and dW of two streams, and nothing else: the floor of every dense method."""
    with torch.no_grad():
        for name in ("hidden", "aug_hidden"):
            z = case[name] @ case["weight"].T
            z @ case["weight"]
            z.T @ case[name]


def statistics(case, **options):
    stats = token_stats(
        case["hidden"], case["weight"], case["targets"], aug_hidden=case["aug_hidden"], **options
    )
    loss = stats.logprobs - 0.02 * stats.kl_prcp + 0.05 * (stats.entropy + stats.aug_entropy)
    torch.autograd.grad(loss.sum(), [case[n] for n in ("hidden", "aug_hidden", "weight")])


WAYS = {
    "six bare matmuls": six_matmuls,
    "whole logits": lambda case: statistics(case, backend="reference"),
    "token_stats": lambda case: statistics(case),
    "token_stats, dense": lambda case: statistics(case, grad_budget=0.0),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_streams_forward_and_backward(benchmark, case, way):
    benchmark.pedantic(WAYS[way], args=(case,), rounds=3, warmup_rounds=1)
