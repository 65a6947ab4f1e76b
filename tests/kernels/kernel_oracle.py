"""Float64 statistics and analytic gradients, from the equations, independent of papo_kernels.

With upstream gradients a, b, a', b', c, r of logprobs, entropy, aug_logprobs, aug_entropy, kl_prcp
and kl_reverse, which is KL(q || p):

    dz     = a  (1[y] - p) - b  p (log p + H)  + c p (log p - log q - kl_prcp) + r (p - q)
    dz_aug = a' (1[y] - q) - b' q (log q + H') + c (q - p) + r q (log q - log p - kl_reverse)
"""

import os
from dataclasses import dataclass, replace

import torch

OUTPUTS = ("logprobs", "entropy", "aug_logprobs", "aug_entropy", "kl_prcp", "kl_reverse")
# Triton's interpreter is chosen by the process: test_triton.py starts one that tests that backend.
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else ["reference", "torch"]
FAST = BACKENDS[-1]
GRADS = ("hidden", "aug_hidden", "weight", "bias")


def interpreted(few, values):
    """Parameters: `values`, of which an interpreter, which takes long, gets `few` in `make test`.

    It gets the others in `make test-all`. In dtypes there is little to see: it computes in float32.
    """
    import pytest  # not at the top: GPUs' checks use this module where pytest is not installed

    rare = [] if FAST != "triton" else [v for v in values if v not in few]
    return [pytest.param(v, marks=pytest.mark.exhaustive) if v in rare else v for v in values]


FLOAT32 = [torch.float32]


@dataclass
class Case:
    """Operands of one call: hidden, aug_hidden (N, D); weight (V, D); bias (V,); targets (N,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    aug_hidden: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100

    @property
    def outputs(self):
        return OUTPUTS if self.aug_hidden is not None else OUTPUTS[:2]

    def call(self, token_stats, **options):
        return token_stats(
            self.hidden,
            self.weight,
            self.targets,
            aug_hidden=self.aug_hidden,
            bias=self.bias,
            temperature=self.temperature,
            softcap=self.softcap,
            ignore_index=self.ignore_index,
            **options,
        )

    def gradients(self, token_stats, upstream, wanted=GRADS, **options):
        """Gradients of sum over outputs of <upstream, output>, by name of the operand."""
        present = [g for g in wanted if getattr(self, g) is not None]
        leaves = {g: getattr(self, g).detach().clone().requires_grad_() for g in present}
        stats = replace(self, **leaves).call(token_stats, **options)
        used = {n: getattr(stats, n) for n in upstream if getattr(stats, n).requires_grad}
        torch.autograd.backward(
            list(used.values()), [upstream[n].to(x.dtype) for n, x in used.items()]
        )
        return {g: torch.zeros_like(x) if x.grad is None else x.grad for g, x in leaves.items()}


def make_case(
    n, d, v, *, scale=3.0, peak=0.0, distance=0.3, dtype=torch.float32, aug=True, bias=False,
    seed=0, ignored=0.0, temperature=1.0, softcap=None,
):  # fmt: skip
    """Random logits of standard deviation `scale`; `peak` lifts one random word per row.

    `distance` is how far the corrupted states are from the clean ones, relative to their size.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weight = normal(v, d)
    hidden = normal(n, d) * scale / d**0.5
    if peak:
        top = torch.randint(0, v, (n,), generator=g)
        hidden += peak * weight[top] / weight[top].square().sum(-1, keepdim=True)
    noise = normal(n, d) * hidden.std() if n else normal(n, d)
    aug_hidden = hidden + distance * noise
    targets = torch.randint(0, v, (n,), generator=g)
    if peak:
        targets = torch.where(torch.rand(n, generator=g) < 0.8, top, targets)
    targets[torch.rand(n, generator=g) < ignored] = -100
    return Case(
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        aug_hidden.to(dtype) if aug else None,
        normal(v).to(dtype) if bias else None,
        temperature,
        softcap,
    )


def random_upstream(case, outputs=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    n = len(case.targets)
    return {o: torch.randn(n, generator=g, dtype=torch.float64) for o in outputs or case.outputs}


class Oracle:
    """Statistics and gradients of `case` in float64.

    With `logit_noise` every raw logit is moved by that standard deviation, relative to the largest:
    how far the results then move is what logits of finite precision cost anybody.
    """

    def __init__(self, case, logit_noise=0.0):
        self.case = case
        self.logit_noise = logit_noise
        self.noise_source = torch.Generator().manual_seed(0)
        self.kept = case.targets != case.ignore_index
        self.kept_targets = case.targets[self.kept]
        self.z, self.slope = self._logits(case.hidden)
        self.log_p = self._normalise(self.z)
        self.p = self.log_p.exp()
        self.entropy = -_xlogp(self.p, self.log_p).sum(-1)
        if case.aug_hidden is not None:
            self.z_aug, self.slope_aug = self._logits(case.aug_hidden)
            self.log_q = self._normalise(self.z_aug)
            self.q = self.log_q.exp()
            self.aug_entropy = -_xlogp(self.q, self.log_q).sum(-1)
            self.kl = _xlogp(self.p, self.log_p - self.log_q).sum(-1)
            self.kl_reverse = _xlogp(self.q, self.log_q - self.log_p).sum(-1)

    def _logits(self, x):
        c = self.case
        z = x[self.kept].double() @ c.weight.double().T
        if c.bias is not None:
            z = z + c.bias.double()
        if self.logit_noise and z.numel():
            noise = torch.randn(z.shape, generator=self.noise_source, dtype=z.dtype)
            z = z + self.logit_noise * z.abs().max() * noise
        slope = torch.ones_like(z)
        if c.softcap is not None:
            t = torch.tanh(z / c.softcap)
            z, slope = c.softcap * t, 1 - t * t
        return z / c.temperature, slope / c.temperature

    @staticmethod
    def _normalise(z):
        z = z - z.max(-1, keepdim=True).values if z.numel() else z
        return z - z.exp().sum(-1, keepdim=True).log()

    def statistics(self):
        columns = {"logprobs": self._of_target(self.log_p), "entropy": self.entropy}
        if self.case.aug_hidden is not None:
            columns |= {
                "aug_logprobs": self._of_target(self.log_q),
                "aug_entropy": self.aug_entropy,
                "kl_prcp": self.kl,
                "kl_reverse": self.kl_reverse,
            }
        return {name: self._spread(x) for name, x in columns.items()}

    def _of_target(self, log_p):
        return log_p.gather(1, self.kept_targets[:, None]).squeeze(1)

    def _spread(self, x):
        out = x.new_zeros(self.case.targets.shape[:1] + x.shape[1:])
        out[self.kept] = x
        return out

    def dz(self, upstream):
        """(rows kept, V) gradients of both streams' logits, before softcap and temperature."""
        u = {o: g[self.kept].double()[:, None] for o, g in upstream.items()}
        hot = torch.zeros_like(self.p).scatter_(1, self.kept_targets[:, None], 1.0)
        dz, dz_aug = torch.zeros_like(self.p), torch.zeros_like(self.p)
        if "logprobs" in u:
            dz += u["logprobs"] * (hot - self.p)
        if "entropy" in u:
            dz -= u["entropy"] * _xlogp(self.p, self.log_p + self.entropy[:, None])
        if "aug_logprobs" in u:
            dz_aug += u["aug_logprobs"] * (hot - self.q)
        if "aug_entropy" in u:
            dz_aug -= u["aug_entropy"] * _xlogp(self.q, self.log_q + self.aug_entropy[:, None])
        if "kl_prcp" in u:
            dz += u["kl_prcp"] * _xlogp(self.p, self.log_p - self.log_q - self.kl[:, None])
            dz_aug += u["kl_prcp"] * (self.q - self.p)
        if "kl_reverse" in u:
            x = self.log_q - self.log_p - self.kl_reverse[:, None]
            dz += u["kl_reverse"] * (self.p - self.q)
            dz_aug += u["kl_reverse"] * _xlogp(self.q, x)
        return dz, dz_aug

    def gradients(self, upstream, rounded=None, aug_constant=False):
        """By operand; with `rounded` as if dz, then the gradient, were rounded to that dtype."""
        c = self.case
        dz, dz_aug = self.dz(upstream)
        if aug_constant:
            dz_aug = torch.zeros_like(dz_aug)
        dz = dz * self.slope
        if rounded is not None:
            dz = dz.to(rounded).double()
        grads = {"hidden": self._spread(dz @ c.weight.double())}
        grads["weight"] = dz.T @ c.hidden[self.kept].double()
        if c.bias is not None:
            grads["bias"] = dz.sum(0)
        if c.aug_hidden is not None:
            dz_aug = dz_aug * self.slope_aug
            if rounded is not None:
                dz_aug = dz_aug.to(rounded).double()
            grads["aug_hidden"] = self._spread(dz_aug @ c.weight.double())
            grads["weight"] += dz_aug.T @ c.aug_hidden[self.kept].double()
            if c.bias is not None:
                grads["bias"] += dz_aug.sum(0)
        return grads if rounded is None else {g: x.to(rounded).double() for g, x in grads.items()}


def _xlogp(p, x):
    return torch.where(p > 0, p * x, 0.0)


def statistic_error(got, want):
    """Largest error relative to max(1, |value|)."""
    if not want.numel():
        return 0.0
    return ((got.double() - want).abs() / want.abs().clamp_min(1)).max().item()


def gradient_error(got, want):
    """Norm of the error relative to the norm of the gradient; 0 where both are exactly zero."""
    error = (got.double() - want).norm()
    return 0.0 if error == 0 else (error / want.norm()).item()


def check(errors, bound):
    """Prints every error beside its bound, then fails on the ones that exceed it (NaN does)."""
    bounds = bound if isinstance(bound, dict) else dict.fromkeys(errors, bound)
    for name, error in errors.items():
        print(f"  {name:40s} error {error:.2e}  bound {bounds[name]:.1e}")
    worse = {n: e for n, e in errors.items() if not e <= bounds[n]}
    assert not worse, worse


def statistic_errors(case, token_stats, **options):
    stats = case.call(token_stats, **options)
    want = Oracle(case).statistics()
    return {o: statistic_error(getattr(stats, o), want[o]) for o in case.outputs}


def gradient_errors(case, token_stats, upstream, wanted=GRADS, aug_constant=False, **options):
    got = case.gradients(token_stats, upstream, wanted, aug_constant=aug_constant, **options)
    want = Oracle(case).gradients(upstream, aug_constant=aug_constant)
    return {g: gradient_error(got[g], want[g]) for g in got}


# Words of a case that the backward does sparsely; an interpreter gets fewer.
WORDS = 6007 if FAST == "triton" else 16411
ROWS = 70 if FAST == "triton" else 130
"""Fewer where kernels are interpreted: several tiles, and rows that fill none."""


def policy_case(n, v, *, sharpness, distance=0.15, seed=0, d=48, dtype=torch.float32, **head):
    """Logits with a language model's long tail: word frequencies by Zipf, a few candidates per row.

    `sharpness` multiplies the candidates' lead; targets are sampled from the policy itself.
    """
    case = make_case(n, d, v, scale=0.5, distance=0.0, dtype=torch.float64, bias=True, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    case.bias = (
        -1.8 * torch.arange(1, v + 1, dtype=torch.float64).log()[torch.randperm(v, generator=g)]
    )
    words = torch.randint(0, v, (n, 4), generator=g)
    lead = sharpness * torch.tensor([1.0, 0.8, 0.6, 0.5], dtype=torch.float64)
    scaled = case.weight / case.weight.square().sum(-1, keepdim=True)
    case.hidden = case.hidden + (scaled[words] * lead[:, None]).sum(1)
    noise = torch.randn(n, d, generator=g, dtype=torch.float64)
    case.aug_hidden = case.hidden + distance * noise * case.hidden.std()
    p = Oracle(case).p
    case.targets = torch.multinomial(p, 1, generator=g).squeeze(1)
    for name in GRADS:
        setattr(case, name, getattr(case, name).to(dtype))
    for name, value in head.items():
        setattr(case, name, value)
    return case
