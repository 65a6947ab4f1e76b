"""The edges of what may be asked: each was a fault once, and has its right value here."""

import math
from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from kernel_oracle import (
    BACKENDS,
    FAST,
    FLOAT32,
    GRADS,
    OUTPUTS,
    ROWS,
    Case,
    Oracle,
    check,
    gradient_error,
    interpreted,
    make_case,
    policy_case,
    random_upstream,
    statistic_error,
    statistic_errors,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from papo_kernels import op, record_certificates, token_stats
from papo_kernels.cpu import library

backends = pytest.mark.parametrize("backend", BACKENDS)
budgets = pytest.mark.parametrize("grad_budget", [0.0, 3e-3], ids=["dense", "sparse"])
dtypes = pytest.mark.parametrize(
    "dtype", interpreted(FLOAT32, [torch.float32, torch.bfloat16]), ids=str
)
torch_alone = pytest.mark.skipif(FAST == "triton", reason="shown by the torch backend")


@pytest.fixture
def poisoned_memory():
    """Fresh memory holds NaN, which is what anything shows that reads it before writing."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def errors_of(got, exact):
    return {g: gradient_error(got[g], exact[g]) for g in got}


# ---- Where a kernel's first guess at the likeliest word is wrong


@backends
@budgets
def test_the_likeliest_words_come_last(backend, grad_budget):
    """Up to 3000 nats above the targets and the first words, whose logits sums may begin with."""
    words, n = 5003, 40
    slopes = torch.linspace(1, 3000, n)[:, None]
    weight = torch.stack([torch.linspace(-1, 0, words), torch.arange(words) % 7 / 7.0], 1)
    hidden = torch.cat([slopes, torch.ones(n, 1)], 1)
    targets = torch.arange(n)
    targets[::3] = words - 1 - targets[::3]
    case = Case(hidden, weight, targets, hidden * torch.tensor([0.9, 1.5]))
    check(statistic_errors(case, token_stats, backend=backend), 1e-5)
    upstream = random_upstream(case)
    exact = Oracle(case).gradients(upstream)
    got = case.gradients(token_stats, upstream, backend=backend, grad_budget=grad_budget)
    check(errors_of(got, exact), 4e-3 if grad_budget else 1e-5)


def test_a_sure_rows_entropy_keeps_its_digits():
    """Beside the peak's 1 a float32 sum would lose the rest, wherever the second word stands."""
    words = 4099
    second = torch.tensor([1, 2, 3, 4, 5, 256, 1024, 2048, 2049, 4098])
    logits = torch.full((len(second), words), -60.0)
    logits[:, 0] = 3
    logits[torch.arange(len(second)), second] = -16 - torch.arange(len(second)) / 2.0
    aug = logits.roll(1, 1)
    for targets in (torch.zeros(len(second)).long(), second):
        case = Case(logits, torch.eye(words), targets, aug)
        want, got = Oracle(case).statistics(), case.call(token_stats, backend=FAST)
        check(
            {
                name: ((getattr(got, name) - want[name]) / want[name]).abs().max().item()
                for name in ("entropy", "aug_entropy")
            },
            1e-5,
        )


@backends
def test_a_kl_close_to_0_sees_a_word_that_only_the_other_stream_has(backend):
    """The aug stream's first words are 60 nats above the target, and what counts is 5 above them.

    The KL was 0: the factor between the streams' sums was cut off at 40 nats.
    """
    logits = torch.full((3, 4200), -20.0)
    logits[:, 100], logits[:, 4000] = 0, 65
    aug = logits.clone()
    aug[:, 1] = 60
    case = Case(logits, torch.eye(4200), torch.full((3,), 100), aug)
    check(statistic_errors(case, token_stats, backend=backend), 1e-5)


@backends
@pytest.mark.parametrize("height", [-1e4, 1e4])
def test_a_temperature_leaves_large_logits_their_digits(backend, height):
    """Both streams are sure of one word. Rounded peaks that were scaled made a KL of 1e-4 to 1e-3.

    Targets are far from that word, and differ between the streams.
    """
    g = torch.Generator().manual_seed(0)
    peaks = height + 4 * torch.randn(2, 40, generator=g)
    logits = (peaks - 30)[..., None].repeat(1, 1, 70)
    logits[..., 3] = peaks
    logits[..., 7] -= torch.tensor([[0.0], [5.0]])
    case = Case(logits[0], torch.eye(70), torch.full((40,), 7), logits[1], temperature=0.7)
    stats = case.call(token_stats, backend=backend)
    want = Oracle(case).statistics()
    names = ("entropy", "aug_entropy", "kl_prcp", "kl_reverse")
    check({name: statistic_error(getattr(stats, name), want[name]) for name in names}, 1e-5)


@backends
def test_an_unlikely_target_costs_a_kl_no_digits(backend):
    """z - z_aug of it is hundreds of nats from the mean, and sums lose what that takes."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 5, generator=g)
    aug = logits + torch.randn(40, 5, generator=g)
    logits[:, 4] -= 9
    aug[:, 4] -= 12
    case = Case(logits, torch.eye(5), torch.full((40,), 4), aug, temperature=1e-2)
    stats, want = case.call(token_stats, backend=backend), Oracle(case).statistics()
    names = ("kl_prcp", "kl_reverse")
    check({name: statistic_error(getattr(stats, name), want[name]) for name in names}, 1e-5)


@backends
def test_a_word_of_nearly_half_the_mass_is_not_taken_for_the_peak(backend):
    """Logits of 10^5 after temperature round to 0.4 %, by which the word has more than half.

    Two words in another lane have more together, and Triton's peak is one of them: the word got
    the probability of that one, which is off by a fifth.
    """
    step = 2.0**-10  # of float32 there
    peak = 1e4 + torch.arange(64) * 37 * step
    logits = (peak - 50)[:, None].repeat(1, 70)
    logits[:, 0], logits[:, 4], logits[:, 5] = peak, peak - 21 * step, peak - 172 * step
    case = Case(logits, torch.eye(70), torch.zeros(64).long(), temperature=0.1)
    upstream = {"logprobs": torch.ones(64)}
    got = case.gradients(token_stats, upstream, ("hidden",), backend=backend, grad_budget=0.0)
    check(errors_of(got, Oracle(case).gradients(upstream)), 1e-2)


@backends
def test_nan_shows_where_no_other_word_is_beside_it(backend):
    """A lane that has no other word than one of NaN took itself for banned: log-probs were inf."""
    case = make_case(5, 16, 301, seed=3)
    case.weight[300] = torch.nan
    stats = case.call(token_stats, backend=backend)
    for name in OUTPUTS:
        assert getattr(stats, name).isnan().all(), name


# ---- Strides of the gradients

LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T if x.ndim == 2 else x,
    "apart": lambda x: torch.stack([x] * 2, -1)[..., 1],
    "expanded": lambda x: x[:1].expand_as(x),
}


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep_levels", [False, True], ids=["dense", "sparse"])
def test_compilers_are_told_the_strides_of_gradients(layout, dtype, keep_levels):
    case = make_case(20, 16, 303, bias=True, dtype=dtype)
    operands = [LAYOUTS[layout](getattr(case, g)) for g in GRADS]
    options = (1.0, None, -100, 3e-3, FAST, "", True, False, "call")
    *outputs, rows, levels, order, lists = op.forward(
        *operands, case.targets, *options, keep_levels
    )
    tensors = (*map(torch.ones_like, outputs), *operands, case.targets, rows, levels, order, lists)
    got = op.backward(*tensors, [True] * 4, *options)
    with FakeTensorMode() as mode:
        told = op.backward(*map(mode.from_tensor, tensors), [True] * 4, *options)
    for g, a, b in zip(GRADS, got, told, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), g


@torch_alone
@pytest.mark.slow
@pytest.mark.exhaustive  # half a minute of compiling: what it relies on is shown above
@pytest.mark.skipif(library._library() is None, reason="Inductor needs a C++ compiler")
# Its cache knows operators by name: a graph that another version of them made might be found.
@torch._inductor.config.patch(force_disable_caches=True)
def test_inductor_gives_the_gradients_of_a_transposed_weight():
    case = make_case(20, 16, 303, bias=True, seed=4)

    def loss(hidden, aug_hidden, weight_T, bias):
        stats = token_stats(
            hidden.tanh(), weight_T.tanh().T, case.targets, aug_hidden=aug_hidden.tanh(), bias=bias
        )
        return (stats.logprobs - 0.3 * stats.kl_prcp).sum()

    results = []
    for dtype, function in (
        (torch.float64, loss),
        (torch.float32, torch.compile(loss, fullgraph=True)),
    ):
        given = (case.hidden, case.aug_hidden, case.weight.T.contiguous(), case.bias)
        leaves = [x.to(dtype).clone().requires_grad_() for x in given]
        function(*leaves).backward()
        results.append([x.grad for x in leaves])
    check({g: gradient_error(b, a) for g, a, b in zip(GRADS, *results, strict=True)}, 4e-3)


@budgets
def test_a_large_upstream_gradient_leaves_banned_words_at_0(grad_budget):
    """10^10 times a banned word's log would be infinite, and is in the reference's autograd."""
    case = make_case(5, 8, 70, bias=True)
    case.bias[3:9] = -torch.inf
    case.targets[:] = 20
    upstream = {o: u * 1e10 for o, u in random_upstream(case).items()}
    exact = Oracle(case).gradients(upstream)
    got = case.gradients(token_stats, upstream, backend=FAST, grad_budget=grad_budget)
    check({g: gradient_error(got[g], exact[g]) for g in got}, 4e-3)


# ---- No features


@backends
@budgets
@dtypes
def test_without_features_the_bias_alone_makes_the_logits(
    backend, grad_budget, dtype, poisoned_memory
):
    n, v = ROWS, 4099
    g = torch.Generator().manual_seed(0)
    bias = torch.full((v,), -30.0)
    bias[:9] = torch.randn(9, generator=g)
    bias[100:150] = -10.0
    case = Case(
        torch.zeros(n, 0, dtype=dtype), torch.zeros(v, 0, dtype=dtype),
        torch.zeros(n, dtype=torch.int64), torch.zeros(n, 0, dtype=dtype), bias,
    )  # fmt: skip
    check(statistic_errors(case, token_stats, backend=backend), 1e-5)
    for outputs in (OUTPUTS, ("logprobs",)):
        upstream = {o: torch.linspace(-1, 1.2, n) for o in outputs}
        with record_certificates() as certificate:
            got = case.gradients(token_stats, upstream, backend=backend, grad_budget=grad_budget)
        exact = Oracle(case).gradients(upstream)
        assert got["hidden"].shape == (n, 0) and got["weight"].shape == (v, 0)
        check({"bias": gradient_error(got["bias"], exact["bias"])}, 4e-3 if grad_budget else 1e-5)
    if grad_budget and backend != "reference":
        assert certificate.kept < 0.1  # the sparse backward did it


# ---- Bans


@backends
@pytest.mark.parametrize(
    ("softcap", "temperature"), [(None, 1.0), (5.0, 1.0), (30.0, 10.0), (30.0, 100.0)]
)
@pytest.mark.parametrize("ban", [-torch.inf, -1e30, torch.finfo(torch.float32).min], ids=str)
def test_the_only_word_that_is_not_banned_is_certain(backend, ban, softcap, temperature):
    bias = torch.zeros(10)
    bias[1:] = ban
    stats = token_stats(
        torch.zeros(2, 4), torch.randn(10, 4), torch.tensor([0, 3]), aug_hidden=torch.randn(2, 4),
        bias=bias, softcap=softcap, temperature=temperature, backend=backend,
    )  # fmt: skip
    assert stats.logprobs.tolist() == stats.aug_logprobs.tolist() == [0.0, -math.inf]
    for x in (stats.entropy, stats.aug_entropy, stats.kl_prcp, stats.kl_reverse):
        # a KL's terms of second order round to this where Triton has no target to start from
        assert x.tolist() == pytest.approx([0.0, 0.0], abs=1e-8)


def without(case, banned):
    """The case of a vocabulary without the (V,) `banned` words; banned targets become any word."""
    allowed = ~banned
    targets = torch.where(banned[case.targets], 0, allowed.cumsum(0)[case.targets] - 1)
    return replace(
        case, weight=case.weight[allowed], bias=case.bias[allowed], targets=targets.clamp_min(0)
    )


def some_words(vocab, count):
    banned = torch.zeros(vocab, dtype=torch.bool)
    banned[torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:count]] = True
    return banned


@backends
@budgets
@dtypes
@pytest.mark.parametrize(
    "ban", interpreted([-torch.inf], [-torch.inf, "the least of the dtype"]), ids=str
)
def test_under_a_soft_cap_banned_words_are_as_if_absent(backend, grad_budget, dtype, ban):
    case = policy_case(ROWS, 3001, sharpness=20.0, dtype=dtype, softcap=15.0, temperature=2.0)
    banned = some_words(3001, 1000)
    banned[case.targets] = False
    small = without(case, banned)
    case.bias[banned] = torch.finfo(dtype).min if isinstance(ban, str) else ban
    want, stats = Oracle(small), case.call(token_stats, backend=backend)
    check({o: statistic_error(getattr(stats, o), x) for o, x in want.statistics().items()}, 2e-5)
    upstream = random_upstream(case)
    got = case.gradients(token_stats, upstream, backend=backend, grad_budget=grad_budget)
    assert not got["weight"][banned].any() and not got["bias"][banned].any()
    got |= {g: got[g][~banned] for g in ("weight", "bias")}
    exact, rounded = want.gradients(upstream), want.gradients(upstream, rounded=dtype)
    allowance = 4e-3 if grad_budget else 2e-5
    bounds = {g: allowance + 1.5 * gradient_error(rounded[g], exact[g]) for g in GRADS}
    check(errors_of(got, exact), bounds)


@backends
@budgets
@pytest.mark.parametrize("softcap", interpreted([15.0], [None, 15.0]))
def test_a_banned_target_that_the_loss_leaves_out_has_no_gradient(backend, grad_budget, softcap):
    case = policy_case(ROWS, 3001, sharpness=20.0, softcap=softcap)
    upstream = random_upstream(case)
    banned = some_words(3001, 100)
    banned[case.targets[:5]] = True
    left_out = banned[case.targets]
    for name in ("logprobs", "aug_logprobs"):
        upstream[name][left_out] = 0.0
    small = without(case, banned)
    case.bias[banned] = -torch.inf
    stats = case.call(token_stats, backend=backend)
    assert (stats.logprobs[left_out] == -torch.inf).all()
    got = case.gradients(token_stats, upstream, backend=backend, grad_budget=grad_budget)
    assert not got["weight"][banned].any() and not got["bias"][banned].any()
    got |= {g: got[g][~banned] for g in ("weight", "bias")}
    check(errors_of(got, Oracle(small).gradients(upstream)), 4e-3 if grad_budget else 2e-5)


@backends
def test_a_finite_bias_under_a_soft_cap_is_bounded_by_it(backend):
    case = make_case(40, 16, 301, bias=True, softcap=6.0, seed=11)
    case.bias[::3] = -1e4
    check(statistic_errors(case, token_stats, backend=backend), 1e-5)
    assert (Oracle(case).log_p[:, ::3] > -30).all()  # no ban: it is what the docstring warns of


# ---- Targets that nobody checked


@backends
@budgets
@pytest.mark.parametrize("bad", interpreted([3001], [-7, 3001]))
def test_a_bad_target_that_the_loss_leaves_out_has_no_gradient(backend, grad_budget, bad):
    case = policy_case(ROWS, 3001, sharpness=20.0)
    upstream = random_upstream(case)
    left_out = torch.arange(ROWS) % 40 == 3
    for u in upstream.values():
        u[left_out] = 0.0
    exact = Oracle(case).gradients(upstream)
    case.targets[left_out] = bad
    leaves = {g: getattr(case, g).clone().requires_grad_() for g in GRADS}
    stats = token_stats(
        leaves["hidden"], leaves["weight"], case.targets, aug_hidden=leaves["aug_hidden"],
        bias=leaves["bias"], validate=False, backend=backend, grad_budget=grad_budget,
    )  # fmt: skip
    assert stats.logprobs[left_out].isnan().all() and stats.aug_logprobs[left_out].isnan().all()
    loss = sum(
        torch.where(left_out, 0.0, u.float() * getattr(stats, o)).sum() for o, u in upstream.items()
    )
    assert loss.isfinite()
    loss.backward()
    check(errors_of({g: x.grad for g, x in leaves.items()}, exact), 4e-3 if grad_budget else 1e-5)


@budgets
def test_a_bad_target_that_the_loss_uses_is_seen_in_its_row_alone(grad_budget):
    case = policy_case(ROWS, 3001, sharpness=20.0)
    case.targets[5] = 3001
    got = case.gradients(
        token_stats, {"logprobs": torch.ones(ROWS)}, validate=False, backend=FAST,
        grad_budget=grad_budget,
    )  # fmt: skip
    assert got["hidden"][5].isnan().all()
    assert got["hidden"][torch.arange(ROWS) != 5].isfinite().all()
