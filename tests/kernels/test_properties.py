"""What must hold for any operands: Hypothesis over shapes, and invariances without an oracle."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
    make_case,
    random_upstream,
    statistic_error,
    statistic_errors,
)

from papo_kernels import rows, token_stats

backends = pytest.mark.parametrize("backend", BACKENDS)


@st.composite
def cases(draw):
    v = draw(st.one_of(st.integers(1, 70), st.integers(71, 5000)))
    return make_case(
        draw(st.one_of(st.integers(0, 4), st.integers(5, 300))),
        draw(st.integers(8, 200)),
        v,
        scale=draw(st.sampled_from([0.01, 1.0, 4.0])),
        peak=draw(st.sampled_from([0.0, 8.0])),
        distance=draw(st.sampled_from([0.05, 1.0])),
        aug=draw(st.booleans()),
        bias=draw(st.booleans()),
        ignored=draw(st.sampled_from([0.0, 0.5, 1.0])),
        temperature=draw(st.sampled_from([0.5, 1.0, 1.3])),
        softcap=draw(st.sampled_from([None, 4.0, 30.0])),
        seed=draw(st.integers(0, 10**6)),
    )


@backends
@settings(
    max_examples=8 if FAST == "triton" else 25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases(), data=st.data())
def test_any_shape_and_head_matches_float64(backend, case, data):
    oracle = Oracle(case)
    # Logits of size L carry the rounding of their own fp32 products, about 1e-7 L.
    largest = oracle.z.abs().max().item() if oracle.z.numel() else 0.0
    check(statistic_errors(case, token_stats, backend=backend), 1e-5 + 4e-7 * largest)
    wanted = data.draw(st.sets(st.sampled_from(GRADS), min_size=1))
    outputs = data.draw(st.sets(st.sampled_from(case.outputs), min_size=1))
    wanted = [g for g in GRADS if g in wanted and getattr(case, g) is not None] or ["hidden"]
    upstream = random_upstream(case, [o for o in OUTPUTS if o in outputs])
    got = case.gradients(token_stats, upstream, wanted, backend=backend, grad_budget=0.0)
    want = oracle.gradients(upstream)
    # Where a gradient is all cancellation (a flat entropy, p close to q, a target that has all the
    # mass), the logits' rounding is most of it. Allowed besides the contract: what noise of that
    # size does to the exact gradient, and an error of that size in each coefficient of dz.
    moved = Oracle(case, logit_noise=1e-7).gradients(upstream)
    rounding = 4e-7 * max(1.0, largest) * max(u.norm().item() for u in upstream.values())
    longest = max(x.norm(dim=-1).max().item() for x in (case.weight, case.hidden) if x.numel())
    for g in wanted:
        error = (got[g].double() - want[g]).norm().item()
        noise = 8 * (moved[g] - want[g]).norm().item() + rounding * (longest if g != "bias" else 1)
        check({g: error}, 1e-5 * want[g].norm().item() + noise)


@pytest.mark.parametrize("size", [1e3, 1e4])
@backends
def test_huge_random_logits(backend, size):
    """Errors relative to the logits' size: their fp32 products are rounded at 1e-7 of it."""
    case = make_case(64, 24, 999, scale=size / 3, peak=size / 2, seed=20)
    largest = Oracle(case).z.abs().max().item()
    assert largest > size
    errors = statistic_errors(case, token_stats, backend=backend)
    check(errors, 1e-5 + 4e-7 * largest)
    gradients = case.gradients(token_stats, random_upstream(case), backend=backend)
    assert all(g.isfinite().all() for g in gradients.values())


@backends
def test_permuting_the_vocabulary_permutes_the_gradients(backend):
    case = make_case(40, 16, 503, bias=True, softcap=6.0, seed=21)
    order = torch.randperm(503, generator=torch.Generator().manual_seed(0))
    permuted = Case(
        case.hidden,
        case.weight[order],
        order.argsort()[case.targets],
        case.aug_hidden,
        case.bias[order],
        softcap=6.0,
    )
    upstream = random_upstream(case)
    a = case.call(token_stats, backend=backend)
    b = permuted.call(token_stats, backend=backend)
    check({o: statistic_error(getattr(b, o), getattr(a, o).double()) for o in OUTPUTS}, 5e-6)
    want = case.gradients(token_stats, upstream, backend=backend, grad_budget=0.0)
    got = permuted.gradients(token_stats, upstream, backend=backend, grad_budget=0.0)
    for g in ("weight", "bias"):
        want[g] = want[g][order]
    check({g: gradient_error(got[g], want[g].double()) for g in GRADS}, 5e-6)


@backends
def test_permuting_and_splitting_rows_changes_nothing(backend, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 503 * 8)
    case = make_case(40, 16, 503, bias=True, ignored=0.2, seed=22)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    upstream = random_upstream(case)
    want = case.call(token_stats, backend=backend)
    want_grads = case.gradients(token_stats, upstream, backend=backend, grad_budget=0.0)
    got = [torch.zeros(40) for _ in OUTPUTS]
    sums = {g: torch.zeros_like(x) for g, x in want_grads.items()}
    for at in order.split([1, 12, 0, 27]):
        part = Case(case.hidden[at], case.weight, case.targets[at], case.aug_hidden[at], case.bias)
        for total, value in zip(got, part.call(token_stats, backend=backend), strict=True):
            total[at] = value
        part_upstream = {o: u[at] for o, u in upstream.items()}
        grads = part.gradients(token_stats, part_upstream, backend=backend, grad_budget=0.0)
        for g, x in grads.items():
            if g in ("weight", "bias"):
                sums[g] += x
            else:
                sums[g][at] = x
    check(
        {o: statistic_error(a, b.double()) for o, a, b in zip(OUTPUTS, got, want, strict=True)},
        5e-6,
    )
    check({g: gradient_error(sums[g], want_grads[g].double()) for g in GRADS}, 5e-6)


@backends
def test_adding_a_constant_to_all_logits_changes_nothing(backend):
    case = make_case(40, 16, 503, bias=True, seed=23)
    want = case.call(token_stats, backend=backend)
    case.bias += 64.0  # a power of two costs the logits only their last bits
    got = case.call(token_stats, backend=backend)
    check(
        {o: statistic_error(a, b.double()) for o, a, b in zip(OUTPUTS, got, want, strict=True)},
        4e-5,
    )


@backends
@pytest.mark.parametrize("same", ["identical object", "equal copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_streams_have_no_kl_and_no_gradient_from_it(backend, same, dtype):
    case = make_case(40, 24, 1003, peak=5, bias=True, softcap=9.0, dtype=dtype, seed=24)
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_()
    bias = case.bias.clone().requires_grad_()
    aug = hidden if same == "identical object" else hidden.detach().clone().requires_grad_()
    stats = Case(hidden, weight, case.targets, aug, bias, softcap=9.0).call(
        token_stats, backend=backend
    )
    assert torch.equal(stats.kl_prcp, torch.zeros(40))
    assert torch.equal(stats.kl_reverse, torch.zeros(40))
    assert torch.equal(stats.logprobs, stats.aug_logprobs)
    assert torch.equal(stats.entropy, stats.aug_entropy)
    (stats.kl_prcp + stats.kl_reverse).sum().backward()
    for x in (hidden, aug, weight, bias):
        assert not x.grad.any()


@backends
def test_same_inputs_same_bits(backend):
    case = make_case(40, 24, 1003, peak=5, bias=True, seed=25)
    upstream = random_upstream(case)
    for _ in range(2):
        first = (
            case.call(token_stats, backend=backend),
            case.gradients(token_stats, upstream, backend=backend),
        )
        again = (
            case.call(token_stats, backend=backend),
            case.gradients(token_stats, upstream, backend=backend),
        )
        assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
        assert all(torch.equal(first[1][g], again[1][g]) for g in GRADS)


def test_statistics_obey_their_inequalities():
    case = make_case(200, 24, 1003, peak=5, seed=26)
    stats = case.call(token_stats, backend=FAST)
    log_v = torch.tensor(1003.0).log()
    assert (stats.kl_prcp >= -1e-6).all() and (stats.kl_reverse >= -1e-6).all()
    assert (stats.logprobs <= 0).all()
    assert ((stats.entropy >= 0) & (stats.entropy <= log_v)).all()


def test_gradients_of_default_budget_stay_within_4e_3():
    case = make_case(100, 32, 2003, peak=12, scale=2.0, seed=27)
    for outputs in (*((o,) for o in OUTPUTS), OUTPUTS):
        errors = gradient_errors(case, token_stats, random_upstream(case, outputs), backend=FAST)
        check({f"{'+'.join(outputs)}: {g}": e for g, e in errors.items()}, 4e-3)
