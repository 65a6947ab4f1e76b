"""The numerics contract of `token_stats`, line by line, against float64."""

import itertools

import pytest
import torch
from kernel_oracle import (
    BACKENDS,
    FAST,
    GRADS,
    OUTPUTS,
    Case,
    Oracle,
    check,
    gradient_error,
    gradient_errors,
    interpreted,
    make_case,
    random_upstream,
    statistic_errors,
)

from papo_kernels import rows, token_stats

backends = pytest.mark.parametrize("backend", BACKENDS)

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 5.0, "bias": True, "temperature": 1.7},
}
heads = pytest.mark.parametrize("head", HEADS)
# "softcap" has a bias and a temperature too.
some_heads = pytest.mark.parametrize("head", interpreted(["plain", "softcap"], list(HEADS)))
one_head = pytest.mark.parametrize("head", interpreted(["softcap"], list(HEADS)))
ALONE_AND_ALL = [*((o,) for o in OUTPUTS), OUTPUTS]


# Triton's forward knows no chunks, and no C++.
@pytest.fixture(params=[1 << 24] if FAST == "triton" else [1 << 24, 4000, "no C++"])
def chunk_elements(request, monkeypatch):
    size = request.param
    if size == "no C++":
        request.getfixturevalue("without_cpp")
        size = 4000
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", size)
    monkeypatch.setattr(rows, "COPY_ELEMENTS", size)


@backends
@heads
@pytest.mark.parametrize("aug", [False, True], ids=["one-stream", "two-streams"])
def test_fp32_statistics_match_float64(backend, head, aug, chunk_elements):
    case = make_case(77, 40, 1237, peak=6, aug=aug, ignored=0.2, seed=1, **HEADS[head])
    check(statistic_errors(case, token_stats, backend=backend), 1e-5)


@backends
@some_heads
@pytest.mark.parametrize("dtype", interpreted([torch.bfloat16], [torch.bfloat16, torch.float16]))
def test_16_bit_statistics_match_float64_on_the_same_operands(backend, head, dtype, chunk_elements):
    case = make_case(77, 40, 1237, peak=6, dtype=dtype, ignored=0.2, seed=2, **HEADS[head])
    check(statistic_errors(case, token_stats, backend=backend), 1e-4)


@backends
@some_heads
@pytest.mark.parametrize("outputs", ALONE_AND_ALL, ids="+".join)
def test_fp32_gradients_match_float64(backend, head, outputs, chunk_elements):
    case = make_case(77, 40, 1237, peak=6, ignored=0.2, seed=3, **HEADS[head])
    upstream = random_upstream(case, outputs)
    check(gradient_errors(case, token_stats, upstream, backend=backend, grad_budget=0.0), 1e-5)


@backends
@one_head
@pytest.mark.parametrize("outputs", interpreted([OUTPUTS], ALONE_AND_ALL), ids="+".join)
def test_bf16_gradients_lose_no_more_than_rounding_dz_to_bf16(
    backend, head, outputs, chunk_elements
):
    case = make_case(150, 40, 601, peak=6, dtype=torch.bfloat16, ignored=0.2, seed=4, **HEADS[head])
    upstream = random_upstream(case, outputs)
    oracle = Oracle(case)
    exact = oracle.gradients(upstream)
    rounded = oracle.gradients(upstream, rounded=torch.bfloat16)
    got = case.gradients(token_stats, upstream, backend=backend, grad_budget=0.0)
    bound = {g: 1.5 * gradient_error(rounded[g], exact[g]) for g in got}
    check({g: gradient_error(got[g], exact[g]) for g in got}, bound)


@backends
@pytest.mark.parametrize(
    "wanted",
    # interpreted, each alone, all, and one of each stream's states with what both streams add to
    interpreted(
        [*((g,) for g in GRADS), ("hidden", "weight"), ("aug_hidden", "bias"), GRADS],
        [w for n in range(1, 5) for w in itertools.combinations(GRADS, n)],
    ),
    ids="+".join,
)
def test_every_subset_of_gradients_is_right(backend, wanted):
    case = make_case(33, 16, 301, bias=True, ignored=0.1, softcap=8.0, seed=5)
    for outputs in (OUTPUTS, ("kl_prcp",), ("kl_reverse",), ("logprobs", "aug_entropy")):
        upstream = random_upstream(case, outputs)
        errors = gradient_errors(
            case, token_stats, upstream, wanted, backend=backend, grad_budget=0.0
        )
        assert set(errors) == set(wanted)
        check(errors, 1e-5)


@backends
def test_one_stream_gradients_match_float64(backend, chunk_elements):
    case = make_case(50, 24, 777, aug=False, bias=True, ignored=0.3, seed=6)
    errors = gradient_errors(
        case, token_stats, random_upstream(case), backend=backend, grad_budget=0.0
    )
    check(errors, 1e-5)


@backends
@pytest.mark.parametrize("spread", [1, 30, 10_000])
def test_exact_logits_up_to_1e4(backend, spread):
    """Integer logits have no rounding error, so the tolerance is the contract's even at 1e4."""
    g = torch.Generator().manual_seed(7)
    z = torch.randint(-spread, spread + 1, (3, 40, 513), generator=g)[:2].float()
    hidden, aug_hidden = z
    case = Case(hidden, torch.eye(513), torch.randint(0, 513, (40,), generator=g), aug_hidden)
    check(statistic_errors(case, token_stats, backend=backend), 1e-5)
    errors = gradient_errors(
        case, token_stats, random_upstream(case), backend=backend, grad_budget=0.0
    )
    check(errors, 1e-5)


@backends
@pytest.mark.parametrize("level", interpreted([-1e4, 0.0, 1e4], [-1e4, -300.0, 0.0, 300.0, 1e4]))
# interpreted, all but the last lie in one block alike
@pytest.mark.parametrize("vocab", interpreted([1, 65, 1025], [1, 2, 63, 64, 65, 1000, 1025]))
def test_the_vocabulary_tail_never_leaks(backend, level, vocab):
    """Flat distributions at any level: a maximum from 0 or a padded column would show."""
    hidden = torch.full((3, 1), level)
    case = Case(hidden, torch.ones(vocab, 1), torch.tensor([0, vocab - 1, vocab // 2]), hidden + 1)
    stats = case.call(token_stats, backend=backend)
    log_v = torch.tensor(vocab, dtype=torch.float64).log()
    for got, want in zip(stats, (-log_v, log_v, -log_v, log_v, 0 * log_v, 0 * log_v), strict=True):
        torch.testing.assert_close(got.double(), want.expand(3), rtol=1e-5, atol=1e-5)


@backends
@pytest.mark.parametrize("output", ["kl_prcp", "kl_reverse"])
def test_a_kl_between_close_policies_keeps_its_gradient(backend, output):
    """At KL near 5e-4 logits rounded to bf16 would give this gradient an error of 43 %."""
    case = make_case(64, 64, 2000, peak=6, distance=6e-3, seed=8)
    kl = Oracle(case).kl.mean().item()
    print(f"  mean KL {kl:.1e}")
    assert 1e-4 < kl < 1e-3
    errors = gradient_errors(
        case,
        token_stats,
        random_upstream(case, (output,)),
        backend=backend,
        grad_budget=0.0,
    )
    # To first order the streams' contributions to the weight cancel: its error weighs more.
    check(errors, {"hidden": 2e-4, "aug_hidden": 2e-4, "weight": 2e-3})


@backends
@pytest.mark.parametrize("banned", [-1e4, -torch.inf])
def test_banned_tokens_are_as_if_absent(backend, banned):
    case = make_case(40, 16, 301, bias=True, seed=9)
    allowed = torch.ones(301, dtype=torch.bool)
    allowed[torch.randperm(301, generator=torch.Generator().manual_seed(0))[:100]] = False
    renumber = allowed.cumsum(0) - 1
    kept_targets = allowed.nonzero().squeeze(-1)[case.targets % 201]
    case.targets = kept_targets
    case.bias = torch.where(allowed, case.bias, banned)
    small = Case(
        case.hidden,
        case.weight[allowed],
        renumber[kept_targets],
        case.aug_hidden,
        case.bias[allowed],
    )
    want = Oracle(small)
    stats = case.call(token_stats, backend=backend)
    for name, value in want.statistics().items():
        torch.testing.assert_close(getattr(stats, name).double(), value, rtol=1e-5, atol=1e-5)
    upstream = random_upstream(case)
    got = case.gradients(token_stats, upstream, backend=backend, grad_budget=0.0)
    grads = want.gradients(upstream)
    for name in GRADS:
        part = got[name][allowed] if name in ("weight", "bias") else got[name]
        check({name: gradient_error(part, grads[name])}, 1e-5)
    assert not got["weight"][~allowed].any() and not got["bias"][~allowed].any()


@backends
def test_a_banned_label_has_logprob_minus_infinity(backend):
    case = make_case(3, 8, 20, bias=True, seed=10)
    case.bias[case.targets[0]] = -torch.inf
    stats = case.call(token_stats, backend=backend)
    assert stats.logprobs[0] == -torch.inf
    assert torch.stack(list(stats))[:, 1:].isfinite().all() and stats.kl_prcp.isfinite().all()


@backends
@pytest.mark.parametrize("stream", ["hidden", "aug_hidden"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(backend, stream, poison, chunk_elements):
    case = make_case(31, 16, 303, seed=11)
    clean = case.call(token_stats, backend=backend)
    getattr(case, stream)[7, 3] = poison
    stats = case.call(token_stats, backend=backend)
    touched = {"hidden": (0, 1, 4, 5), "aug_hidden": (2, 3, 4, 5)}[stream]
    others = torch.arange(31) != 7
    for i, (got, want) in enumerate(zip(stats, clean, strict=True)):
        assert got[7].isnan() if i in touched else got[7] == want[7], OUTPUTS[i]
        assert torch.equal(got[others], want[others]), OUTPUTS[i]


@backends
def test_nan_reaches_the_gradient_of_its_row_and_the_weight(backend):
    case = make_case(9, 16, 303, seed=12)
    case.hidden[4, 0] = torch.nan
    got = case.gradients(token_stats, random_upstream(case), backend=backend)
    assert got["hidden"][4].isnan().all() and got["weight"].isnan().any()
    assert got["hidden"][torch.arange(9) != 4].isfinite().all()


@backends
def test_ignored_rows_are_exact_zeros_whatever_they_hold(backend, chunk_elements):
    case = make_case(31, 16, 303, seed=13)
    ignored = torch.arange(31) % 3 == 0
    case.targets[ignored] = -100
    want = case.call(token_stats, backend=backend)
    case.hidden[ignored] = torch.nan
    case.aug_hidden[ignored] = torch.inf
    stats = case.call(token_stats, backend=backend)
    for got, value in zip(stats, want, strict=True):
        assert torch.equal(got[ignored], torch.zeros(11)) and torch.equal(got, value)
    grads = case.gradients(token_stats, random_upstream(case), backend=backend)
    assert not grads["hidden"][ignored].any() and not grads["aug_hidden"][ignored].any()
    assert grads["weight"].isfinite().all()


@backends
@pytest.mark.parametrize("rows", ["none", "all-ignored"])
def test_no_rows_at_all(backend, rows):
    case = make_case(0 if rows == "none" else 5, 16, 303, bias=True)
    case.targets.fill_(-100)
    stats = case.call(token_stats, backend=backend)
    assert all(torch.equal(s, torch.zeros(len(case.targets))) for s in stats)
    grads = case.gradients(token_stats, random_upstream(case), backend=backend)
    assert {g: x.shape for g, x in grads.items()} == {g: getattr(case, g).shape for g in GRADS}
    assert not any(x.any() for x in grads.values())


def test_weight_gradient_is_summed_in_fp32():
    """320 equal contributions of 1/2 to a bf16 gradient: a bf16 sum would stop growing at 128."""
    n = 320
    hidden = torch.ones(n, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    stats = token_stats(hidden, weight, torch.zeros(n, dtype=torch.int64), backend=FAST)
    stats.logprobs.sum().backward()
    assert weight.grad.tolist() == [[n / 2], [-n / 2]]


@pytest.mark.skipif(FAST == "triton", reason="Triton's kernels take no float64")
def test_float64_operands_give_float64_and_pass_gradcheck():
    for head in HEADS.values():
        case = make_case(6, 5, 23, dtype=torch.float64, scale=1.0, seed=14, **head | {"bias": True})
        case.targets[2] = -100
        leaves = [getattr(case, g).requires_grad_() for g in GRADS]

        def run(hidden, aug_hidden, weight, bias, backend="torch", case=case):
            inner = Case(
                hidden, weight, case.targets, aug_hidden, bias, case.temperature, case.softcap
            )
            return tuple(inner.call(token_stats, backend=backend, grad_budget=0.0))

        assert all(s.dtype == torch.float64 for s in run(*leaves))
        assert torch.autograd.gradcheck(run, leaves)
        for got, want in zip(run(*leaves), run(*leaves, backend="reference"), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@backends
def test_non_contiguous_operands(backend):
    case = make_case(20, 8, 300, bias=True, seed=3)
    upstream = random_upstream(case)
    want = case.gradients(token_stats, upstream, backend=backend, grad_budget=0.0)
    strided = Case(
        torch.stack([case.hidden] * 2, -1)[..., 0],
        case.weight.T.contiguous().T,
        torch.stack([case.targets] * 2, -1)[:, 1],
        case.aug_hidden.T.contiguous().T,
        torch.stack([case.bias] * 3, -1)[:, 1],
    )
    assert not any(getattr(strided, g).is_contiguous() for g in GRADS)
    leaves = {g: getattr(strided, g).requires_grad_() for g in GRADS}
    stats = strided.call(token_stats, backend=backend, grad_budget=0.0)
    torch.autograd.backward(list(stats), [upstream[o].float() for o in OUTPUTS])
    check({g: gradient_error(leaves[g].grad, want[g].double()) for g in GRADS}, 1e-6)
