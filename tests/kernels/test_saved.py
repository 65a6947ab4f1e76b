"""What a forward saves for the backward: named statistics, the order of rows, and levels."""

import pytest
import torch
from kernel_oracle import FAST, Oracle, make_case

from papo_kernels import chunked_forward, rows
from papo_kernels.certificate import LEVELS_PER_NAT
from papo_kernels.rows import Saved, unpack

if FAST == "triton":
    from papo_kernels.triton import forward as layout
    from papo_kernels.triton.launch import TILE
else:
    layout, TILE = chunked_forward, chunked_forward.TILE_ROWS


@pytest.fixture(params=[False, True], ids=["one-stream", "two-streams"])
def case(request, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 1237 * 48)  # two chunks of 48 rows and fewer
    return make_case(113, 40, 1237, peak=9, aug=request.param, ignored=0.2, bias=True, seed=3)


def saved(case, keep_levels=True):
    options = (1.0, None, -100, 3e-3, FAST, "", True, False, "call", keep_levels)
    operands = (case.hidden, case.aug_hidden, case.weight, case.bias, case.targets)
    return Saved(*torch.ops.papo.token_stats(*operands, *options)[-4:])


def test_every_statistic_has_its_name(case):
    oracle, streams = Oracle(case), 1 if case.aug_hidden is None else 2
    exact, kept = oracle.statistics(), oracle.kept
    s = unpack(saved(case).rows, layout.names(streams))

    def check(found, want):
        assert not found[~kept].any()
        torch.testing.assert_close(found[kept].double(), want, rtol=2e-5, atol=2e-5)

    def check_stream(found, z, prefix):
        peak, highest = found.peak[kept].double(), z.amax(1)
        if FAST == "triton":  # elsewhere a likely word's, whichever that is
            surely_it = (highest - z.logsumexp(1)).exp() > 0.5
            assert ((z - peak[:, None]).abs().amin(1) < 1e-4).all()
            assert (highest - peak < 3).all() and 0 < surely_it.sum() < len(peak)
            highest = torch.where(surely_it, highest, peak)
        check(found.peak, highest)
        check(found.log_sum, z.logsumexp(1) - highest)
        check(found.entropy, exact[f"{prefix}entropy"][kept])
        check(found.logprobs, exact[f"{prefix}logprobs"][kept])

    check_stream(s.full, oracle.z, "")
    if streams == 1:
        assert s[1:] == (None,) * (len(s) - 1)
        return
    check_stream(s.aug, oracle.z_aug, "aug_")
    check(s.kl_prcp, exact["kl_prcp"][kept])
    check(s.kl_reverse, exact["kl_reverse"][kept])
    p, q, logit_gap = oracle.p, oracle.q, (oracle.z - oracle.z_aug).abs()
    sums = {
        "prob_gap": (q - p).abs(),
        "log_ratio": p * (oracle.log_q - oracle.log_p).abs(),
        "aug_log_ratio": q * (oracle.log_q - oracle.log_p).abs(),
        "logit_gap": p * logit_gap,
        "aug_logit_gap": q * logit_gap,
    }
    filled = {name for name in sums if getattr(s, name) is not None}
    assert filled == set(rows.BY_LOGIT if FAST == "triton" else rows.BY_PROBABILITY)
    for name in filled:
        check(getattr(s, name), sums[name].sum(1))


@pytest.mark.parametrize("keep_levels", [False, True])
def test_the_order_has_every_row_once_and_ignored_rows_last(case, keep_levels):
    order, kept = saved(case, keep_levels).order, case.targets != -100
    assert torch.equal(order.sort().values, torch.arange(len(kept)))
    assert kept[order].tolist() == sorted(kept.tolist(), reverse=True)


@pytest.mark.skipif(FAST == "triton", reason="its tiles are cut before entropies are known")
def test_rows_of_a_chunk_stand_by_the_flatter_streams_entropy(case):
    found, streams = saved(case), 1 if case.aug_hidden is None else 2
    s = unpack(found.rows, layout.names(streams))
    flattest = s.full.entropy if streams == 1 else torch.maximum(s.full.entropy, s.aug.entropy)
    count = int((case.targets != -100).sum())
    size = chunked_forward.chunk_size(count, len(case.weight))
    assert TILE < size < count
    for chunk in flattest[found.order[:count]].split(size):
        assert torch.equal(chunk, chunk.sort().values)


def test_levels_bound_every_probability_of_their_tile(case):
    found, oracle = saved(case), Oracle(case)
    row_of = oracle.kept.cumsum(0) - 1
    tiles = found.order[: int(oracle.kept.sum())].split(TILE)
    assert len(tiles) > 1
    for at, levels in zip(tiles, found.levels, strict=False):
        highest = oracle.log_p[row_of[at]].amax(0)
        if case.aug_hidden is not None:
            highest = torch.maximum(highest, oracle.log_q[row_of[at]].amax(0))
        assert (highest <= levels.double() / -LEVELS_PER_NAT + 1e-5).all()
        assert levels.double().mean() > 8  # and they are not just 0, which bounds everything
