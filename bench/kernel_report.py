"""Errors of `token_stats` for each output alone, and its time beside the bare matmuls.

    PYTHONPATH=kernels python bench/kernel_report.py errors
    PYTHONPATH=kernels python bench/kernel_report.py times --states smollm2-own --rows 2048

Needs no peer and no pytest; `make bench` compares with the peers. Without the packages that the
real states are made from, `--states synthetic-0.6` serves.
"""

import argparse
import time

import states
import torch
from measure import GRADIENTS, PeakMemory, gradient_error, size, statistic_error
from ways import ENTROPY_COEF, KL_PRCP_COEF, OUTPUTS, Case, ours, six_matmuls

from papo_kernels import record_certificates, token_stats


def mixes(rows):
    """{name: {output: (rows,) upstream}}: each output alone, all, and PAPO's objective."""
    g = torch.Generator().manual_seed(2)
    normal = {o: torch.randn(rows, generator=g) for o in OUTPUTS}
    constant = {"entropy": ENTROPY_COEF, "aug_entropy": ENTROPY_COEF, "kl_prcp": -KL_PRCP_COEF}
    papo = {o: torch.full((rows,), c) for o, c in constant.items()}
    alone = {o: {o: normal[o]} for o in OUTPUTS}
    return alone | {"all five": normal, "papo-g-7b": {"logprobs": normal["logprobs"]} | papo}


def gradients(leaves, targets, upstream, **options):
    """(TokenStats, gradients of hidden, aug_hidden, weight; None where there is none)."""
    hidden, aug_hidden, weight = leaves
    stats = token_stats(hidden, weight, targets, aug_hidden=aug_hidden, **options)
    used = [getattr(stats, o) for o in upstream]
    upstream = [u.to(x) for u, x in zip(upstream.values(), used, strict=True)]
    return stats, torch.autograd.grad(used, leaves, upstream, allow_unused=True)


def errors(args, inputs):
    case = Case(inputs)
    double = [x.detach().double().requires_grad_() for x in case.leaves]
    print("| upstream of | kept | dense rows | dH | dH_aug | dW |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, upstream in mixes(len(case.targets)).items():
        want, exact = gradients(double, case.targets, upstream, backend="reference")
        with record_certificates() as c:
            got, found = gradients(
                case.leaves, case.targets, upstream, grad_budget=args.budget, backend=args.backend
            )
        shown = []
        for x, y in zip(found, exact, strict=True):
            none = y is None or not y.any()
            shown.append("–" if none else f"{gradient_error(x, y):.1e}")
        print(f"| {name} | {c.kept:.1%} | {c.dense_rows} | {' | '.join(shown)} |")
    pairs = ((o, getattr(got, o), getattr(want, o)) for o in OUTPUTS)
    worst = (f"{o} {statistic_error(a, b):.1e}" for o, a, b in pairs)
    print("statistics, largest error relative to max(1, |value|):", ", ".join(worst))
    print(f"gradients {', '.join(GRADIENTS)}: norm of the error over that of the gradient; float64")


def times(args, inputs):
    case = Case(inputs)
    options = {"grad_budget": args.budget, "backend": args.backend}
    floor = time_of(lambda: six_matmuls(case), args)
    with record_certificates() as c:
        ours(case, **options)
    seconds = time_of(lambda: ours(case, **options), args)
    probe = PeakMemory(args.device)
    probe.start()
    kept = ours(case, **options)
    extra = probe.read() - size(case.leaves)
    del kept
    print(
        f"six matmuls {floor:.3f} s, token_stats {seconds:.3f} s, ratio {seconds / floor:.2f}, "
        f"kept {c.kept:.1%}, dense rows {c.dense_rows / c.rows:.0%}, "
        f"peak extra {extra / 2**20:.0f} MiB"
    )


def time_of(function, args):
    """Least of some repetitions after one to warm up, seconds."""
    best = float("inf")
    for i in range(args.repeat + 1):
        start = time.perf_counter()
        function()
        if args.device != "cpu":
            torch.cuda.synchronize()
        if i:
            best = min(best, time.perf_counter() - start)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["errors", "times"])
    known = ", ".join(states.SHARPNESS)
    parser.add_argument(
        "--states", default="smollm2-0.6", help=f"{known}, or synthetic-ENTROPY (of --vocab)"
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576, help="D, by an orthonormal map")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--budget", type=float, default=3e-3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.states in states.SHARPNESS and states.missing():
        raise SystemExit(f"error: {args.states} cannot be made; {states.missing()}")
    inputs = states.load(
        args.states, args.rows, args.width, getattr(torch, args.dtype), args.device, args.vocab
    )
    print(f"{inputs.describe()}, {args.dtype}")
    {"errors": errors, "times": times}[args.what](args, inputs)


if __name__ == "__main__":
    main()
