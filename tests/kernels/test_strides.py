"""Operands whose rows are so far apart that 32 bits do not count the elements between them."""

from dataclasses import replace

import pytest
import torch
from kernel_oracle import FAST, GRADS, policy_case, random_upstream

from papo_kernels import token_stats

# Elements between rows: the last of 40 stands 2.6e9 elements behind the first, of 300 words 5e9.
APART = {"hidden": 2**26, "aug_hidden": 2**26, "weight": 2**24}


def far(x, apart, path):
    """A copy of `x` with `apart` elements from row to row, over a file that is mostly holes."""
    size = (len(x) - 1) * apart + x.shape[1]
    assert size > 2**31
    with path.open("wb") as file:
        file.truncate(size * x.element_size())
    whole = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype)
    path.unlink()  # it lives as long as it is mapped
    out = whole.as_strided(x.shape, (apart, 1))
    return out.copy_(x)


def results(case):
    leaves = {g: getattr(case, g).detach().requires_grad_() for g in GRADS}
    stats = replace(case, **leaves).call(token_stats, backend=FAST)
    upstream = random_upstream(case)
    outputs = {o: getattr(stats, o) for o in upstream}
    given = [u.float() for u in upstream.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given)
    return outputs | dict(zip(GRADS, grads, strict=True))


@pytest.mark.parametrize("which", [("hidden", "aug_hidden"), ("weight",)], ids="-".join)
def test_rows_may_be_more_than_two_to_the_31_elements_apart(which, tmp_path, monkeypatch):
    if FAST == "triton":
        from papo_kernels.triton import lists

        for name, value in (("MOST_WORDS", 4096), ("SPARSITY", 4), ("ROW_SPARSITY", 2)):
            monkeypatch.setattr(lists, name, value)  # half of the rows have lists, the others not
    case = policy_case(40, 300, sharpness=24.0)
    case.bias = torch.linspace(-1, 1, 300)
    expected = results(case)
    for name in which:
        setattr(case, name, far(getattr(case, name), APART[name], tmp_path / name))
    found = results(case)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
