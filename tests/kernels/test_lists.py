"""Rows with lists of their own words: what is listed, what is dropped, and sparse products."""

from dataclasses import replace

import pytest
import torch
from kernel_oracle import (
    FAST,
    GRADS,
    OUTPUTS,
    Case,
    Oracle,
    check,
    gradient_error,
    make_case,
    policy_case,
    random_upstream,
)

from papo_kernels import record_certificates, rows, token_stats
from papo_kernels.rows import Saved

if FAST != "triton":
    pytest.skip("only the Triton backend makes lists", allow_module_level=True)

from papo_kernels.triton import columns, launch, lists

WORDS = 2048


def cases(few, others):
    """Cases that `make test` runs, and those that repeat their parts: `make test-all` has these."""
    return [*few, *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in others)]


@pytest.fixture(autouse=True)
def long_lists(monkeypatch):
    """Of a quarter of the vocabulary: few words are no policy's vocabulary."""
    monkeypatch.setattr(lists, "SPARSITY", 4)
    monkeypatch.setattr(lists, "ROW_SPARSITY", 2)


def saved_lists(case, budget=3e-3, validate=True):
    options = (1.0, None, -100, budget, FAST, "", validate, False, "call", True)
    operands = (case.hidden, case.aug_hidden, case.weight, case.bias, case.targets)
    saved = Saved(*torch.ops.papo.token_stats(*operands, *options)[-4:])
    streams = 1 if case.aug_hidden is None else 2
    return lists.parts(saved.lists, len(case.targets), streams)


@pytest.mark.parametrize("aug", [False, True], ids=["one-stream", "two-streams"])
def test_lists_hold_the_target_and_every_likely_word(aug, monkeypatch):
    """But for rows with more words than any may list, and for those that come too late for room."""
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", WORDS * 32)  # several chunks
    monkeypatch.setitem(launch.LAUNCHES["levels"], "BLOCK_V", 16)  # several programs a tile
    monkeypatch.setitem(launch.LAUNCHES["list"], "BLOCK", 16)
    monkeypatch.setattr(lists, "SPARSITY", 32)
    monkeypatch.setattr(lists, "ROW_SPARSITY", 4)
    case = make_case(141, 32, WORDS, scale=12, aug=aug, ignored=0.2, bias=True, seed=5)
    for states in (case.hidden, case.aug_hidden)[: 1 + aug]:
        states *= torch.linspace(0.3, 1, 141)[:, None]  # the first rows are flat
    oracle, found = Oracle(case), saved_lists(case)
    log_p, z = oracle.log_p, [oracle.z]
    if aug:
        log_p, z = torch.maximum(log_p, oracle.log_q), [oracle.z, oracle.z_aug]
    likely = log_p >= lists.least_log_prob(3e-3)
    likely.scatter_(1, oracle.kept_targets[:, None], True)
    assert not found.counts[~oracle.kept].any()
    starts, counts = found.starts[oracle.kept].tolist(), found.counts[oracle.kept].tolist()
    long, late, taken = 0, 0, []
    for r, (want, start, count) in enumerate(zip(likely, starts, counts, strict=True)):
        if count == 0:
            too_long = int(want.sum()) > lists.most_words(WORDS)
            long, late = long + too_long, late + (not too_long)
            continue
        place = slice(start, start + count)
        words = found.words[place].long()
        assert words.sort()[0].tolist() == want.nonzero()[:, 0].tolist()
        taken += range(start, start + count)
        for stream, logits in zip(z, found.logits, strict=True):
            torch.testing.assert_close(logits[place].double(), stream[r, words], rtol=0, atol=1e-4)
    print(f"  of {len(counts)} rows {long} have too many words and {late} no room")
    assert len(taken) == len(set(taken)) and max(taken) < lists.places(141, WORDS)
    assert 0 < long < 40 and 0 < late < 80


@pytest.mark.parametrize("bad", [WORDS - 41, 1 << 32])
def test_no_list_holds_a_target_that_is_no_word(bad):
    """Blocks of words have room beyond the last, and a product's memory holds anything there."""
    case = policy_case(40, WORDS - 47, sharpness=36.0)
    want = saved_lists(case).counts
    row = int((want > 0).nonzero()[0])
    case.targets[row] = bad
    found = saved_lists(case, validate=False)
    words = found.words[found.starts[row] :][: found.counts[row]]
    assert len(words) and (words < WORDS - 47).all()
    assert found.counts[row] <= want[row]  # nor another word in its place


@pytest.mark.parametrize(
    ("budget", "outputs"),
    cases(
        [(3e-3, ("logprobs",)), (3e-3, ("aug_entropy",)), (3e-2, OUTPUTS)],
        [(3e-2, ("logprobs",)), (3e-2, ("aug_entropy",)), (3e-3, OUTPUTS)],
    ),
)
def test_each_row_drops_what_it_may_and_keeps_the_rest_exactly(budget, outputs):
    """With the identity as weight, the gradient of the states is that of the logits."""
    n, v = 32, 256
    g = torch.Generator().manual_seed(0)
    logits = -80 * torch.rand(n, v, generator=g)  # every sixth word is likelier than 1e-6
    logits[torch.arange(n), torch.arange(n) * 7] = torch.linspace(0, 6, n)
    near = logits + 0.3 * torch.randn(n, v, generator=g)
    case = Case(logits, torch.eye(v), logits.argmax(1), near)
    upstream = random_upstream(case, outputs)
    with record_certificates() as certificate:
        got = case.gradients(token_stats, upstream, backend=FAST, grad_budget=budget)
    print(f"  kept {certificate.kept:.3f}, share {certificate.largest_share:.1e}")
    assert certificate.dense_rows == 0 and certificate.kept < 0.6
    worst, both = 0.0, torch.zeros(n, v, dtype=torch.bool)
    for name, dz in zip(("hidden", "aug_hidden"), Oracle(case).dz(upstream), strict=True):
        kept, whole = got[name] != 0, dz.abs().sum(1)
        both |= kept
        error = (got[name] - dz)[kept].abs().max() if kept.any() else torch.zeros(())
        assert error < 2e-5 * max(1.0, dz.abs().max())
        typical = whole.square().mean().sqrt().clamp_min(1e-30)
        held = (dz.abs() * ~kept).sum(1) / torch.maximum(whole, typical)
        worst = max(worst, held.max().item())
    print(f"  largest share in float64 {worst:.2e}")
    assert worst <= certificate.largest_share * 1.05 + 1e-5 and certificate.largest_share <= budget
    # It is used, too: rows keep few words more than the budget asks.
    assert certificate.largest_share > 0.5 * budget
    assert both.double().mean().item() == pytest.approx(certificate.kept, abs=2e-3)


def test_a_row_without_a_gradient_drops_no_share_of_it():
    """Nothing of nothing is 0: a NaN would hide what the other rows drop."""
    case = policy_case(8, WORDS, sharpness=36.0)
    upstream = random_upstream(case, ("logprobs",))
    upstream["logprobs"][0] = 0.0
    with record_certificates() as certificate:
        case.gradients(token_stats, upstream, ("hidden",), backend=FAST, budget_of="token")
    assert certificate.dense_rows < 7, "lists did it"
    assert 0 < certificate.largest_share <= 3e-3


@pytest.mark.parametrize(
    ("aug", "wanted"),
    cases(
        [(True, (g,)) for g in GRADS] + [(True, GRADS), (False, GRADS)],
        [(False, (g,)) for g in GRADS if g != "aug_hidden"] + [(True, ("hidden", "weight"))],
    ),
)
def test_whatever_is_asked_for(wanted, aug):
    case = policy_case(40, WORDS, sharpness=36.0)
    case = Case(
        case.hidden, case.weight, case.targets, case.aug_hidden if aug else None,
        torch.linspace(-1, 1, WORDS),
    )  # fmt: skip
    upstream = random_upstream(case)
    exact = Oracle(case).gradients(upstream)
    with record_certificates() as certificate:
        got = case.gradients(token_stats, upstream, wanted, backend=FAST)
    print(f"  kept {certificate.kept:.3f}, {certificate.dense_rows} rows dense")
    assert certificate.dense_rows < 10
    check({g: gradient_error(got[g], exact[g]) for g in got}, 4e-3)


@pytest.mark.parametrize("transposed", cases(["weight", "hidden"], [("aug_hidden",)]))
def test_operands_may_have_any_strides(transposed):
    """`Case.gradients` would copy the operand into the usual ones."""
    case = policy_case(24, WORDS, sharpness=36.0)
    setattr(case, transposed, getattr(case, transposed).T.contiguous().T)
    leaves = {g: getattr(case, g).detach().requires_grad_() for g in GRADS}
    assert leaves[transposed].stride(0) == 1
    stats = replace(case, **leaves).call(token_stats, backend=FAST)
    upstream = random_upstream(case)
    outputs, given = [getattr(stats, o) for o in upstream], [u.float() for u in upstream.values()]
    with record_certificates() as certificate:
        found = torch.autograd.grad(outputs, list(leaves.values()), given)
    assert certificate.kept < 0.01, "lists did it"
    exact = Oracle(case).gradients(upstream)
    check({g: gradient_error(x, exact[g]) for g, x in zip(GRADS, found, strict=True)}, 4e-3)


def test_fewer_words_are_kept_than_by_tiles_on_the_cpu():
    case = policy_case(40, WORDS, sharpness=36.0)
    upstream = random_upstream(case)
    kept = {}
    for backend in ("triton", "torch"):
        with record_certificates() as certificate:
            case.gradients(token_stats, upstream, backend=backend)
        kept[backend] = certificate.kept
    print(f"  kept {kept}")
    assert kept["triton"] < 0.5 * kept["torch"]


def test_rows_that_keep_many_words_go_in_groups(monkeypatch):
    monkeypatch.setattr(lists, "MOST_KEPT", 8)
    case = policy_case(40, WORDS, sharpness=36.0)
    upstream = random_upstream(case)
    exact = Oracle(case).gradients(upstream)
    with record_certificates() as certificate:
        got = case.gradients(token_stats, upstream, backend=FAST)
    assert certificate.rows == 40 and certificate.kept > 0.02
    check({g: gradient_error(got[g], exact[g]) for g in got}, 4e-3)


@pytest.mark.parametrize(
    ("aug", "wanted"),
    cases(
        [(True, GRADS), (False, ("weight", "bias"))],
        [(True, ("aug_hidden",)), (True, ("weight", "bias")), (False, ("hidden",)), (False, GRADS)],
    ),
)
def test_long_lists_share_columns_and_keep_their_other_words(wanted, aug, monkeypatch):
    """The gradients are those of the same entries without columns."""
    monkeypatch.setattr(columns, "FEWEST_ROWS", 1)
    monkeypatch.setattr(columns, "WORDS", 64)
    monkeypatch.setattr(columns, "ROWS", 8)
    case = policy_case(40, WORDS, sharpness=28.0)
    case.aug_hidden = case.aug_hidden if aug else None
    case.bias = torch.linspace(-1, 1, WORDS)
    case.targets[5] = -100
    upstream = random_upstream(case)
    spread, found = [], {}
    kept = columns.spread_kernel

    class Noted:
        def __getitem__(self, grid):
            def launch(at, starts, kept_of, *rest, **options):
                before = int(kept_of.sum())
                kept[grid](at, starts, kept_of, *rest, **options)
                spread.append((len(at), before - int(kept_of.sum())))

            return launch

    monkeypatch.setattr(columns, "spread_kernel", Noted())
    for name, long in (("columns", 4), ("lists", 10**6)):
        monkeypatch.setattr(columns, "LONG", long)
        with record_certificates() as certificate:
            found[name] = case.gradients(token_stats, upstream, wanted, backend=FAST)
    print(f"  kept {certificate.kept:.4f}; rows and entries that moved: {spread}")
    assert len(spread) >= 2 and all(moved > 0 for _, moved in spread)
    exact, given = Oracle(case).gradients(upstream), found["columns"]
    check({g: gradient_error(given[g], found["lists"][g]) for g in given}, 1e-6)
    check({g: gradient_error(given[g], exact[g]) for g in given}, 4e-3)


def test_two_backward_passes_of_one_forward_agree_to_the_last_bit():
    case = policy_case(24, WORDS, sharpness=36.0)
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.aug_hidden, case.weight)]
    stats = token_stats(
        leaves[0], leaves[2], case.targets, aug_hidden=leaves[1], backend=FAST
    )  # fmt: skip
    upstream = random_upstream(case)
    outputs = [getattr(stats, o) for o in upstream]
    given = [u.float() for u in upstream.values()]
    first = torch.autograd.grad(outputs, leaves, given, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_words_that_most_rows_keep_are_summed_whole():
    """One word has an entry of every row: more than a block of them."""
    n, d = 150, 24
    case = make_case(n, d, WORDS, scale=0.3, seed=2)
    case.weight[7] = 0
    case.weight[7, 0] = 12
    case.hidden[:, 0], case.aug_hidden[:, 0] = 1.5, 1.4
    case.targets[:] = 7
    upstream = random_upstream(case, ("logprobs", "aug_entropy"))
    exact = Oracle(case).gradients(upstream)
    got = case.gradients(token_stats, upstream, backend=FAST, grad_budget=0.1)
    word = {"weight[7]": gradient_error(got["weight"][7], exact["weight"][7])}
    check(word | {"hidden": gradient_error(got["hidden"], exact["hidden"])}, 0.1)
