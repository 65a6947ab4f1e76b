"""KL(q || p), and a corrupted stream that is a constant: values, gradients, certificate, costs.

The other suites test the sixth statistic as they test the first five; here is what is its own.
"""

import dataclasses

import pytest
import torch
from kernel_oracle import (
    BACKENDS,
    FAST,
    FLOAT32,
    GRADS,
    OUTPUTS,
    ROWS,
    WORDS,
    Case,
    Oracle,
    check,
    gradient_error,
    gradient_errors,
    interpreted,
    make_case,
    policy_case,
    random_upstream,
    statistic_errors,
)

from papo_kernels import certificate, record_certificates, rows, token_stats
from papo_kernels.rows import make_upstream, make_wanted

backends = pytest.mark.parametrize("backend", BACKENDS)
# The torch backend by C++ and by torch's operators; the first budget is exact, the second one's
# tiles keep all words, so that the sparse code runs without leaving anything out.
ways = pytest.mark.parametrize(
    "way", BACKENDS if FAST == "triton" else [*BACKENDS, "torch without C++"]
)
budgets = pytest.mark.parametrize("budget", [0.0, 1e-7])
MIXES = (
    ("kl_reverse",),
    ("kl_prcp",),
    ("kl_prcp", "kl_reverse"),
    ("logprobs", "kl_reverse"),
    ("aug_entropy", "kl_reverse"),
    OUTPUTS,
)
# Of one row of two words, a gradient is little more than the rounding of its logits.
shapes = pytest.mark.parametrize(
    "shape", interpreted([(1, 3, 2), (65, 24, 509)], [(1, 3, 2), (37, 19, 1021), (65, 24, 509)])
)
FEW_MIXES = (("kl_reverse",), ("kl_prcp", "kl_reverse"), OUTPUTS)
mixes = pytest.mark.parametrize("outputs", interpreted(FEW_MIXES, MIXES), ids="+".join)


@pytest.fixture
def backend_of(request):
    """The backend of a way; without C++ where its name says so."""

    def choose(way):
        if way == "torch without C++":
            request.getfixturevalue("without_cpp")
        return way.split()[0]

    return choose


def shaped_case(n, d, v):
    """Streams far apart: log q - log p has the logits' rounding, and so has a KL's gradient."""
    head = {"bias": True, "softcap": 9.0, "temperature": 0.8}
    return make_case(n, d, v, scale=1.5, distance=1.0, ignored=0.2, **head)


@ways
@budgets
@mixes
@shapes
def test_gradients_with_a_constant_corrupted_stream(
    way, backend_of, budget, outputs, shape, monkeypatch
):
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 1 << 15)
    case, n = shaped_case(*shape), shape[0]
    errors = gradient_errors(
        case,
        token_stats,
        random_upstream(case, outputs, seed=n),
        aug_constant=True,
        backend=backend_of(way),
        grad_budget=budget,
    )
    assert errors["aug_hidden"] == 0.0
    check(errors, 3e-5 if n == 1 else 1e-6)


@ways
@budgets
@mixes
@shapes
def test_gradients_with_both_streams(way, backend_of, budget, outputs, shape, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 1 << 15)
    case, n = shaped_case(*shape), shape[0]
    backend = backend_of(way)
    check(statistic_errors(case, token_stats, backend=backend), 2e-6)
    upstream = random_upstream(case, outputs, seed=n)
    errors = gradient_errors(case, token_stats, upstream, backend=backend, grad_budget=budget)
    check(errors, 3e-5 if n == 1 else 2e-6)


@ways
@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("weight", "bias"), ("bias",)])
def test_a_constant_stream_with_frozen_operands(way, backend_of, frozen):
    case = make_case(33, 16, 301, scale=1.5, bias=True, ignored=0.1)
    wanted = tuple(g for g in GRADS if g not in frozen)
    for outputs in FEW_MIXES if FAST == "triton" else MIXES:
        errors = gradient_errors(
            case,
            token_stats,
            random_upstream(case, outputs),
            wanted,
            aug_constant=True,
            backend=backend_of(way),
            grad_budget=0.0,
        )
        check(errors, 2e-6)


@ways
@pytest.mark.parametrize("aug_constant", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    interpreted(
        [(32, 32, 16, 16)],
        [(16, 16, 16, 32), (32, 32, 16, 16), (16, 32, 16, 32), (16, 16, 32, 16)],
    ),
    ids=str,
)
def test_mixed_dtypes(way, backend_of, aug_constant, dtypes):
    base = make_case(60, 40, 611, scale=2.0, ignored=0.1, bias=True)
    kinds = [{16: torch.bfloat16, 32: torch.float32}[bits] for bits in dtypes]
    parts = {g: getattr(base, g).to(kind) for g, kind in zip(GRADS, kinds, strict=True)}
    case, backend = dataclasses.replace(base, **parts), backend_of(way)
    check(statistic_errors(case, token_stats, backend=backend), 1e-5)
    upstream = random_upstream(case, ("logprobs", "kl_reverse"))
    oracle = Oracle(case)
    exact = oracle.gradients(upstream, aug_constant=aug_constant)
    rounded = oracle.gradients(upstream, rounded=torch.bfloat16, aug_constant=aug_constant)
    got = case.gradients(
        token_stats, upstream, aug_constant=aug_constant, backend=backend, grad_budget=0.0
    )
    # Gradients of logits are rounded to the widest dtype of the states and the weight in Triton.
    bounds = {
        g: 1e-5
        if got[g].dtype == torch.float32 and torch.float32 in kinds[:3]
        else 1.5 * gradient_error(rounded[g], exact[g])
        for g in got
    }
    check({g: gradient_error(got[g], exact[g]) for g in got}, bounds)


@backends
def test_nothing_reaches_a_constant_stream(backend):
    case = make_case(9, 8, 101, bias=True)
    leaves = [getattr(case, g).requires_grad_() for g in GRADS]
    stats = case.call(token_stats, backend=backend, aug_constant=True)
    constant = {"aug_logprobs", "aug_entropy"}
    assert {o for o in OUTPUTS if not getattr(stats, o).requires_grad} == constant
    (stats.kl_prcp + stats.kl_reverse + stats.logprobs).sum().backward()
    assert [x.grad is None for x in leaves] == [False, True, False, False]
    want = case.call(token_stats, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(stats, want, strict=True))
    # Without a second stream there is nothing to hold constant.
    one = Case(case.hidden, case.weight, case.targets, None, case.bias)
    assert one.call(token_stats, backend=backend, aug_constant=True)[2:] == (None,) * 4


@backends
def test_only_the_corrupted_states_want_a_gradient_and_get_none(backend):
    case = make_case(9, 8, 101)
    case.aug_hidden.requires_grad_()
    stats = case.call(token_stats, backend=backend, aug_constant=True)
    assert not any(x.requires_grad for x in stats)


@pytest.mark.parametrize(
    "needs", [(True,) * 4, (False, True, True, False), (True, False, False, False)]
)
def test_a_constant_stream_has_no_account_in_the_certificate(needs):
    some = torch.ones(3)
    wanted = make_wanted(list(needs), make_upstream(*[some] * 6), aug_constant=True)
    assert certificate.certified(wanted) == [0]
    assert not (wanted.aug or wanted.net or wanted.aug_hidden)


@mixes
@pytest.mark.parametrize("dtype", interpreted(FLOAT32, [torch.float32, torch.bfloat16]))
def test_a_constant_stream_in_the_sparse_backward(outputs, dtype, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 1 << 21)
    case = policy_case(ROWS, WORDS, sharpness=36.0, dtype=dtype)
    upstream = random_upstream(case, outputs)
    oracle = Oracle(case)
    exact = oracle.gradients(upstream, aug_constant=True)
    rounded = oracle.gradients(upstream, rounded=dtype, aug_constant=True)
    kept = []
    for constant in (False, True):
        with record_certificates() as found:
            got = case.gradients(token_stats, upstream, aug_constant=constant, backend=FAST)
        kept.append(found.kept)
        assert found.rows == ROWS and found.largest_share <= 3e-3
    print(f"  kept {kept[1]:.3f}, with both streams {kept[0]:.3f}")
    assert kept[1] <= kept[0] + 0.01
    bound = {g: 4e-3 + (dtype != torch.float32) * gradient_error(rounded[g], exact[g]) for g in got}
    check({g: gradient_error(got[g], exact[g]) for g in got}, bound)


@pytest.mark.skipif(FAST == "triton", reason="about the torch backend without C++")
@pytest.mark.parametrize("aug_constant", [False, True])
def test_torch_operators_in_the_sparse_backward(aug_constant, without_cpp):
    case = policy_case(100, 5003, sharpness=36.0)
    for outputs in MIXES:
        upstream = random_upstream(case, outputs)
        exact = Oracle(case).gradients(upstream, aug_constant=aug_constant)
        with record_certificates() as found:
            got = case.gradients(token_stats, upstream, aug_constant=aug_constant)
        assert found.dense_rows == 0 and found.largest_share <= 3e-3
        check({g: gradient_error(got[g], exact[g]) for g in got}, 4e-3)


@pytest.mark.parametrize("way", [FAST] if FAST == "triton" else [FAST, "torch without C++"])
def test_close_policies(way, backend_of):
    """KL near 1e-7: every way sums terms of second order, and none is negative.

    In float32 the specification itself loses this: its log_softmax rounds the normaliser.
    """
    case = make_case(64, 64, 2000, scale=1.0, distance=4.5e-4, seed=8)
    oracle, backend = Oracle(case), backend_of(way)
    print(f"  mean KL {oracle.kl_reverse.mean():.1e}")
    assert 3e-8 < oracle.kl_reverse.mean() < 3e-7
    stats = case.call(token_stats, backend=backend)
    for name, want in (("kl_prcp", oracle.kl), ("kl_reverse", oracle.kl_reverse)):
        got = getattr(stats, name)
        error = (got.double() - want).abs() / want
        check({f"{name}, relative": error.max().item()}, 2e-2)
        assert (got >= 0).all()
    for outputs in (("kl_reverse",), ("kl_prcp",)):
        errors = gradient_errors(
            case, token_stats, random_upstream(case, outputs), backend=backend, grad_budget=0.0
        )
        check(errors, {"hidden": 2e-3, "aug_hidden": 2e-3, "weight": 1e-2})


@ways
@pytest.mark.parametrize("aug_constant", [False, True])
def test_extreme_logits(way, backend_of, aug_constant):
    """Integer logits up to 1e4 have no rounding error; the KL is as large as they are."""
    g = torch.Generator().manual_seed(7)
    hidden, aug_hidden = torch.randint(-10_000, 10_001, (2, 40, 513), generator=g).float()
    case = Case(hidden, torch.eye(513), torch.randint(0, 513, (40,), generator=g), aug_hidden)
    backend = backend_of(way)
    check(statistic_errors(case, token_stats, backend=backend), 1e-5)
    for outputs in (("kl_reverse",), OUTPUTS):
        errors = gradient_errors(
            case,
            token_stats,
            random_upstream(case, outputs),
            aug_constant=aug_constant,
            backend=backend,
            grad_budget=0.0,
        )
        check(errors, 1e-5)


@ways
@pytest.mark.parametrize("stream", ["hidden", "aug_hidden"])
def test_nan_stays_in_its_row(way, backend_of, stream):
    case = make_case(9, 16, 303, seed=12)
    getattr(case, stream)[4, 0] = torch.nan
    others = torch.arange(9) != 4
    options = {"aug_constant": True, "backend": backend_of(way)}
    stats = case.call(token_stats, **options)
    assert stats.kl_reverse[4].isnan() and stats.kl_reverse[others].isfinite().all()
    got = case.gradients(token_stats, random_upstream(case, ("kl_reverse",)), **options)
    assert got["hidden"][4].isnan().all() and got["hidden"][others].isfinite().all()
    assert got["weight"].isnan().any() and not got["aug_hidden"].any()


def test_the_sampled_k3_with_q_constant_has_on_average_the_gradient_of_the_reverse_kl():
    """The authors' estimator: exp(d) - d - 1 with d = log q_y - log p_y, and y drawn from p.

    The mean over y ~ p of its gradient with y fixed is p - q, that of KL(q || p), although its
    value estimates KL(p || q).
    """
    case = make_case(5, 7, 41, scale=1.5, dtype=torch.float64, seed=3)
    z = (case.hidden @ case.weight.T).requires_grad_()
    log_q = (case.aug_hidden @ case.weight.T).log_softmax(-1)
    log_p = z.log_softmax(-1)
    d = log_q - log_p
    k3 = d.exp() - d - 1
    p, q = log_p.detach().exp(), log_q.exp()
    (mean,) = torch.autograd.grad((p * k3).sum(), z)  # p is a number here: y is fixed
    error = (mean - (p - q)).abs().max().item()
    check({"mean gradient of k3 against p - q": error}, 1e-6)
    hidden = case.hidden.clone().requires_grad_()
    stats = token_stats(
        hidden, case.weight, case.targets, aug_hidden=case.aug_hidden, aug_constant=True,
        grad_budget=0.0,
    )  # fmt: skip
    check(
        {"its value against kl_prcp": ((p * k3).sum(-1) - stats.kl_prcp).abs().max().item()}, 1e-6
    )
    stats.kl_reverse.sum().backward()
    check({"hidden": gradient_error(hidden.grad, mean @ case.weight)}, 1e-6)
