"""Errors and times of `token_stats` on states with a stated entropy, beside the bare matmuls.

    PYTHONPATH=kernels python bench/kernel_report.py errors [--states FILE]
    PYTHONPATH=kernels python bench/kernel_report.py times --rows 2048 --dtype bfloat16

Without `--states` the policy is synthetic: word frequencies by Zipf, a few candidates per row.
FILE is a torch file of {"weight" (V, D), "hidden", "aug_hidden" (N, D), "targets" (N,)}; `--width`
takes states and weight through one orthonormal map to another D, which leaves the logits alone.
"""

import argparse
import resource
import time

import torch

from papo_kernels import record_certificates, token_stats

OUTPUTS = ("logprobs", "entropy", "aug_logprobs", "aug_entropy", "kl_prcp")
# The coefficients of the 7B preset, and a standard normal advantage.
MIX = {"logprobs": None, "entropy": 0.05, "aug_entropy": 0.05, "kl_prcp": -0.02}


def synthetic(rows, vocab, width, sharpness, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=g)
    # One feature carries the log frequencies, as a bias would.
    rank = torch.randperm(vocab, generator=g) + 1
    weight[:, 0] = -1.8 * rank.log()
    words = torch.randint(0, vocab, (rows, 4), generator=g)
    lead = sharpness * torch.tensor([1.0, 0.8, 0.6, 0.5])
    body = weight[:, 1:]
    scaled = body / body.square().sum(-1, keepdim=True)
    hidden = torch.randn(rows, width, generator=g) * 0.5 / width**0.5
    hidden[:, 1:] += (scaled[words] * lead[:, None]).sum(1)
    hidden[:, 0] = 1
    noise = torch.randn(rows, width, generator=g) * hidden[:, 1:].std()
    noise[:, 0] = 0
    targets = torch.cat(
        [
            torch.multinomial((h @ weight.T).softmax(-1), 1, generator=g).squeeze(1)
            for h in hidden.split(64)
        ]
    )
    return {
        "weight": weight, "hidden": hidden, "aug_hidden": hidden + 0.15 * noise, "targets": targets
    }  # fmt: skip


def load(args):
    if args.states:
        states = torch.load(args.states)
        states = {k: x if k == "weight" else x[: args.rows] for k, x in states.items()}
    else:
        states = synthetic(args.rows, args.vocab, args.width or 576, args.sharpness)
    have = states["weight"].shape[1]
    if args.width and args.width != have:
        g = torch.Generator().manual_seed(1)
        turn = torch.linalg.qr(torch.randn(args.width, have, generator=g))[0]
        for name in ("weight", "hidden", "aug_hidden"):
            states[name] = states[name] @ turn.T
    dtype = getattr(torch, args.dtype)
    return {
        k: (x if k == "targets" else x.to(dtype)).to(args.device).contiguous()
        for k, x in states.items()
    }


def run(states, upstream, **options):
    """Statistics and gradients by name; upstream: (N,) by output."""
    leaves = {k: x.detach().requires_grad_(k != "targets") for k, x in states.items()}
    stats = token_stats(
        leaves["hidden"], leaves["weight"], leaves["targets"], aug_hidden=leaves["aug_hidden"],
        **options,
    )  # fmt: skip
    used = {o: getattr(stats, o) for o in upstream}
    torch.autograd.backward(list(used.values()), [upstream[o].to(x) for o, x in used.items()])
    names = ("hidden", "aug_hidden", "weight")
    return stats, {n: x.grad for n, x in leaves.items() if n in names and x.grad is not None}


def errors(args):
    states = load(args)
    rows = len(states["targets"])
    g = torch.Generator().manual_seed(2)
    normal = {o: torch.randn(rows, generator=g).to(args.device) for o in OUTPUTS}
    papo = {o: normal[o] if c is None else torch.full_like(normal[o], c) for o, c in MIX.items()}
    mixes = {o: {o: normal[o]} for o in OUTPUTS} | {"all, random": normal, "papo-g-7b": papo}
    double = {k: x if k == "targets" else x.double() for k, x in states.items()}
    for name, upstream in mixes.items():
        want, exact = run(double, upstream, backend="reference")
        with record_certificates() as c:
            got, found = run(states, upstream, grad_budget=args.budget, backend=args.backend)
        if name == OUTPUTS[0]:
            print("  ".join(f"{o} mean {x.mean():.3g}" for o, x in zip(OUTPUTS, want, strict=True)))
            worst = [(a - b).abs().max().item() for a, b in zip(got, want, strict=True)]
            print("  ".join(f"{o} error {e:.1e}" for o, e in zip(OUTPUTS, worst, strict=True)))
        parts = []
        for n, x in found.items():
            if n in exact and exact[n].any():
                parts.append(f"{n} {((x - exact[n]).norm() / exact[n].norm()).item():.1e}")
        print(f"{name:14s} kept {c.kept:.3f} dense {c.dense_rows:4d}  " + "  ".join(parts))


def times(args):
    states = load(args)
    upstream = {o: torch.randn(len(states["targets"]), device=args.device) for o in OUTPUTS}
    matmuls = time_of(lambda: bare_matmuls(states), args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with record_certificates() as c:
        ours = time_of(
            lambda: run(states, upstream, grad_budget=args.budget, backend=args.backend), args
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{len(states['targets'])} rows, weight {tuple(states['weight'].shape)} {args.dtype}: "
        f"six matmuls {matmuls:.3f} s, token_stats {ours:.3f} s, ratio {ours / matmuls:.2f}, "
        f"kept {c.kept:.3f}, dense rows {c.dense_rows / c.rows:.2f}, "
        f"peak grew {peak / 1024:.0f} MiB"
    )


def bare_matmuls(states):
    w = states["weight"]
    for name in ("hidden", "aug_hidden"):
        for x in states[name].split(512):
            z = x @ w.T
            z @ w
            z.T @ x


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
    parser.add_argument("--states", help="torch file; else synthetic")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--width", type=int)
    parser.add_argument("--sharpness", type=float, default=36.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--budget", type=float, default=5e-3)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"errors": errors, "times": times}[args.what](args)


if __name__ == "__main__":
    main()
