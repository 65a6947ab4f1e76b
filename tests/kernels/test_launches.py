"""How much a Triton backward asks of the host: each operator and each kernel takes microseconds."""

import pytest
from kernel_oracle import FAST, OUTPUTS, policy_case, random_upstream
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from papo_kernels import rows
from papo_kernels.rows import Options, make_call, make_upstream

if FAST != "triton":
    pytest.skip("about the Triton backend", allow_module_level=True)

from triton.runtime import interpreter

from papo_kernels.triton import backward, forward, groups, launch, lists

# Operators and kernels of a backward beside those of its groups' words, and of each part of these.
FIXED, OF_PART = 65, 13


class Launches(TorchDispatchMode):
    """Counts torch's operators but for those that make views or room, and Triton's kernels."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, run = 0, interpreter.GridExecutor.__call__

        def counted(kernel, *args, **kwargs):
            self.count += 1
            with _disable_current_modes():  # the interpreter's own
                return run(kernel, *args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = [r.alias_info for r in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returned)
        self.count += not view and "empty" not in func.name()
        return func(*args, **kwargs or {})


def launches(monkeypatch, group_rows, with_lists=True, n=139, sharpness=36.0):
    """(launches of a backward pass, parts of words of its groups)."""
    monkeypatch.setattr(launch, "TILE", 16)
    monkeypatch.setattr(groups, "GROUP_ROWS", group_rows)
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 48 * 3001)
    monkeypatch.setattr(lists, "MOST_WORDS", 4096 if with_lists else 0)
    case, parts, add = policy_case(n, 3001, sharpness=sharpness), [], groups.add_products
    monkeypatch.setattr(groups, "add_products", lambda *args: parts.append(args) or add(*args))
    options = Options(1.0, None, -100, 3e-3, "triton", "", False, False, "call")
    operands = case.hidden, case.aug_hidden, case.weight, case.bias
    call = make_call(*operands, case.targets, options)
    saved = forward.forward(call, keep_levels=True)
    upstream = make_upstream(*(x.float() for x in random_upstream(case).values()))
    assert all(x is not None for x in upstream.flat) and len(upstream.flat) == len(OUTPUTS)
    with Launches(monkeypatch) as seen:
        grads = backward.backward(call, saved, upstream, [True] * 4)
    assert all(g.isfinite().all() for g in grads)
    return seen.count, len(parts)


@pytest.mark.parametrize(("group_rows", "with_lists"), [(256, True), (32, False)])
def test_a_backward_takes_few_launches(group_rows, with_lists, monkeypatch):
    """With operators for the account of rows and for levels it took 600 beside its groups."""
    count, parts = launches(monkeypatch, group_rows, with_lists)
    print(f"  {count} launches, {parts} parts of words")
    assert parts >= (2 if with_lists else 10)
    assert count <= FIXED + OF_PART * parts


def test_a_backward_of_rows_that_lists_serve_takes_fewer_still(monkeypatch):
    count, parts = launches(monkeypatch, 256, n=40, sharpness=64.0)
    print(f"  {count} launches, {parts} parts of words")
    assert parts == 0
    assert count <= 40
