"""Random calls of `token_stats`, each gradient and each dropped share against float64.

The weight is the identity, so the gradient of the states is that of the logits, and a word that the
backward left out shows as a zero. What a row may leave out is computed here from float64 and from
the docstring's promise; the certificate is not asked.

    python tests/kernels/kernel_fuzz.py --calls 3000
"""

import argparse
import contextlib
import math
import time
from dataclasses import dataclass

import torch

from papo_kernels import op, token_stats
from papo_kernels.cpu import library

OUTPUTS = ("logprobs", "entropy", "aug_logprobs", "aug_entropy", "kl_prcp", "kl_reverse")
# Float32 arithmetic, relative to the sum of the sizes of a gradient's terms.
NOISE = 2e-5
EPSILON = 2.0**-23
SIXTEEN_BITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass
class Case:
    logits: torch.Tensor  # (N, V) float64, before soft cap and temperature
    aug_logits: torch.Tensor | None
    bias: torch.Tensor | None
    targets: torch.Tensor
    upstream: dict
    options: dict
    default_dtype: torch.dtype
    weight_too: bool  # the weight wants a gradient, beside the states


def random_case(seed):
    """A case from a seed; sizes, logits, dtypes, upstream gradients and options are all random."""
    r = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=r))]

    def uniform(low, high):
        return low + (high - low) * float(torch.rand(1, generator=r))

    def randn(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    n, v = pick(1, 7, 33, 64, 100), pick(65, 130, 257, 400)
    kind = pick("peaked", "confident", "flat", "mixed", "huge", "rare", "tail", "steps", "capped")
    logits = randn(n, v)
    if kind == "peaked":
        logits = 3 * logits - 2 * torch.arange(1, v + 1).double().log()
    elif kind == "confident":
        logits[:, 0] += uniform(10, 25)
    elif kind == "mixed":
        logits *= torch.logspace(-2, 1.3, n)[torch.randperm(n, generator=r)][:, None]
    elif kind == "huge":
        logits = logits * uniform(20, 300) + uniform(-3000, 3000)
    elif kind == "rare":
        logits[:, 8:] -= uniform(8, 18)
    elif kind == "tail":  # all rows alike, and all that one word leaves is spread evenly
        logits = torch.zeros(n, v, dtype=torch.float64)
        logits[:, 0] = uniform(3, 20) + math.log(v)
    elif kind == "steps":  # a few sorts of words, of one probability each
        steps = torch.tensor([0, uniform(1, 5), uniform(5, 9), uniform(9, 14)], dtype=torch.float64)
        at = torch.bucketize(torch.arange(v), torch.tensor([1, 8, v // 3]), right=True)
        logits = -steps[at].expand(n, v).clone()
    elif kind == "capped":  # where there is a soft cap, some words are at it
        logits = 0.1 * logits - 40
        logits[:, :2] = uniform(20, 120)
    dtypes = [pick(*[torch.float32] * 6, torch.bfloat16, torch.float16, torch.float64)] * 2
    if pick(True, False, False):
        dtypes[1] = pick(torch.float32, torch.bfloat16)
    two = pick(True, True, False)
    aug = None
    if two:
        closeness = pick("equal", "close", "near", "far", "rare words")
        scale = {"equal": 0, "close": 10 ** uniform(-5, -2), "near": 0.3, "far": 4}.get(
            closeness, 0
        )
        aug = logits + scale * randn(n, v)
        if closeness == "rare words":
            aug[:, v // 2 : v // 2 + 9] -= uniform(0.5, 4)
    bias = None
    if pick(True, False, False):
        bias = randn(v)
        if pick(True, False):
            bias[torch.randperm(v, generator=r)[: v // 4]] = -torch.inf
    targets = torch.randint(v, (n,), generator=r)
    shown = logits if bias is None else logits + bias
    if pick(True, True, False):
        targets = torch.where(torch.rand(n, generator=r) < 0.8, shown.argmax(1), targets)
    if bias is not None:
        targets = torch.where(
            shown.gather(1, targets[:, None]).isinf()[:, 0], shown.argmax(1), targets
        )
    targets[torch.rand(n, generator=r) < pick(0.0, 0.0, 0.3)] = -100
    upstream = {}
    names = OUTPUTS if two else OUTPUTS[:2]
    for name in names:
        if pick(True, False):
            most = 0 if torch.float16 in dtypes else pick(9, 9, 24)
            size = 10 ** uniform(-most or -5, most)
            rows = torch.exp(pick(0.0, 1.0, 3.0) * randn(n))
            upstream[name] = size * rows * (randn(n) if pick(True, False) else 1)
    if not upstream:
        upstream["logprobs"] = randn(n)
    options = {
        "temperature": pick(1.0, 1.0, 0.5, 3.0),
        "softcap": pick(None, None, None, 5.0, 30.0),
        "grad_budget": pick(0.0, 1e-3, 3e-3, 3e-3, 2e-2),
        "budget_of": pick("call", "call", "token"),
        "aug_constant": two and pick(True, False, False),
    }
    weight_too = pick(True, False)
    case = Case(
        logits.to(dtypes[0]), None if aug is None else aug.to(dtypes[1]),
        None if bias is None else bias.float(), targets, upstream, options,
        pick(torch.float32, torch.float32, torch.bfloat16, torch.float64), weight_too,
    )  # fmt: skip
    if pick(True, False, False) and "logprobs" in upstream and "entropy" in upstream:
        _cancel(case)
    return case


def _cancel(case):
    """Upstream gradients of log-prob and entropy that cancel at some word of every row."""
    p = _probabilities(case, case.logits)
    log_p = p.clamp_min(1e-300).log()
    entropy = -(p * log_p).sum(1)
    word = p.topk(min(3, p.shape[1]), 1).indices[:, -1:]
    case.upstream["logprobs"] = -case.upstream["entropy"] * (
        log_p.gather(1, word).squeeze(1) + entropy
    )


def _capped(case, logits):
    z = logits.double()
    if case.bias is not None:
        z = z + case.bias.double()
    cap = case.options["softcap"]
    if cap is not None:
        z = torch.where(z.isinf(), z, cap * torch.tanh(z / cap))
    return z / case.options["temperature"]


def _slope(case, logits):
    z = logits.double() if case.bias is None else logits.double() + case.bias.double()
    cap = case.options["softcap"]
    one = torch.ones_like(z) if cap is None else 1 - torch.tanh(z / cap).square()
    return one / case.options["temperature"]


def _probabilities(case, logits):
    return _capped(case, logits).softmax(1)


def truth(case):
    """Of each stream (dz, what float32 may be off), (N, V) float64, at the products."""
    live = (case.targets != -100)[:, None]
    y = torch.zeros_like(case.logits, dtype=torch.float64)
    y.scatter_(1, case.targets.clamp_min(0)[:, None], 1)
    up = {name: g.double()[:, None] for name, g in case.upstream.items()}
    z = _capped(case, case.logits)
    log_p = z.log_softmax(1).clamp_min(-1e30)
    p = log_p.exp()
    h = -(p * log_p).sum(1, keepdim=True)
    terms, aug_terms, rounding = [], [], []
    others = 1 - y
    if "logprobs" in up:  # 1 - p without the loss of bits
        rest = (p * others).sum(1, keepdim=True)
        terms.append(up["logprobs"] * (y * rest - others * p))
    if "entropy" in up:
        terms.append(-up["entropy"] * p * (log_p + h))
        rounding.append(up["entropy"].abs() * p * 16 * EPSILON * (log_p.abs() + h))
    if case.aug_logits is not None:
        log_q = _capped(case, case.aug_logits).log_softmax(1).clamp_min(-1e30)
        q = log_q.exp()
        h_q = -(q * log_q).sum(1, keepdim=True)
        x = log_q - log_p
        if "aug_logprobs" in up:
            rest = (q * others).sum(1, keepdim=True)
            aug_terms.append(up["aug_logprobs"] * (y * rest - others * q))
        if "aug_entropy" in up:
            aug_terms.append(-up["aug_entropy"] * q * (log_q + h_q))
            rounding.append(up["aug_entropy"].abs() * q * 16 * EPSILON * (log_q.abs() + h_q))
        gap = torch.where(x.abs() < 0.1, p * torch.expm1(x), q - p)
        # The rounding of logits, and of the KLs, moves log q - log p. It is p x where that is not
        # small, but p eps |z| where it is.
        lse = z.logsumexp(1, keepdim=True)
        shift = 4 * EPSILON * (1 + z.abs().clamp_max(1e6) + lse.abs() + x.abs())
        kls = [up[name].abs() for name in ("kl_prcp", "kl_reverse") if name in up]
        rounding += [g * torch.maximum(p, q) * shift for g in kls]
        if "kl_prcp" in up:
            kl = (gap - p * x).sum(1, keepdim=True)
            terms.append(-up["kl_prcp"] * p * (x + kl))
            aug_terms.append(up["kl_prcp"] * gap)
        if "kl_reverse" in up:
            kl = (q * x - gap).sum(1, keepdim=True)
            terms.append(-up["kl_reverse"] * gap)
            aug_terms.append(up["kl_reverse"] * q * (x - kl))
    if case.options["aug_constant"]:
        aug_terms = []
    found = []
    for some, logits in ((terms, case.logits), (aug_terms, case.aug_logits)):
        if logits is None:
            continue
        some = [torch.where(live, t, 0) for t in some] or [torch.zeros_like(y)]
        slope = _slope(case, logits)
        # the logits' own rounding moves a probability, and that of the soft cap its slope
        sizes = sum(t.abs() for t in some)
        noise = NOISE + 4 * EPSILON * float(logits.double().abs().max())
        noise = noise * slope * (sizes + 1e-2 * sizes.sum(1, keepdim=True))
        # probabilities below e^-87 are 0 in float32
        flushed = 1e-36 * sum(g.abs() for g in up.values())
        noise = noise + torch.where(live, sum(rounding, flushed), 0) * slope
        if case.options["softcap"] is not None:
            noise = noise + 4 * EPSILON * sizes
        found.append((sum(some) * slope, noise))
    return found


def run(case, backend="torch"):
    """Gradients of hidden, aug_hidden and weight, or None."""
    v = case.logits.shape[1]
    hidden = case.logits.clone().requires_grad_()
    aug = None
    if case.aug_logits is not None:
        aug = case.aug_logits.clone().requires_grad_()
    weight = torch.eye(v, dtype=torch.float32).requires_grad_(case.weight_too)
    torch.set_default_dtype(case.default_dtype)
    try:
        stats = token_stats(
            hidden, weight, case.targets, aug_hidden=aug, bias=case.bias, backend=backend,
            **case.options,
        )  # fmt: skip
        loss = []
        for name, g in case.upstream.items():
            out = getattr(stats, name)
            if out is not None and out.requires_grad:
                loss.append((out, g.to(out.dtype)))
        if not loss:
            return None
        torch.autograd.backward([x for x, _ in loss], [g for _, g in loss])
    finally:
        torch.set_default_dtype(torch.float32)
    return hidden.grad, None if aug is None else aug.grad, weight.grad


def wholes(case, sizes, states):
    """(N,) what a share is relative to, as the docstring of `token_stats` says; sizes: sum |dz|."""
    if case.options["budget_of"] == "token":
        return sizes
    count = max(1, int((case.targets != -100).sum()))
    typical = (sizes.square().sum() / count).sqrt().expand_as(sizes)
    if case.weight_too:
        norms = states.double().norm(dim=1)
        weighted = ((sizes * norms).square().sum() / count).sqrt() / norms.clamp_min(1e-300)
        typical = torch.minimum(typical, weighted)
    return torch.maximum(sizes, typical)


def check(case, found, tell=None):
    """(worst dropped share, worst error), each over what is allowed; above 1 is a fault."""
    share = error = 0.0
    budget = case.options["grad_budget"]
    streams = [(case.logits, found[0]), (case.aug_logits, found[1])]
    expected = truth(case)
    weight_allowed = torch.zeros((), dtype=torch.float64)
    d_weight = torch.zeros(case.logits.shape[1], case.logits.shape[1], dtype=torch.float64)
    for (states, got), (dz, noise) in zip(streams, expected, strict=False):
        if got is None:
            continue
        got = got.double()
        sizes = dz.abs().sum(1)
        whole = wholes(case, sizes, states)
        x = states.double()
        noise = noise + SIXTEEN_BITS.get(states.dtype, 0) * dz.abs() + 1e-37
        if states.dtype == torch.float16:
            noise = noise + 6e-8
        dropped = (dz.abs() * (got == 0)).sum(1)
        if budget:
            over = (dropped - noise.sum(1)).clamp_min(0) / (budget * whole + 1e-300)
            share = max(share, float(over.nan_to_num(torch.inf).max()))
        allowed = budget * whole + noise.sum(1)
        off = (got - dz).abs().sum(1)
        row = (off / allowed).nan_to_num(torch.inf)
        if tell and row.max() > 1:
            n = int(row.argmax())
            tell(
                f"  row {n}: off by {off[n]:.3g}, sum |dz| {sizes[n]:.3g}, noise "
                f"{noise[n].sum():.3g}, its part of the budget {budget * whole[n]:.3g}"
            )
        error = max(error, float(row.max()))
        d_weight += dz.T @ x
        weight_allowed = weight_allowed + (allowed * x.norm(dim=1)).sum()
    if found[2] is not None:
        weight_error = (found[2].double() - d_weight).norm()
        error = max(error, float((weight_error / weight_allowed).nan_to_num(math.inf)))
    return share, error


@contextlib.contextmanager
def small_calls_as_large(cpp):
    """A sparse backward, in C++ or without it, also for calls that are too small to be worth it."""
    before = library.LEAST_LOGITS, op.DENSE_WEIGHT
    library.LEAST_LOGITS, op.DENSE_WEIGHT = 0 if cpp else 1 << 62, -1
    try:
        yield
    finally:
        library.LEAST_LOGITS, op.DENSE_WEIGHT = before


def fuzz(seeds, backend="torch", tell=print):
    """Runs the cases of these seeds; returns the faults, (seed, C++, share, error) each."""
    faults, worst, count, started = [], [0.0, 0.0], 0, time.time()
    for seed in seeds:
        for cpp in (False, True) if backend == "torch" else (False,):
            case = random_case(seed)
            wide = torch.float64 in (case.logits.dtype, getattr(case.aug_logits, "dtype", None))
            if wide and backend == "triton":
                continue
            with small_calls_as_large(cpp):
                found = run(case, backend)
            if found is None:
                continue
            count += 1
            share, error = check(case, found, tell)
            worst = [max(worst[0], share), max(worst[1], error)]
            if share > 1 or error > 1:
                faults.append((seed, cpp, share, error))
                tell(f"seed {seed} C++ {cpp}: share {share:.3g}, error {error:.3g} of the allowed")
    tell(
        f"{count} calls, {len(faults)} faults; worst share {worst[0]:.3f} and worst error "
        f"{worst[1]:.3f} of what is allowed; {time.time() - started:.0f} s"
    )
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=3000, help="random cases")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--backend", default="torch", help="torch (eager and C++) or triton")
    args = parser.parse_args()
    raise SystemExit(bool(fuzz(range(args.first, args.first + args.calls), args.backend)))
