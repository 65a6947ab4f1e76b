"""The kernels' contract on a GPU, without pytest: cases against float64, in three dtypes."""

import functools

import torch
from kernel_oracle import (
    GRADS,
    Case,
    Oracle,
    gradient_error,
    make_case,
    policy_case,
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
    """A maximum that starts at 0, or a padded column that counts, would show.

    Its exact gradients of the states are 0, so there is nothing that errors could be relative to.
    """
    hidden = torch.full((3, 1), -256.0, dtype=dtype)
    return Case(hidden, torch.ones(1025, 1, dtype=dtype), torch.tensor([0, 1024, 512]), hidden + 2)


def banned_words(dtype):
    """A bias of -inf on a quarter of the words, none of them a target, and of 0 to 1 elsewhere."""
    case = make_case(66, 72, 1003, peak=6, bias=True, dtype=dtype)
    banned = torch.rand(1003, generator=torch.Generator().manual_seed(3)) < 0.25
    banned[case.targets] = False
    case.bias = case.bias.clamp(0, 1).masked_fill(banned, -torch.inf)
    return case


def transposed_weight(dtype):
    """A weight whose features, not words, lie beside each other."""
    case = make_case(66, 72, 1003, peak=6, dtype=dtype)
    case.weight = case.weight.T.contiguous().T
    return case


def peaked_and_transposed(dtype):
    """Rows that their own lists serve, and operands of which none has the usual strides."""
    case = policy_case(66, 8192, sharpness=36.0, dtype=dtype)
    for name in ("hidden", "aug_hidden", "weight"):
        setattr(case, name, getattr(case, name).T.contiguous().T)
    return case


def _drawn(**options):
    return functools.partial(make_case, **options)


# Odd sizes of several tiles of rows and blocks of words; an interpreter runs them too.
CASES = {
    "odd sizes, ignored rows": _drawn(n=130, d=136, v=2503, peak=6, ignored=0.2),
    "bias, soft cap, temperature": _drawn(
        n=66, d=104, v=1547, peak=6, bias=True, softcap=20.0, temperature=0.7
    ),
    "integer logits": integer_logits,
    "p close to q": _drawn(n=66, d=96, v=1536, peak=6, distance=1e-3),
    "flat": flat,
    "one stream": _drawn(n=70, d=72, v=2003, peak=6, aug=False),
    "one row": _drawn(n=1, d=64, v=1000, peak=6),
    "no rows": _drawn(n=0, d=64, v=1000),
    "banned words": banned_words,
    "frozen weight": _drawn(n=66, d=72, v=1003, peak=6),
    "transposed weight": transposed_weight,
    "soft cap 30": _drawn(n=66, d=72, v=1003, peak=20, scale=8.0, softcap=30.0),
    "soft cap 100": _drawn(n=66, d=72, v=1003, peak=20, scale=8.0, softcap=100.0),
}
# Large vocabularies, which take an interpreter long; its tests have smaller ones.
LARGE = {"peaked rows, transposed operands": peaked_and_transposed}
# The gradients that a case asks for, where not all.
WANTED = {"flat": (), "frozen weight": ("hidden", "aug_hidden")}
TINY = _drawn(n=70, d=72, v=1003, peak=6, ignored=0.2)
FIRST = 2


def shown(dtype):
    return str(dtype).removeprefix("torch.")


def first(run):
    """Two cases in three dtypes, and NaN: before anything is timed, in seconds."""
    for name in list(CASES)[:FIRST]:
        _check_case(run, name)
    for dtype in STATISTICS:
        run.check(
            f"NaN in other rows, {shown(dtype)}",
            lambda t=dtype: {"rows": (_nan_elsewhere(t, run.device), 0)},
        )


def others(run):
    """The other cases, in three dtypes, and what the first section had no time for.

    The interpreter computes in float32 whatever the dtype: it gets one of them.
    """
    for name in CASES if run.interpreted else CASES | LARGE:
        _check_case(run, name, [torch.float32] if run.interpreted else STATISTICS)


def _check_case(run, name, dtypes=STATISTICS):
    done = run.content["tried"].get("first", [])
    for dtype in dtypes:
        what = f"{name}, {shown(dtype)}"
        if run.section != "first" and what in done:
            continue
        run.check(
            what,
            lambda t=dtype: errors_of(
                (CASES | LARGE)[name](dtype=t), run.device, WANTED.get(name, GRADS)
            ),
        )


def on(device, case):
    """The case with its operands on another device; strides stay."""
    names = ("hidden", "weight", "targets", "aug_hidden", "bias")
    moved = [None if x is None else x.to(device) for x in (getattr(case, n) for n in names)]
    return Case(*moved, case.temperature, case.softcap)


def errors_of(case, device, wanted=GRADS, oracle_device="cpu", scale=1.0):
    """{what: (error, bound)} of statistics, exact and sparse gradients.

    oracle_device: where float64 is computed. scale: of the upstream gradients, whose own rounding
    no kernel may add to: the bounds are those of upstream gradients of about 1.
    """
    dtype = case.hidden.dtype
    truth, here = on(oracle_device, case), on(device, case)
    upstream = {o: u.to(oracle_device) for o, u in random_upstream(case).items()}
    oracle = Oracle(truth)
    want, exact = oracle.statistics(), oracle.gradients(upstream)
    rounded = dict.fromkeys(exact, 0.0)
    if dtype != torch.float32:
        found = oracle.gradients(upstream, rounded=dtype)
        rounded = {g: gradient_error(found[g], exact[g]) for g in exact}
        # The gradients are returned in the dtype, at their true scale.
        for g, x in exact.items():
            small = scale * x
            rounded[g] = max(rounded[g], gradient_error(small.to(dtype), small))
    stats = here.call(token_stats, backend="triton")
    errors = {
        o: (statistic_error(getattr(stats, o).to(oracle_device), want[o]), STATISTICS[dtype])
        for o in case.outputs
    }
    asked = [g for g in wanted if g in exact]
    upstream = {o: scale * u.to(device) for o, u in upstream.items()}
    for budget, bound in ((0.0, DENSE), (3e-3, SPARSE)) if asked else ():
        got = here.gradients(token_stats, upstream, asked, backend="triton", grad_budget=budget)
        for g, x in got.items():
            error = gradient_error(x.to(oracle_device), scale * exact[g])
            allowed = bound + 1.5 * rounded[g] if budget else max(bound, 1.5 * rounded[g])
            errors[f"{g}, grad_budget={budget:g}"] = (error, allowed)
    return errors


def _nan_elsewhere(dtype, device):
    """How many rows are not as they should be where one of them holds a NaN."""
    case = on(device, make_case(31, 64, 1003, seed=11, dtype=dtype))
    clean = case.call(token_stats, backend="triton")
    case.hidden[7, 3] = torch.nan
    stats = case.call(token_stats, backend="triton")
    others = torch.arange(31, device=device) != 7
    wrong = int(not stats.logprobs[7].isnan()) + int(not stats.kl_prcp[7].isnan())
    for got, want in zip(stats, clean, strict=True):
        wrong += int((got[others] != want[others]).sum())
    return wrong
