"""What is compared: ways to get statistics and gradients of both streams, ours and the peers'.

Each does as much of the work as it can. `computes` says what that is, `logits` to what they are
rounded on the way, and `upstream` which outputs' gradients it carries: error and time of a way are
of that, no more. A way that cannot run here says why.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from papo_kernels import token_stats

OUTPUTS = ("logprobs", "entropy", "aug_logprobs", "aug_entropy", "kl_prcp")
LOGPROBS = ("logprobs", "aug_logprobs")
# The 7B preset: double entropy loss and perception KL beside a policy gradient.
ENTROPY_COEF, KL_PRCP_COEF = 0.05, 0.02


class Case:
    """States as leaves that want gradients, and advantages; `upstream` is over N, as a mean's."""

    def __init__(self, states):
        self.states = states
        self.hidden, self.aug_hidden, self.weight = (
            x.detach().requires_grad_() for x in (states.hidden, states.aug_hidden, states.weight)
        )
        self.targets = states.targets
        n = len(self.targets)
        g = torch.Generator().manual_seed(2)
        self.advantages, self.aug_advantages = (
            torch.randn(n, generator=g).to(self.hidden.device) for _ in range(2)
        )

    @property
    def leaves(self):
        return self.hidden, self.aug_hidden, self.weight

    def upstream(self, kind):
        """{output: (N,) float32} of the loss that ways of this kind differentiate."""
        n = len(self.targets)
        flat = torch.full((n,), 1 / n, device=self.hidden.device)
        policy = {"logprobs": -self.advantages / n}
        entropies = {"entropy": ENTROPY_COEF * flat, "aug_entropy": ENTROPY_COEF * flat}
        kl = {"kl_prcp": -KL_PRCP_COEF * flat}
        both = policy | {"aug_logprobs": -self.aug_advantages / n}
        return {
            "papo": policy | entropies | kl,
            "log-probs, entropies": both | entropies,
            "log-probs": both,
            "unweighted": {"logprobs": -flat, "aug_logprobs": -flat} | kl,
        }[kind]


@dataclass(frozen=True)
class Way:
    """`run(case)` gives ({output: (N,)}, (dH, dH_aug, dW)); nothing where `upstream` is None."""

    run: Callable
    computes: str
    logits: str = "float32"
    upstream: str | None = "papo"
    needs: tuple = ()
    compiles: bool = False
    dtypes: tuple = ("float32", "bfloat16", "float16")
    settings: dict = field(default_factory=dict)

    def cannot(self, case=None):
        """Why this way does not run here (for `case`, where one is given); "" where it does."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        if self.run is linear_cross_entropy and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no F.linear_cross_entropy"
        if case is not None:
            dtype = str(case.hidden.dtype).removeprefix("torch.")
            if dtype not in self.dtypes:
                return f"not for {dtype}"
        return ""

    def __call__(self, case):
        return self.run(case, **self.settings)


def six_matmuls(case, rows=512):
    """Logits, dH and dW of both streams and nothing else, into memory that is there: no dense
    method can be faster."""
    w = case.states.weight
    n = min(rows, len(case.targets))
    z, dx, dw = w.new_empty(n, len(w)), w.new_empty(n, w.shape[1]), torch.empty_like(w)
    with torch.no_grad():
        for states in (case.states.hidden, case.states.aug_hidden):
            for x in states.split(n):
                logits = torch.mm(x, w.T, out=z[: len(x)])
                torch.mm(logits, w, out=dx[: len(x)])
                torch.mm(logits.T, x, out=dw)
    return {}, ()


def _gradients(case, upstream, outputs):
    """Gradients of sum over outputs of <upstream, output>."""
    used = [outputs[o] for o in upstream]
    return torch.autograd.grad(used, case.leaves, [upstream[o].to(outputs[o]) for o in upstream])


def _detached(outputs):
    return {o: x.detach() for o, x in outputs.items()}


def ours(case, **options):
    stats = token_stats(
        case.hidden, case.weight, case.targets, aug_hidden=case.aug_hidden, **options
    )
    outputs = stats._asdict()
    return _detached(outputs), _gradients(case, case.upstream("papo"), outputs)


def whole_logits(case):
    """What a trainer would write: logits in the operands' dtype, the rest in float32, autograd."""
    log_p, log_q = (
        F.log_softmax((x @ case.weight.T).float(), dim=-1) for x in (case.hidden, case.aug_hidden)
    )
    label = case.targets[:, None]
    p, q = log_p.exp(), log_q.exp()
    outputs = {
        "logprobs": log_p.gather(1, label).squeeze(1),
        "entropy": -(p * log_p).sum(-1),
        "aug_logprobs": log_q.gather(1, label).squeeze(1),
        "aug_entropy": -(q * log_q).sum(-1),
        "kl_prcp": (p * (log_p - log_q)).sum(-1),
    }
    return _detached(outputs), _gradients(case, case.upstream("papo"), outputs)


def trl_log_probs(case):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as width

    outputs = {}
    for prefix, x in (("", case.hidden), ("aug_", case.aug_hidden)):
        found = ChunkedLogProbFunction.apply(
            x, case.weight, None, case.targets, 1.0, width, None, 1.0, ("entropy",)
        )
        outputs |= {f"{prefix}logprobs": found[0], f"{prefix}entropy": found[1]}
    return outputs


def trl_four(case):
    outputs = trl_log_probs(case)
    return _detached(outputs), _gradients(case, case.upstream("log-probs, entropies"), outputs)


def trl_five(case):
    """Log-probs and entropies by one function, the KL by another: once for each stream's gradient,
    since the "teacher" gets none."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Divergence

    outputs = trl_log_probs(case)
    w = case.weight.detach()
    x, xa = case.hidden, case.aug_hidden
    # Reverse KL(student || teacher) = KL(p || q), and forward KL(teacher || student) = KL(p || q).
    kl, _ = Divergence.apply(x, case.weight, None, xa.detach(), w, None, 1.0)
    kl_aug, _ = Divergence.apply(xa, case.weight, None, x.detach(), w, None, 0.0)
    upstream = case.upstream("papo")
    grads = _gradients(
        case,
        upstream | {"kl_aug": upstream["kl_prcp"]},
        outputs | {"kl_prcp": kl, "kl_aug": kl_aug},
    )
    return _detached(outputs | {"kl_prcp": kl}), grads


def liger_grpo(case, compiled=True, chunk_size=None):
    """Log-probs of both streams in a policy gradient, a token being a sequence of its own.

    chunk_size: tokens whose logits are held at a time; None for all.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    n = len(case.targets)
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, chunk_size=chunk_size or n
    )
    mask = torch.ones(n, 1, device=case.hidden.device)
    total = 0
    for x, advantages in (
        (case.hidden, case.advantages),
        (case.aug_hidden, case.aug_advantages),
    ):
        value, _ = loss(x[:, None], case.weight, case.targets[:, None], mask, advantages)
        total = total + value
    return {}, torch.autograd.grad(total, case.leaves)


def liger_jsd(case):
    """Cross entropy and KL, once for each stream's gradient, since the "teacher" gets none."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    total = 0
    w = case.weight.detach()
    for beta, x, other in (
        (1.0, case.hidden, case.aug_hidden),
        (0.0, case.aug_hidden, case.hidden),
    ):
        loss = LigerFusedLinearJSDLoss(1.0, -KL_PRCP_COEF, beta)
        total = total + loss(x, case.weight, other.detach(), w, case.targets)
    # The loss is 1-dimensional or not according to version.
    return {}, torch.autograd.grad(total.sum(), case.leaves)


def cce(case, impl):
    from cut_cross_entropy import linear_cross_entropy as function

    outputs = {
        name: -function(x, case.weight, case.targets, reduction="none", impl=impl)
        for name, x in zip(LOGPROBS, (case.hidden, case.aug_hidden), strict=True)
    }
    return _detached(outputs), _gradients(case, case.upstream("log-probs"), outputs)


def linear_cross_entropy(case):
    options = torch.nn.LinearCrossEntropyOptions()
    outputs = {
        name: -F.linear_cross_entropy(
            x, case.weight, case.targets, reduction="none", options=options
        )
        for name, x in zip(LOGPROBS, (case.hidden, case.aug_hidden), strict=True)
    }
    return _detached(outputs), _gradients(case, case.upstream("log-probs"), outputs)


FLOOR, OURS, DENSE, WHOLE = (
    "six bare matmuls",
    "papo_kernels",
    "papo_kernels, dense",
    "whole logits",
)
ALL = "all five outputs, gradients into both streams"
ROUNDED = "operands' dtype"
WAYS = {
    FLOOR: Way(six_matmuls, "nothing: 6·N·V·D of products alone", ROUNDED, None),
    OURS: Way(ours, ALL, compiles=True),
    DENSE: Way(ours, ALL + "; grad_budget=0", settings={"grad_budget": 0.0}),
    WHOLE: Way(whole_logits, ALL, ROUNDED),
    "whole logits, float32": Way(
        ours, ALL, settings={"backend": "reference"}, dtypes=("bfloat16", "float16")
    ),
    "TRL chunked, five": Way(
        trl_five, ALL + ", in four calls", f"{ROUNDED}; float32 for the KL", needs=("trl",)
    ),
    "TRL chunked, four": Way(
        trl_four,
        "log-probs and entropies of both streams, in two calls; no KL",
        ROUNDED,
        "log-probs, entropies",
        needs=("trl",),
    ),
    "Liger JSD": Way(
        liger_jsd,
        "sums of log-probs and of the KL, in two calls; no per-token weights, no entropies",
        ROUNDED,
        "unweighted",
        needs=("liger_kernel",),
        compiles=True,
    ),
    "Liger GRPO": Way(
        liger_grpo,
        "policy gradient of both streams' log-probs, in two calls; no entropies, no KL",
        ROUNDED,
        "log-probs",
        needs=("liger_kernel",),
        compiles=True,
    ),
    "CCE torch_compile": Way(
        cce,
        "log-probs of both streams, in two calls; no entropies, no KL",
        ROUNDED,
        "log-probs",
        needs=("cut_cross_entropy",),
        compiles=True,
        settings={"impl": "torch_compile"},
    ),
    "torch linear_cross_entropy": Way(
        linear_cross_entropy,
        "log-probs of both streams, in two calls; no entropies, no KL",
        ROUNDED,
        "log-probs",
    ),
}
ESSENTIAL = (FLOOR, OURS, WHOLE, DENSE)
