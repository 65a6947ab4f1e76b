"""Refusals, dispatch, costs and the ways a trainer calls `token_stats`."""

import logging
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from kernel_oracle import GRADS, OUTPUTS, Case, check, gradient_error, make_case, random_upstream
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import papo_kernels
from papo_kernels import TokenStats, dense_rows, op, rows, token_stats

H, W, Y = torch.randn(4, 3), torch.randn(7, 3), torch.tensor([0, 6, 2, -100])

BAD = {
    "hidden-list": (([[1.0]], W, Y), {}, r"hidden is a list; expected a torch.Tensor"),
    "hidden-3d": ((H[None], W, Y), {}, r"hidden is \(1, 4, 3\) float32 on cpu; expected \(N, D\)"),
    "hidden-int": ((H.long(), W, Y), {}, r"hidden is \(4, 3\) int64 on cpu; expected float16"),
    "weight-width": ((H, W[:, :2], Y), {}, r"weight is \(7, 2\) .*; expected \(V, 3\)"),
    "weight-empty": ((H, W[:0], Y), {}, r"weight is \(0, 3\) .*; expected \(V, 3\) with V > 0"),
    "weight-device": ((H, W.to("meta"), Y), {}, r"weight is on meta; expected .* hidden, cpu"),
    "targets-length": ((H, W, Y[:3]), {}, r"targets is \(3,\) int64 on cpu; expected \(4,\) int64"),
    "targets-dtype": ((H, W, Y.int()), {}, r"targets is \(4,\) int32 on cpu; expected \(N,\) int64"),
    "targets-high": ((H, W, torch.tensor([0, 1, 7, 1])), {}, r"targets\[2\] is 7; expected .*\[0, 7\)"),
    "targets-low": ((H, W, torch.tensor([0, -1, 2, 1])), {}, r"targets\[1\] is -1; expected .*\[0, 7\)"),
    "aug-shape": ((H, W, Y), {"aug_hidden": H[:3]}, r"aug_hidden is \(3, 3\) .*; expected \(4, 3\)"),
    "aug-dtype": ((H, W, Y), {"aug_hidden": H.int()}, r"aug_hidden is .* int32 .*; expected float16"),
    "bias-shape": ((H, W, Y), {"bias": W[:, :1]}, r"bias is \(7, 1\) float32 on cpu; expected \(7,\)"),
    "hidden-sparse": ((H.to_sparse(), W, Y), {}, r"hidden is \(4, 3\) .* in torch.sparse_coo; expected a dense"),
    "weight-sparse": ((H, W.to_sparse(), Y), {}, r"weight is .* in torch.sparse_coo; expected a dense"),
    "targets-sparse": ((H, W, Y.to_sparse()), {}, r"targets is .* in torch.sparse_coo; expected a dense"),
    "aug-mkldnn": ((H, W, Y), {"aug_hidden": H.to_mkldnn()}, r"aug_hidden is .* in torch._mkldnn; expected a dense"),
    "vocab_group": ((H, W, Y), {"vocab_group": "tp"}, r"vocab_group is 'tp'; expected a torch.distributed.ProcessGroup"),
    "vocab_group-outside": ((H, W, Y), {"vocab_group": dist.GroupMember.NON_GROUP_MEMBER}, r"vocab_group is .* that this rank is in"),
    "temperature-0": ((H, W, Y), {"temperature": 0.0}, r"temperature is 0.0; expected a number in \[1e-06, 1e\+06\]"),
    "temperature-nan": ((H, W, Y), {"temperature": float("nan")}, r"temperature is nan; expected"),
    "softcap": ((H, W, Y), {"softcap": -1.0}, r"softcap is -1.0; expected a number in \[1e-06, 1e\+06\], or None"),
    "ignore_index": ((H, W, Y), {"ignore_index": None}, r"ignore_index is None; expected an int"),
    "aug_constant": ((H, W, Y), {"aug_constant": 1}, r"aug_constant is 1; expected True or False"),
    "grad_budget": ((H, W, Y), {"grad_budget": 1.0}, r"grad_budget is 1.0; expected .*\[0, 1\)"),
    "backend": ((H, W, Y), {"backend": "cuda"}, r"backend is 'cuda'; expected one of 'auto', 'triton'"),
}  # fmt: skip
# ruff: noqa: E501


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    args, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        token_stats(*args, **options)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_shard_that_nobody_gathered_is_named_with_the_ways_to_pass_it(backend, mesh):
    def sharded(x):
        return distribute_tensor(x, mesh, [Shard(0)])

    with pytest.raises(ValueError, match=r"weight is a DTensor; .*FSDP2.*Partial\('avg'\)"):
        token_stats(H, sharded(W), Y, backend=backend)
    with pytest.raises(ValueError, match="hidden is a DTensor; expected the plain tensor"):
        token_stats(sharded(H), W, Y, backend=backend)


def test_unchecked_target_gives_nan_and_touches_no_other_row():
    case = make_case(6, 8, 50)
    want = case.call(token_stats)
    case.targets[2], case.targets[4] = 50, -7
    for backend in ("torch", "reference"):
        stats = case.call(token_stats, backend=backend, validate=False)
        for got, value in (
            (stats.logprobs, want.logprobs),
            (stats.aug_logprobs, want.aug_logprobs),
        ):
            assert got[[2, 4]].isnan().all()
            assert torch.allclose(got[[0, 1, 3, 5]], value[[0, 1, 3, 5]])
        assert torch.allclose(stats.kl_prcp, want.kl_prcp)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "hidden is on cpu, and the kernels need a GPU; backend='torch' can"),
        ({"weight": W.double()}, "hidden is on cpu"),
    ],
)
def test_triton_says_why_it_cannot_run(options, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match="backend='triton' cannot run here: " + message):
        token_stats(H, options.get("weight", W), Y, backend="triton")


def test_auto_runs_torch_on_the_cpu_without_a_word(caplog):
    case = make_case(6, 8, 50)
    with caplog.at_level(logging.DEBUG, logger="papo_kernels"):
        got = case.call(token_stats)
    assert not caplog.records
    want = case.call(token_stats, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class OnGPU:
    device, dtype = torch.device("cuda"), torch.float64


def test_auto_on_a_gpu_says_once_why_it_runs_torch(caplog):
    with caplog.at_level(logging.WARNING, logger="papo_kernels"):
        for _ in range(2):
            assert (
                papo_kernels.api._choose_backend("auto", (OnGPU, None, OnGPU, None), None)
                == "torch"
            )
    assert [r.message for r in caplog.records] == [
        "token_stats on cuda runs the torch backend: an operand is float64"
    ]


def test_result_is_a_tuple_with_names():
    stats = token_stats(H, W, Y)
    assert isinstance(stats, TokenStats) and stats._fields == OUTPUTS
    assert stats[2:] == (None,) * 4
    assert {s.dtype for s in stats[:2]} == {torch.float32}
    for dtype in (torch.bfloat16, torch.float16):
        assert token_stats(H.to(dtype), W.to(dtype), Y).logprobs.dtype == torch.float32


class MatmulFlops(TorchDispatchMode):
    """Counts what FlopCounterMode does not: it knows no in-place `addmm_`."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.total += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        assert name not in ("bmm", "baddbmm", "matmul", "linear", "einsum")
        return func(*args, **kwargs or {})


@pytest.fixture
def inside(monkeypatch):
    """Runs a function with a dispatch mode inside the custom operators, which modes do not enter."""

    def run(mode, function):
        def watched(original):
            def call(*args):
                with mode:
                    return original(*args)

            return call

        with monkeypatch.context() as patch:
            for name in ("forward_of", "backward_of"):
                patch.setattr(op, name, watched(getattr(op, name)))
            function()
        return mode

    return run


def test_matmuls_are_only_those_asked_for(inside):
    def count_flops(run):
        return inside(MatmulFlops(), run).total

    n, d, v = 60, 16, 301
    case = make_case(n, d, v, bias=True)
    unit = 2 * n * d * v
    one = Case(case.hidden, case.weight, case.targets)
    assert count_flops(lambda: one.call(token_stats)) == unit
    assert count_flops(lambda: case.call(token_stats)) == 2 * unit
    case.targets[: n // 2] = -100
    assert count_flops(lambda: case.call(token_stats)) == unit

    case.targets[: n // 2] = 0

    def backward(outputs, wanted, **options):
        options["grad_budget"] = 0.0
        upstream = random_upstream(case, outputs)
        # Forward 2, recomputation 2 at most, then one product per gradient and stream.
        return (
            count_flops(lambda: case.gradients(token_stats, upstream, wanted, **options)) / unit - 2
        )

    assert backward(OUTPUTS, GRADS) == 6
    assert backward(("logprobs",), ("hidden",)) == 2
    assert backward(("logprobs",), ("hidden", "aug_hidden", "weight")) == 3
    assert backward(("kl_prcp",), ("aug_hidden",)) == 3
    assert backward(("aug_entropy",), ("weight",)) == 2
    # With q constant: both streams' logits where a KL compares them, and products of one stream.
    assert backward(OUTPUTS, GRADS, aug_constant=True) == 4
    assert backward(("kl_reverse",), ("hidden",), aug_constant=True) == 3
    assert backward(("logprobs", "aug_entropy"), GRADS, aug_constant=True) == 3


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes that any operation's result lives in."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_more_than_a_chunk_of_logits(dtype, monkeypatch, inside):
    assert dense_rows.MOST_ROWS * dense_rows.LEAST_WORDS <= rows.CHUNK_ELEMENTS
    monkeypatch.setattr(rows, "CHUNK_ELEMENTS", 100_000)
    monkeypatch.setattr(rows, "COPY_ELEMENTS", 2_000)
    monkeypatch.setattr(dense_rows, "BLOCK_ELEMENTS", 100_000)
    monkeypatch.setattr(dense_rows, "LEAST_WORDS", 1)
    case = make_case(300, 4, 2000, dtype=dtype)
    largest = inside(LargestTensor(), lambda: case.call(token_stats, backend="torch"))
    assert 4 * 50_000 <= largest.nbytes <= 4 * 100_000
    upstream = random_upstream(case)
    inside(largest, lambda: case.gradients(token_stats, upstream, backend="torch"))
    assert largest.nbytes <= 4 * 100_000 < 4 * 300 * 2000


def test_no_grad_keeps_nothing():
    case = make_case(6, 8, 50)
    case.weight.requires_grad_()
    want = case.call(token_stats)
    assert want.logprobs.requires_grad
    with torch.no_grad():
        got = case.call(token_stats)
    assert not got.logprobs.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_changes_nothing():
    case = make_case(20, 8, 300)
    upstream = random_upstream(case)
    want, want_grads = case.call(token_stats), case.gradients(token_stats, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, got_grads = case.call(token_stats), case.gradients(token_stats, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(got_grads[g], want_grads[g]) for g in want_grads)


def test_mixed_dtypes_are_promoted():
    case = make_case(20, 8, 300)
    low = Case(case.hidden.bfloat16(), case.weight, case.targets, case.aug_hidden.bfloat16())
    high = Case(low.hidden.float(), case.weight, case.targets, low.aug_hidden.float())
    got, want = low.call(token_stats), high.call(token_stats)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_tied_weight_sums_both_of_its_gradients():
    table = torch.randn(50, 8, requires_grad=True)
    tokens, targets = torch.arange(20), torch.arange(20) + 1
    token_stats(table[tokens], table, targets, grad_budget=0.0).logprobs.sum().backward()
    got, table.grad = table.grad, None
    logits = table[tokens] @ table.T
    (-torch.nn.functional.cross_entropy(logits, targets, reduction="sum")).backward()
    check({"table": gradient_error(got, table.grad.double())}, 1e-5)


def test_imports_and_runs_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from papo_kernels import token_stats\n"
        "h = torch.randn(4, 3, requires_grad=True)\n"
        "token_stats(h, torch.randn(7, 3), torch.arange(4)).logprobs.sum().backward()\n"
        "assert h.grad.any()\n"
    )
    root = str(papo_kernels.__path__[0]).rsplit("/", 1)[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
