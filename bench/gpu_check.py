"""The kernels' contract on a GPU, without pytest: cases against float64, in three dtypes."""

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
CASES = {
    "odd sizes, ignored rows": dict(n=300, d=136, v=5003, peak=6, ignored=0.2),
    "bias, soft cap, temperature": dict(
        n=130, d=200, v=2100, peak=6, bias=True, softcap=20.0, temperature=0.7
    ),
    "p close to q": dict(n=128, d=128, v=4096, peak=6, distance=1e-3),
    "one stream": dict(n=70, d=96, v=3001, peak=6, aug=False),
    "one row": dict(n=1, d=64, v=1000, peak=6),
    "no rows": dict(n=0, d=64, v=1000),
}


def check_kernels(run):
    """Number of checks that failed; what was checked goes to run.content["correctness"]."""
    cases = list(CASES.items())
    if run.quick or run.tiny:
        cases = cases[: 1 if run.tiny else 2]
    if run.tiny:
        small = {"n": 70, "d": 72, "v": 1003}
        cases = [(name, options | small) for name, options in cases]
    wrong = done = 0
    for name, options in cases:
        for dtype in STATISTICS:
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            # Every dtype is checked once, however slow the compiler is.
            if run.over() and done >= len(STATISTICS):
                run.leave_out(f"check: {what}")
                continue
            errors = errors_of(options, dtype, run.device)
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


def errors_of(options, dtype, device):
    """{what: (error, bound)} of statistics, exact and sparse gradients."""
    case = make_case(**options, dtype=dtype)
    upstream = random_upstream(case)
    oracle = Oracle(case)
    want, exact = oracle.statistics(), oracle.gradients(upstream)
    rounded = {g: 0.0 for g in exact}
    if dtype != torch.float32:
        found = oracle.gradients(upstream, rounded=dtype)
        rounded = {g: gradient_error(found[g], exact[g]) for g in exact}
    names = ("hidden", "weight", "targets", "aug_hidden", "bias")
    moved = [None if x is None else x.to(device) for x in (getattr(case, n) for n in names)]
    here = Case(*moved, case.temperature, case.softcap)
    stats = here.call(token_stats, backend="triton")
    errors = {
        o: (statistic_error(getattr(stats, o).cpu(), want[o]), STATISTICS[dtype])
        for o in case.outputs
    }
    upstream = {o: u.to(device) for o, u in upstream.items()}
    for budget, bound in ((0.0, DENSE), (5e-3, SPARSE)):
        got = here.gradients(
            token_stats, upstream, [g for g in GRADS if g in exact], backend="triton",
            grad_budget=budget,
        )  # fmt: skip
        for g, x in got.items():
            error = gradient_error(x.cpu(), exact[g])
            allowed = max(bound, 1.5 * rounded[g]) if not budget else bound + 1.5 * rounded[g]
            errors[f"{g}, grad_budget={budget:g}"] = (error, allowed)
    return errors
