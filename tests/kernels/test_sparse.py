"""The mass-certified sparse backward: its errors, its certificate, and that it skips columns."""

import pytest
import torch
from kernel_oracle import (
    FAST,
    GRADS,
    OUTPUTS,
    ROWS,
    WORDS,
    Case,
    Oracle,
    check,
    gradient_error,
    make_case,
    policy_case,
    random_upstream,
)

from papo_kernels import op, record_certificates, rows, token_stats

MIXES = [*((o,) for o in OUTPUTS), ("logprobs", "kl_prcp"), OUTPUTS[:5], OUTPUTS]
SHARPNESS = [24.0, 30.0, 36.0]
BUDGETS = [1e-3, 1e-2, 1e-1]
if FAST == "triton":  # An interpreter: fewer and smaller, the contract is the same.
    MIXES, SHARPNESS, BUDGETS = [*MIXES[4:7], MIXES[1], OUTPUTS], [36.0], [1e-2]
torch_only = pytest.mark.skipif(FAST == "triton", reason="about the torch backend's choice")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 1 << 21)


# bfloat16 where rows are neither the flattest nor the most confident; an interpreter has none.
@pytest.mark.parametrize(
    ("sharpness", "dtype"),
    [
        *((sharpness, torch.float32) for sharpness in SHARPNESS),
        *(
            pytest.param(
                s, torch.bfloat16, marks=[pytest.mark.exhaustive] * (s != 30 or FAST == "triton")
            )
            for s in SHARPNESS
        ),
    ],
)
def test_default_budget_keeps_every_gradient_within_4e_3(sharpness, dtype):
    case = policy_case(ROWS, WORDS, sharpness=sharpness, dtype=dtype)
    oracle = Oracle(case)
    print(f"  entropy {oracle.entropy.mean():.2f}, {oracle.aug_entropy.mean():.2f} nats")
    for outputs in MIXES:
        upstream = random_upstream(case, outputs)
        exact = oracle.gradients(upstream)
        with record_certificates() as certificate:
            got = case.gradients(token_stats, upstream, backend=FAST)
        print(f"  {'+'.join(outputs)}: kept {certificate.kept:.3f}")
        bound = dict.fromkeys(GRADS, 4e-3)
        if dtype == torch.bfloat16:
            rounded = oracle.gradients(upstream, rounded=dtype)
            bound = {g: 4e-3 + gradient_error(rounded[g], exact[g]) for g in GRADS}
        check({g: gradient_error(got[g], exact[g]) for g in got}, bound)
        assert certificate.rows == ROWS and certificate.largest_share <= 3e-3
        if sharpness > 30 and FAST == "torch":
            assert certificate.dense_rows == 0 and certificate.kept < 0.2


@torch_only
@pytest.mark.parametrize("head", [{"temperature": 0.8}, {"softcap": 80.0}])
def test_default_budget_with_a_head(head):
    case = policy_case(ROWS, WORDS, sharpness=30.0, **head)
    for outputs in MIXES:
        upstream = random_upstream(case, outputs)
        exact = Oracle(case).gradients(upstream)
        with record_certificates() as certificate:
            got = case.gradients(token_stats, upstream, backend=FAST)
        check({g: gradient_error(got[g], exact[g]) for g in got}, 4e-3)
        assert certificate.dense_rows < ROWS


@pytest.mark.parametrize("output", ["kl_prcp", "kl_reverse"])
def test_close_policies_keep_their_perception_gradient(output):
    case = policy_case(ROWS, WORDS, sharpness=36.0, distance=3e-3)
    kl = Oracle(case).kl.mean().item()
    print(f"  mean KL {kl:.1e}")
    assert kl < 1e-3
    upstream = random_upstream(case, (output,))
    exact = Oracle(case).gradients(upstream)
    with record_certificates() as certificate:
        got = case.gradients(token_stats, upstream, backend=FAST)
    print(f"  kept {certificate.kept:.3f}")
    check({g: gradient_error(got[g], exact[g]) for g in got}, 4e-3)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("outputs", MIXES, ids="+".join)
def test_certificate_is_true(budget, outputs):
    """In one tile the columns dropped are the zero rows of dW: float64 says what they held."""
    case = policy_case(16, WORDS, sharpness=36.0)
    upstream = random_upstream(case, outputs)
    with record_certificates() as certificate:
        got = case.gradients(token_stats, upstream, backend=FAST, grad_budget=budget)
    dropped = (got["weight"] == 0).all(1)
    print(f"  kept {certificate.kept:.4f}, largest share {certificate.largest_share:.2e}")
    assert (~dropped).sum().item() == round(certificate.kept * WORDS) < WORDS / 2
    worst = 0.0
    for dz in Oracle(case).dz(upstream):
        sizes = dz.abs()
        whole = sizes.sum(1)
        if whole.any():
            typical = whole.square().mean().sqrt()
            held = sizes[:, dropped].sum(1) / torch.maximum(whole, typical)
            worst = max(worst, held.max().item())
    print(f"  largest share in float64 {worst:.2e}")
    # The typical size of a mix is taken as the sum of its parts', which partly cancel: the two KLs'
    # gradients more than others.
    slack = 1.01 if len(outputs) == 1 else 1.6 if outputs == OUTPUTS else 1.5
    assert worst <= certificate.largest_share * slack + 1e-4
    assert certificate.largest_share <= budget


@torch_only
def test_more_budget_keeps_fewer_columns_and_none_is_dense():
    case = policy_case(128, WORDS, sharpness=36.0)
    upstream = random_upstream(case)
    kept = []
    for budget in (0.0, 1e-3, 1e-2, 1e-1):
        with record_certificates() as certificate:
            case.gradients(token_stats, upstream, backend=FAST, grad_budget=budget)
        kept.append(certificate.kept)
    print(f"  kept {kept}")
    assert kept == sorted(kept, reverse=True) and kept[0] == 1.0 and kept[-1] < 0.02


def test_flat_rows_are_dense_and_peaked_ones_sparse():
    peaked, flat = policy_case(128, WORDS, sharpness=36.0), make_case(100, 48, WORDS, scale=0.1)
    case = Case(
        torch.cat([peaked.hidden, flat.hidden]),
        peaked.weight,
        torch.cat([peaked.targets, flat.targets]),
        torch.cat([peaked.aug_hidden, flat.aug_hidden]),
    )
    upstream = random_upstream(case)
    with record_certificates() as certificate:
        got = case.gradients(token_stats, upstream, backend=FAST)
    assert certificate.rows == 228 and 100 <= certificate.dense_rows < 228
    exact = Oracle(case).gradients(upstream)
    check({g: gradient_error(got[g], exact[g]) for g in got}, 4e-3)


def test_rows_without_upstream_gradient_cost_nothing():
    case = policy_case(192, WORDS, sharpness=36.0)
    upstream = random_upstream(case)
    for u in upstream.values():
        u[64:] = 0
    with record_certificates() as certificate:
        got = case.gradients(token_stats, upstream, backend=FAST)
    assert certificate.rows == 192 and certificate.kept < (0.2 if FAST == "torch" else 0.5)
    assert not got["hidden"][64:].any()
    exact = Oracle(case).gradients(upstream)
    check({g: gradient_error(got[g], exact[g]) for g in got}, 4e-3)


def test_a_confident_call_stays_right():
    """All rows near certainty: budgets are shares of gradients that are themselves tiny."""
    case = policy_case(ROWS, 3001, sharpness=60.0)
    print(f"  entropy {Oracle(case).entropy.mean():.1e}")
    for outputs in [MIXES[0], OUTPUTS] if FAST == "triton" else MIXES:
        upstream = random_upstream(case, outputs)
        exact = Oracle(case).gradients(upstream)
        got = case.gradients(token_stats, upstream, backend=FAST)
        check({g: gradient_error(got[g], exact[g]) for g in got}, 4e-3)


@torch_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_compiler_torch_operators_keep_the_contract(dtype, without_cpp):
    case = policy_case(100, 5003, sharpness=36.0, dtype=dtype)
    upstream = random_upstream(case)
    oracle = Oracle(case)
    want, exact = oracle.statistics(), oracle.gradients(upstream)
    stats = case.call(token_stats)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(stats, name).double(), want[name], rtol=1e-4, atol=1e-4)
    with record_certificates() as certificate:
        got = case.gradients(token_stats, upstream, backend=FAST)
    assert certificate.dense_rows == 0
    rounded = oracle.gradients(upstream, rounded=dtype)
    bound = {g: 4e-3 + gradient_error(rounded[g], exact[g]) for g in got}
    check({g: gradient_error(got[g], exact[g]) for g in got}, bound)


@torch_only
def test_a_small_weight_is_exact_whatever_the_budget(monkeypatch):
    case = policy_case(64, 5003, sharpness=36.0)
    upstream = random_upstream(case)
    exact = Oracle(case).gradients(upstream)
    errors = {}
    for least in (case.weight.numel() - 1, case.weight.numel()):
        monkeypatch.setattr(op, "DENSE_WEIGHT", least)
        with record_certificates() as certificate:
            got = case.gradients(token_stats, upstream, backend=FAST, grad_budget=0.1)
        errors[certificate.kept == 1] = {g: gradient_error(got[g], exact[g]) for g in got}
    print(errors)
    assert errors.keys() == {True, False}
    check(errors[True], 1e-5)
    assert max(errors[False].values()) > 1e-4
