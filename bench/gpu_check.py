"""The kernels' contract on a GPU, without pytest: cases against float64, in three dtypes."""

import functools

import torch
from kernel_oracle import (
    GRADS,
    Case,
    Oracle,
    gradient_error,
    make_case,
    random_upstream,
    statistic_error,
)

from papo_kernels import token_stats

# Largest errors that the contract of the kernels allows.
STATISTICS = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
DENSE, SPARSE = 1e-5, 4e-3


def integer_logits(dtype, vocab=513):
    """Logits that no dtype rounds, to ±1e4 in float32: the tolerance is the contract's even so."""
    spread = 10_000 if dtype == torch.float32 else 256
    g = torch.Generator().manual_seed(7)
    hidden, aug_hidden = torch.randint(-spread, spread + 1, (2, 40, vocab), generator=g).to(dtype)
    targets = torch.randint(0, vocab, (40,), generator=g)
    return Case(hidden, torch.eye(vocab, dtype=dtype), targets, aug_hidden)


def flat(dtype):
    """A maximum that starts at 0, or a padded column that counts, would show."""
    hidden = torch.full((3, 1), -256.0, dtype=dtype)
    return Case(hidden, torch.ones(1025, 1, dtype=dtype), torch.tensor([0, 1024, 512]), hidden + 2)


def _drawn(**options):
    return functools.partial(make_case, **options)


CASES = {
    "odd sizes, ignored rows": _drawn(n=300, d=136, v=5003, peak=6, ignored=0.2),
    "bias, soft cap, temperature": _drawn(
        n=130, d=200, v=2100, peak=6, bias=True, softcap=20.0, temperature=0.7
    ),
    "integer logits": integer_logits,
    "p close to q": _drawn(n=128, d=128, v=4096, peak=6, distance=1e-3),
    "flat": flat,
    "one stream": _drawn(n=70, d=96, v=3001, peak=6, aug=False),
    "one row": _drawn(n=1, d=64, v=1000, peak=6),
    "no rows": _drawn(n=0, d=64, v=1000),
}
TINY = _drawn(n=70, d=72, v=1003, peak=6, ignored=0.2)


def check_kernels(run):
    """Number of checks that failed; what was checked goes to run.content["correctness"]."""
    cases = dict(list(CASES.items())[: 2 if run.quick else None])
    if run.tiny:
        cases = {"tiny": TINY}
    wrong = done = 0
    for name, make in cases.items():
        for dtype in STATISTICS:
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            # Every dtype is checked once, however slow the compiler is.
            if run.over() and done >= len(STATISTICS):
                run.leave_out(f"check: {what}")
                continue
            errors = errors_of(make(dtype=dtype), run.device)
            if done < len(STATISTICS):
                errors["NaN in other rows"] = (_nan_elsewhere(dtype, run.device), 0)
            bad = [n for n, (error, bound) in errors.items() if not error <= bound]
            run.add(
                "correctness",
                {"case": what, "errors": {n: e for n, (e, _) in errors.items()}, "failed": bad},
            )
            done += 1
            wrong += len(bad)
            print(f"{what:48s} {'FAILED' if bad else 'ok'}")
            for n in bad:
                print("  {}: error {:.2e}, bound {:.1e}".format(n, *errors[n]))
    return wrong


def _on(device, case):
    names = ("hidden", "weight", "targets", "aug_hidden", "bias")
    moved = [None if x is None else x.to(device) for x in (getattr(case, n) for n in names)]
    return Case(*moved, case.temperature, case.softcap)


def errors_of(case, device):
    """{what: (error, bound)} of statistics, exact and sparse gradients."""
    dtype = case.hidden.dtype
    upstream = random_upstream(case)
    oracle = Oracle(case)
    want, exact = oracle.statistics(), oracle.gradients(upstream)
    rounded = dict.fromkeys(exact, 0.0)
    if dtype != torch.float32:
        found = oracle.gradients(upstream, rounded=dtype)
        rounded = {g: gradient_error(found[g], exact[g]) for g in exact}
    here = _on(device, case)
    stats = here.call(token_stats, backend="triton")
    errors = {
        o: (statistic_error(getattr(stats, o).cpu(), want[o]), STATISTICS[dtype])
        for o in case.outputs
    }
    upstream = {o: u.to(device) for o, u in upstream.items()}
    for budget, bound in ((0.0, DENSE), (3e-3, SPARSE)):
        got = here.gradients(
            token_stats, upstream, [g for g in GRADS if g in exact], backend="triton",
            grad_budget=budget,
        )  # fmt: skip
        for g, x in got.items():
            error = gradient_error(x.cpu(), exact[g])
            allowed = bound + 1.5 * rounded[g] if budget else max(bound, 1.5 * rounded[g])
            errors[f"{g}, grad_budget={budget:g}"] = (error, allowed)
    return errors


def _nan_elsewhere(dtype, device):
    """How many rows are not as they should be where one of them holds a NaN."""
    case = _on(device, make_case(31, 64, 1003, seed=11, dtype=dtype))
    clean = case.call(token_stats, backend="triton")
    case.hidden[7, 3] = torch.nan
    stats = case.call(token_stats, backend="triton")
    others = torch.arange(31, device=device) != 7
    wrong = int(not stats.logprobs[7].isnan()) + int(not stats.kl_prcp[7].isnan())
    for got, want in zip(stats, clean, strict=True):
        wrong += int((got[others] != want[others]).sum())
    return wrong
