"""Triton's certificate, for all rows at once, against the one that the other backends go by."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kernel_oracle import FAST, make_case

from papo_kernels import certificate, sizes
from papo_kernels.certificate import Beyond, CandidateSums, StreamSums
from papo_kernels.reference import LOG_ZERO
from papo_kernels.rows import (
    BY_LOGIT,
    Options,
    Saved,
    each,
    make_call,
    make_upstream,
    make_wanted,
    saved_names,
    unpack,
)

if FAST != "triton":
    pytest.skip("about Triton's own form of it", allow_module_level=True)

from papo_kernels.triton import gradients
from papo_kernels.triton.account import Account

N, BUDGET = 60, 0.25


def a_pass(given, aug_constant=False, budget_of="call"):
    """What `account.Account` needs of a pass, with random statistics; NaN in rows 3 and 7."""
    case = make_case(N, 8, 50, seed=1)
    options = Options(0.8, None, -100, 3e-3, "triton", "", True, aug_constant, budget_of)
    call = make_call(
        case.hidden, case.aug_hidden, case.weight, None, case.targets, options
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    names = saved_names(2, BY_LOGIT)
    rows = torch.rand(len(names), N, generator=g)
    for i, name in enumerate(names):
        if "logprobs" in name:
            rows[i] = (-3 * rows[i]).clamp_min(LOG_ZERO)
    aug = [names.index(name) for name in ("aug_log_sum", "aug_logprobs")]
    rows[1, 3] = rows[aug, 7] = torch.nan
    up = [torch.randn(N, generator=g) if is_given else None for is_given in given]
    upstream = make_upstream(*up)
    return SimpleNamespace(
        call=call,
        operands=SimpleNamespace(n=N, d=8, full=case.hidden, aug=case.aug_hidden),
        saved=Saved(rows, None, None, None),
        stats=unpack(rows, names),
        upstream=upstream,
        up=torch.stack([torch.zeros(N) if u is None else u for u in up]),
        wanted=make_wanted([True] * 4, upstream, aug_constant),
        live=torch.ones(N, dtype=torch.bool),
    )


@pytest.mark.parametrize("budget_of", ["call", "token"])
@pytest.mark.parametrize("aug_constant", [False, True])
@pytest.mark.parametrize("given", ["111111", "100000", "110010", "000100", "000001", "101101"])
def test_it_is_the_certificate_of_the_other_backends(given, aug_constant, budget_of):
    run = a_pass([x == "1" for x in given], aug_constant, budget_of)
    if not (run.wanted.full or run.wanted.aug):
        pytest.skip("nothing is wanted of such a pass")
    g = torch.Generator().manual_seed(4)
    tile = torch.randperm(N, generator=g).int()
    account, whole_of = Account(run, tile, torch.tensor([N]), BUDGET), sizes.Wholes(run, N)
    at = torch.arange(N)
    for scale in (1.0, 3.0):  # it learns from the first
        sums = scale * torch.rand(len(gradients.SUMS), N, generator=g)
        sums[0, 5] = torch.nan
        beyond = Beyond(*torch.rand(2, N, generator=g, dtype=torch.float64))
        bounds, whole, spare, largest = account.shares(sums, beyond)
        beyond = Beyond(*(x[tile] for x in beyond))
        found = dict(zip(gradients.SUMS, sums.double(), strict=True))
        full, aug = (
            StreamSums(*(found.pop(prefix + name) for name in StreamSums._fields))
            for prefix in ("", "aug_")
        )
        candidates = CandidateSums(full, aug, **found)
        stats, upstream = (each(torch.Tensor.double, x) for x in (run.stats, run.upstream))
        expected = certificate.outside(
            candidates, stats, upstream, run.wanted, beyond, replace(run.call.head)
        )
        asked = certificate.certified(run.wanted)
        held = [x if i in asked else None for i, x in enumerate(candidates.sizes())]
        whole_of.learn(at, held)
        wholes = whole_of.of_rows(at, held)
        close = dict(equal_nan=True, rtol=1e-9, atol=1e-12)
        for i in asked:
            known = ~bounds[i].isnan()  # here NaN is NaN in all accounts of a row
            assert {5} <= set((~known).nonzero()[:, 0].tolist()) <= {3, 5, 7}
            assert not expected[i][known].isnan().any()
            torch.testing.assert_close(bounds[i][known], expected[i][known], **close)
            torch.testing.assert_close(whole[i], wholes[i], **close)
            left = (BUDGET * wholes[i] - expected[i]).float()
            torch.testing.assert_close(spare[i][known], left[known], rtol=1e-5, atol=1e-9)
        share = torch.stack([expected[i] / wholes[i] for i in asked]).amax(0)
        share = torch.where(share.isnan(), torch.inf, share)
        share[5] = torch.inf  # whichever account has the NaN
        torch.testing.assert_close(largest, share, rtol=1e-9, atol=0)
        assert all((spare[i] == torch.inf).all() for i in range(3) if i not in asked)
