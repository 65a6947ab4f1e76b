"""The Triton backward's groups: many of them, words added later, and rows that end up dense."""

import pytest
import torch
from kernel_oracle import (
    FAST,
    GRADS,
    OUTPUTS,
    Oracle,
    check,
    gradient_error,
    interpreted,
    policy_case,
)
from kernel_oracle import random_upstream as random_upstream_of
from torch.utils._python_dispatch import TorchDispatchMode

from papo_kernels import certificate, record_certificates, rows, token_stats
from papo_kernels.rows import Options, make_call, make_upstream

pytestmark = pytest.mark.skipif(FAST != "triton", reason="about the Triton backend")

if FAST == "triton":
    from papo_kernels.triton import backward, forward, groups, launch


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Tiles of 16 rows and groups of 32: 5 groups, whose last tile is short."""
    monkeypatch.setattr(launch, "TILE", 16)
    monkeypatch.setattr(groups, "GROUP_ROWS", 32)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 48 * 3001)


@pytest.fixture(scope="module")
def case():
    made = policy_case(139, 3001, sharpness=36.0)
    made.targets[[3, 50, 51, 138]] = -100
    return made


def errors(case, upstream, **options):
    exact = Oracle(case).gradients(upstream)
    with record_certificates() as found:
        got = case.gradients(token_stats, upstream, backend="triton", **options)
    print(
        f"  kept {found.kept:.3f}, dense rows {found.dense_rows}, share {found.largest_share:.1e}"
    )
    return {g: gradient_error(got[g], exact[g]) for g in got}, found


def test_many_groups_are_right(case):
    wrong, found = errors(case, random_upstream_of(case))
    check(wrong, dict.fromkeys(GRADS, 4e-3))
    assert found.rows == 135 and found.dense_rows < 64 and found.kept < 0.8
    assert 0 < found.largest_share <= 3e-3


def test_words_that_come_later_complete_the_first(case, monkeypatch):
    """Far too few words at first: what is added then must neither miss nor repeat any."""
    monkeypatch.setattr(groups, "ASSUMED_TIGHTNESS", 1e-7)
    wrong, found = errors(case, random_upstream_of(case))
    check(wrong, dict.fromkeys(GRADS, 4e-3))
    assert found.largest_share <= 3e-3


def test_rows_that_end_up_dense_keep_what_they_got(case, monkeypatch):
    """One attempt with too few words: nearly all rows get the others densely, and are exact."""
    monkeypatch.setattr(groups, "ASSUMED_TIGHTNESS", 1e-7)
    monkeypatch.setattr(groups, "ATTEMPTS", 1)
    wrong, found = errors(case, random_upstream_of(case))
    assert found.dense_rows > 100
    check(wrong, dict.fromkeys(GRADS, 1e-3))


@pytest.mark.parametrize("output", interpreted(["aug_entropy", "kl_reverse"], list(OUTPUTS)))
def test_each_output_alone(case, output):
    wrong, _ = errors(case, random_upstream_of(case, (output,)))
    check(wrong, dict.fromkeys(GRADS, 4e-3))


@pytest.mark.parametrize("left", [1, 64, 2047, 2048, 2049, 2389, 4096, 4097, 100_001])
def test_groups_are_few_and_alike(left, monkeypatch):
    monkeypatch.setattr(groups, "GROUP_ROWS", 2048)
    size = groups._rows_of_groups(left)
    fewest = -(-left // 2048)
    assert -(-left // size) == fewest and size <= 2048
    assert left - (fewest - 1) * size >= size - 64 * fewest, "the last is about as large"


def test_two_calls_give_the_same_bits(case):
    upstream = random_upstream_of(case)
    first, second = (case.gradients(token_stats, upstream, backend="triton") for _ in range(2))
    assert all(torch.equal(first[g], second[g]) for g in first)


class Questions(TorchDispatchMode):
    """How often the host asks for numbers in a way that waits for all that a GPU was given."""

    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "_unique2")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        self.count += name in self.ASKS or by_mask
        return func(*args, **kwargs or {})


def questions(case, monkeypatch, group_rows):
    """(those of one backward pass, how often it reads an answer while the device has other work).

    The pass is called without its operator, which hides what it calls.
    """
    monkeypatch.setattr(groups, "GROUP_ROWS", group_rows)
    asked, tolist = [], launch.Asked.tolist
    monkeypatch.setattr(launch.Asked, "tolist", lambda self: asked.append(self) or tolist(self))
    options = Options(1.0, None, -100, 3e-3, "triton", "", False, False, "call")
    operands = case.hidden, case.aug_hidden, case.weight, case.bias
    call = make_call(*operands, case.targets, options)
    saved = forward.forward(call, keep_levels=True)
    given = random_upstream_of(case)
    upstream = make_upstream(*(given[o].float() for o in OUTPUTS))
    with Questions() as seen:
        grads = backward.backward(call, saved, upstream, [True] * 4)
    assert all(g.isfinite().all() for g in grads)
    return seen.count, len(asked)


def test_the_host_asks_as_often_for_one_group_as_for_many(case, monkeypatch):
    one, many = (questions(case, monkeypatch, n) for n in (256, 32))
    print(f"  {one} and {many} questions and answers")
    assert one[0] == many[0] == 0
    # one about lists, and one for each attempt, of which there may be more with smaller groups
    assert 2 < one[1] <= 2 + certificate.ATTEMPTS and many[1] <= 2 + certificate.ATTEMPTS
