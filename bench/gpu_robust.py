"""Checks of how the kernels behave on a GPU beside being right: repeats, streams, graphs, modes."""

import functools

import gpu_check
import torch
from gpu_check import TINY, on
from kernel_oracle import GRADS, gradient_error, make_case, policy_case, random_upstream

from papo_kernels import token_stats

REPEATS = 50
# Poisoned before each repetition: as much as the calls use, and more.
POISON_BYTES = {"cuda": 2**30, "cpu": 2**24}
HALF_ROWS = 16_384
# Cycles that a stream sleeps before its operands are there; about 50 ms.
SLEEP = 100_000_000
# What float32 sums in another order may change in a gradient that is returned in 16 bits.
OTHER_ORDER = 1e-3


def checks(run):
    """The section: in the order of what is likeliest to be wrong."""
    case = _policy(run)
    run.check("repeated, memory poisoned by NaN", lambda: repeated(run, case))
    run.check("deterministic algorithms, repeated", lambda: deterministic(run, case))
    run.check("float16, upstream gradients of 1/N", lambda: _half(run))
    gpu_check.others(run)
    run.check("torch.compile(fullgraph=True)", lambda: compiled(run, case))
    for what, function in (
        ("another stream", other_stream),
        ("CUDA graph of the forward", graph),
        ("another current device", other_device),
    ):
        reason = "needs a GPU" if run.interpreted else ""
        if what == "another current device" and torch.cuda.device_count() < 2:
            reason = "needs two GPUs"
        if reason:
            run.leave_out(what, reason)
        else:
            run.check(what, functools.partial(function, run, case))


def _policy(run):
    """A case in bfloat16 of which the backward leaves out words."""
    n, v = (70, 1003) if run.interpreted else (1000, 30_011)
    case = policy_case(n, v, sharpness=20.0, d=72, dtype=torch.bfloat16)
    return on(run.device, case)


def poison(device):
    """Fills memory that the next calls will be given with NaN, and frees it."""
    size = POISON_BYTES[device.type]
    # Of several sizes: an allocator keeps apart what is small and what is large.
    for part in (2**9, 2**12, 2**16, 2**20):
        held = [torch.full((part // 4,), torch.nan, device=device) for _ in range(64)]
        del held
    held = [torch.full((size // 32,), torch.nan, device=device) for _ in range(8)]
    del held


def _results(case, upstream, **options):
    """Statistics and gradients of one call, by name."""
    found = case.call(token_stats, backend="triton", **options)._asdict()
    return found | case.gradients(token_stats, upstream, backend="triton", **options)


def _upstream(case):
    return {o: u.to(case.hidden.device) for o, u in random_upstream(case).items()}


def _differences(got, want, names):
    """{name: (elements that differ in a bit, 0)}."""
    return {n: (int((got[n] != want[n]).sum()), 0) for n in names}


def _worst(many):
    """The largest error of each name."""
    found = {}
    for errors in many:
        for name, (error, bound) in errors.items():
            found[name] = (max(error, found.get(name, (0,))[0]), bound)
    return found


def repeated(run, case, repeats=None):
    """Statistics and gradients of states to the last bit; the weight's, sums over rows, nearly."""
    upstream = _upstream(case)
    want = _results(case, upstream)
    exact = [n for n in want if n not in ("weight", "bias")]

    def once():
        poison(run.device)
        got = _results(case, upstream)
        near = {g: (gradient_error(got[g], want[g].double()), OTHER_ORDER) for g in GRADS[2:]}
        return _differences(got, want, exact) | near

    return _worst(once() for _ in range(repeats or (2 if run.interpreted else REPEATS)))


def deterministic(run, case):
    """All to the last bit."""
    upstream = _upstream(case)
    torch.use_deterministic_algorithms(True)
    try:
        want = _results(case, upstream)

        def once():
            poison(run.device)
            return _differences(_results(case, upstream), want, want)

        return _worst(once() for _ in range(1 if run.interpreted else 10))
    finally:
        torch.use_deterministic_algorithms(False)


def _half(run):
    rows, v = (66, 1003) if run.interpreted else (HALF_ROWS, 4099)
    case = make_case(rows, 72, v, peak=6, dtype=torch.float16)
    return gpu_check.errors_of(
        case, run.device, oracle_device=run.device, scale=1 / HALF_ROWS
    )  # fmt: skip


def compiled(run, case):
    """A compiled function of `token_stats`, against the same function as it is."""
    wanted = {g: getattr(case, g).detach().clone().requires_grad_() for g in GRADS}

    def loss(hidden, aug_hidden, weight, bias):
        stats = token_stats(
            hidden, weight, case.targets, aug_hidden=aug_hidden, bias=bias, backend="triton"
        )
        return (stats.logprobs + 0.1 * stats.entropy - 0.1 * stats.kl_prcp).mean()

    backend = "aot_eager" if run.interpreted else "inductor"
    found = {}
    for name, function in (
        ("eager", loss),
        ("compiled", torch.compile(loss, fullgraph=True, backend=backend)),
    ):
        value = function(*wanted.values())
        found[name] = (value.detach(), *torch.autograd.grad(value, tuple(wanted.values())))
    pairs = zip(("loss", *GRADS), found["compiled"], found["eager"], strict=True)
    return {n: (gradient_error(a, b.double()), OTHER_ORDER) for n, a, b in pairs}


def other_stream(run, case):
    """On a stream whose operands are not there yet: a kernel on another stream would read NaN."""
    upstream = _upstream(case)
    want = _results(case, upstream)
    late = on(run.device, case)
    for name in ("hidden", "aug_hidden"):
        setattr(late, name, torch.full_like(getattr(case, name), torch.nan))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        for name in ("hidden", "aug_hidden"):
            getattr(late, name).copy_(getattr(case, name))
        got = _results(late, upstream)
    stream.synchronize()
    return _differences(got, want, [n for n in want if n not in ("weight", "bias")])


@torch.no_grad()
def graph(run, case):
    """Captured once, replayed on other operands."""
    still = on(run.device, case)
    still.hidden, still.aug_hidden = case.hidden.clone(), case.aug_hidden.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        still.call(token_stats, backend="triton")
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = still.call(token_stats, backend="triton")
    still.hidden.copy_(case.hidden.flip(0))
    captured.replay()
    want = still.call(token_stats, backend="triton")
    return _differences(got._asdict(), want._asdict(), want._fields)


def other_device(run, case):
    """Operands on the second GPU while the first is the current one."""
    upstream = _upstream(case)
    want = _results(case, upstream)
    there = on("cuda:1", case)
    found = _results(there, {o: u.to("cuda:1") for o, u in upstream.items()})
    got = {n: x.to(run.device) for n, x in found.items()}
    return _differences(got, want, [n for n in want if n not in ("weight", "bias")])


def tiny():
    """One forward and backward of a tiny case, for tools that watch every access to memory."""
    case = on("cuda", TINY(dtype=torch.bfloat16))
    _results(case, _upstream(case))
    torch.cuda.synchronize()


if __name__ == "__main__":
    tiny()
