"""Random calls against float64, and attacks on the certificate that it once believed."""

import math

import kernel_fuzz
import pytest
import torch

from papo_kernels import record_certificates, token_stats

N = V = 1024


@pytest.mark.parametrize(
    "seeds", [range(40), pytest.param(range(40, 400), marks=pytest.mark.exhaustive)], ids=str
)
def test_random_calls_are_right_and_drop_no_more_than_they_may(seeds):
    assert kernel_fuzz.fuzz(seeds) == []


def attack(logits, upstream, aug=None, softcap=None):
    """The fuzz's case of float64 logits; the weight is the identity, so all rows show their dz."""
    return kernel_fuzz.Case(
        logits.float(), None if aug is None else aug.float(), None,
        torch.zeros(len(logits), dtype=torch.long), upstream,
        {"temperature": 1.0, "softcap": softcap, "grad_budget": 3e-3, "budget_of": "call",
         "aug_constant": False},
        torch.float32, weight_too=False,
    )  # fmt: skip


def spread_evenly():
    """Confident rows, all alike: what the one word leaves is spread over all others."""
    z = torch.zeros(N, V, dtype=torch.float64)
    z[:, 0] = math.log((1 - 4e-6) / (4e-6 / (V - 1)))
    return attack(z, {"logprobs": torch.ones(N)})


def rare_words():
    """p and q differ in ten rare words only, and the weight is frozen."""
    z = torch.full((N, V), -50.0, dtype=torch.float64)
    z[:, :8] = torch.randn(N, 8, generator=torch.Generator().manual_seed(0)).double()
    z = z.log_softmax(1)
    z[:, 500:510] = math.log(1e-7)
    aug = z.clone()
    aug[:, 500:510] -= 3
    return attack(z, {"kl_prcp": torch.ones(N)}, aug)


def cancelling():
    """The upstream gradients of log-prob and entropy cancel at all words but few."""
    some, few = 50, 2.4e-4
    z = torch.full((N, V), -60.0, dtype=torch.float64)
    z[:, 0] = math.log(0.9)
    z[:, 1 : 1 + some] = math.log((0.1 - few) / some)
    z[:, 600:700] = math.log(few / 100)
    z = z.log_softmax(1)
    entropy = -(z.exp() * z).sum(1)
    return attack(z, {"logprobs": -(z[:, 1] + entropy), "entropy": torch.ones(N)})


def capped(top):
    """Two words at the soft cap, where it lets no gradient pass, and a hundred below it."""
    cap, z = 30.0, torch.full((N, V), -600.0, dtype=torch.float64)
    z[:, 2:120] = cap * math.atanh((cap * math.tanh(top / cap) - 11) / cap)
    z[:, :2] = top
    return attack(z, {"logprobs": torch.ones(N)}, softcap=cap)


def enormous():
    z = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(0)).double()
    z[:, 0] += 12
    return attack(z, {"logprobs": torch.full((N,), 1e19)})


@pytest.mark.parametrize(
    "case",
    [spread_evenly, rare_words, cancelling, enormous, *(lambda t=t: capped(t) for t in (45, 90))],
    ids=["even tail", "rare words", "cancelling upstreams", "1e19", "at the cap", "far above"],
)
@pytest.mark.parametrize("cpp", [False, True], ids=["eager", "C++"])
def test_an_attack_finds_no_share_above_the_budget(case, cpp):
    case = case()
    with kernel_fuzz.small_calls_as_large(cpp), record_certificates() as said:
        found = kernel_fuzz.run(case)
    share, error = kernel_fuzz.check(case, found, print)
    print(f"share {share:.2f} of the budget, error {error:.2f}, said {said.largest_share:.1e}")
    assert share <= 1 and error <= 1


@pytest.mark.parametrize("grad_budget", [0.0, 3e-3])
def test_confident_rows_far_from_zero_keep_their_gradient(grad_budget):
    """1 - p near 1e-4 at logits near 30: their rounding is a hundredth of 1 - p."""
    g = torch.Generator().manual_seed(0)
    n, vocab, width = 256, 8192, 256
    u = torch.randn(width, generator=g, dtype=torch.float64)
    u /= u.norm()
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64) / 16
    weight += (1 - weight @ u)[:, None] * u
    targets = torch.randint(0, vocab, (n,), generator=g) % 40
    own = weight[targets] - u
    hidden = 17 * u + 13 * own / own.square().sum(1, keepdim=True)
    bias = torch.full((vocab,), -40.0)
    bias[:40] = 0
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    p = (hidden.detach().double() @ weight.detach().double().T + bias).softmax(1)
    dz = -p
    dz[torch.arange(n), targets] = 0
    dz[torch.arange(n), targets] = -dz.sum(1)
    print(f"1 - p {dz.gather(1, targets[:, None]).mean():.1e}")
    stats = token_stats(hidden, weight, targets, bias=bias, grad_budget=grad_budget)
    stats.logprobs.sum().backward()
    for got, want in ((hidden.grad, dz @ weight.double()), (weight.grad, dz.T @ hidden.double())):
        error = ((got - want).norm() / want.norm()).item()
        print(f"error {error:.1e}")
        assert error < 4e-3  # it was 2.6e-2


def test_short_rows_with_large_upstreams_do_not_hide_long_ones():
    g = torch.Generator().manual_seed(0)
    n, vocab, width = 320, 4099, 48
    weight = torch.randn(vocab, width, generator=g)
    words = torch.randint(0, vocab, (n, 3), generator=g)
    scaled = weight / weight.square().sum(1, keepdim=True)
    hidden = (scaled[words] * torch.tensor([34.0, 27.0, 20.0])[:, None]).sum(1)
    hidden += 0.07 * torch.randn(n, width, generator=g)
    hidden[::16] = 0.01 * torch.randn(20, width, generator=g)
    ranks = torch.randperm(vocab, generator=g) + 1
    upstream = torch.randn(n, generator=g)
    upstream[::16] *= 1000
    found = []
    for grad_budget in (0.0, 3e-3):
        leaf = weight.clone().requires_grad_()
        stats = token_stats(
            hidden, leaf, words[:, 0], bias=-1.8 * ranks.float().log(), grad_budget=grad_budget
        )
        stats.logprobs.backward(upstream)
        found.append(leaf.grad)
    error = ((found[1] - found[0]).norm() / found[0].norm()).item()
    print(f"dW off by {error:.1e}")
    assert error < 4e-3


def test_a_share_of_each_token_is_kept_where_that_is_asked_for():
    """Rows whose own gradient is tiny beside the others' lose it, unless each token counts."""
    z = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(1)).double()
    z[:, 0] += torch.linspace(4, 16, N)
    case = attack(z, {"logprobs": torch.ones(N)})
    (dz, _), *_ = kernel_fuzz.truth(case)
    lost = {}
    for budget_of in ("call", "token"):
        case.options["budget_of"] = budget_of
        got = kernel_fuzz.run(case)[0]
        lost[budget_of] = ((dz.abs() * (got == 0)).sum(1) / dz.abs().sum(1)).max().item()
    print(lost)
    assert lost["call"] > 0.2 and lost["token"] <= 3e-3


def policy(rows, steepness, top):
    """(rows, 4096) logits that fall with the logarithm of a word's rank; `top` lifts the first."""
    g = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, 4097).double().log()
    z = -steepness * ranks + 0.5 * torch.randn(rows, 4096, generator=g).double()
    z[:, 0] += top
    return z.log_softmax(1)


def dense_rows(z):
    hidden = z.float().requires_grad_()
    targets = z.argmax(1)
    with record_certificates() as found:
        token_stats(hidden, torch.eye(z.shape[1]), targets).logprobs.sum().backward()
    print(f"kept {found.kept:.3f}, dense rows {found.dense_rows} of {found.rows}")
    return found.dense_rows


def test_a_tile_unlike_the_others_does_not_send_them_the_dense_way():
    """The first tile teaches the others; here all of its rows leave out the same words."""
    z = policy(336, 2.2, 0)
    z[:16] = -30
    z[:16, 0] = math.log(0.98)
    z[:16, 1:1001] = math.log(0.02 / 1000)
    assert dense_rows(z.log_softmax(1)) == 0  # it was 320


@pytest.mark.parametrize("top", [6, 9])
def test_a_wholly_confident_call_stays_sparse(top):
    z = policy(320, 2.2, top)
    print(f"1 - p {-torch.expm1(z.amax(1)).mean():.1e}")
    assert dense_rows(z) == 0  # it was 304
