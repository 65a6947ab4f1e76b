"""The public function: what it promises, what it refuses, and which backend does the work."""

import functools
import importlib.util
import logging
import numbers
import os
from typing import NamedTuple

import torch

from papo_kernels import op, reference
from papo_kernels.rows import Options

log = logging.getLogger("papo_kernels")

# Asked once, since `torch.compile` cannot look into `find_spec`.
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "triton", "torch", "reference")
BUDGETS = ("call", "token")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TokenStats(NamedTuple):
    """Statistics of N response tokens in nats, each (N,) float32 (float64 for float64 operands).

    A tuple, because FSDP2 and `torch.compile` look for tensors in tuples but not in other classes.
    """

    logprobs: torch.Tensor  # log p(target)
    entropy: torch.Tensor  # H(p)
    aug_logprobs: torch.Tensor | None = None  # log q(target)
    aug_entropy: torch.Tensor | None = None  # H(q)
    kl_prcp: torch.Tensor | None = None  # KL(p || q)
    kl_reverse: torch.Tensor | None = None  # KL(q || p)


def token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    aug_hidden: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    aug_constant: bool = False,
    grad_budget: float = 3e-3,
    budget_of: str = "call",
    backend: str = "auto",
    validate: bool | None = None,
    vocab_group: torch.distributed.ProcessGroup | None = None,
) -> TokenStats:
    """Exact log-probs, entropies and perception KLs of N tokens; the logits never exist as a whole.

    With `z = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature` and
    `p = softmax(z)`, and `q` likewise from `aug_hidden`:

        logprobs = log p[target]    entropy = -sum(p log p)    kl_prcp = sum(p (log p - log q))
                                                            kl_reverse = sum(q (log q - log p))

    `kl_prcp` is the implicit perception loss and the two entropies the double entropy loss of PAPO
    (arXiv 2507.06448): estimated there from the sampled token, summed here over the vocabulary.
    With q constant, the gradient of their sampled estimate, averaged over tokens drawn from p, is
    that of `kl_reverse`. An upstream gradient c of it adds to the gradients of the logits z and
    z_aug (those of q)

        dz = c (p - q)    dz_aug = c q (log q - log p - kl_reverse)

    and one of `kl_prcp` adds `dz = c p (log p - log q - kl_prcp)`, `dz_aug = c (q - p)`.

    Args:
        hidden: (N, D) floating; last hidden states under the real image.
        weight: (V, D) floating; the output embedding. May be frozen or tied.
        targets: (N,) int64; the token that was sampled, in [0, V), or `ignore_index`.
        aug_hidden: (N, D) floating; the same tokens under the corrupted image. None: one stream,
            at the cost of one.
        bias: (V,) floating. -inf, and any value of -1e30 or below, bans a token: its p is 0 and its
            log p -inf, under a soft cap too. Any other value is part of the logit, and a soft cap
            bounds it: under `softcap` -1e4 is no ban. None: no bias.
        temperature: in [1e-6, 1e6]; divides the logits after the soft cap.
        softcap: in [1e-6, 1e6], or None for no cap.
        ignore_index: rows with this target give exact zeros, no gradient, and enter no matmul.
        aug_constant: treat q as a constant in everything: aug_hidden gets no gradient, weight and
            bias none through q, and aug_logprobs and aug_entropy none at all; the KLs pull on p
            alone. The backward then costs that of one stream, and q's logits where a KL is used.
        grad_budget: share of each token's gradient that the backward may leave out, in [0, 1);
            0.0 is exact, and on the CPU so is any where the weight has at most 2^18 elements. With
            dz the gradient of `hidden @ weight.T + bias` in one stream, sum |dz| over the words
            left out is at most this share of what `budget_of` names; `record_certificates` reads
            what it was. Norms of the weight's rows are not looked at: words that are left out
            should not be hundreds of times longer than the others.
        budget_of: "call": of the token's own sum |dz| or of the call's root mean square of it,
            whichever is larger (where the weight wants a gradient, that of sum |dz| |h| over the
            token's own |h|). This bounds the error of the whole gradient, and a token whose own
            gradient is far below the others' may lose all of it. "token": of its own alone, which
            keeps more words.
        backend: "auto" (triton on a GPU, torch on the CPU), "triton", "torch" or "reference".
        validate: also check values (that targets lie in [0, V)), which synchronises on CUDA. None:
            on the CPU yes, elsewhere no. An unchecked bad target gives NaN log-probs in its row,
            and nothing more to a loss that leaves these out.
        vocab_group: process group whose ranks hold, in order, row shards of `weight` (V is this
            rank's then, may differ and may be 0) and of `bias`; all else is the same on every
            rank, and `targets` count over the whole vocabulary. The backward is then dense.

    Floating is float16, bfloat16, float32 or float64. Logits are float32 products of the operands
    as given: autocast does not apply, and operands of mixed dtypes are promoted to the widest.

    Returns:
        TokenStats, each (N,) float32 in nats (float64 when an operand is float64), differentiable
        with respect to hidden, aug_hidden, weight and bias. The last four are None without
        `aug_hidden`. A NaN in a row gives NaN in that row's statistics only.

    Raises:
        ValueError: wrong shape, dtype, device or value; the message names the argument.
        NotImplementedError: `backend="triton"` where it cannot run; a second derivative, a
            forward-mode one, or a transform of `torch.func`, which only "reference" has.
    """
    _check_operands(hidden, weight, targets, aug_hidden, bias, vocab_group)
    _check_options(
        temperature, softcap, ignore_index, aug_constant, grad_budget, budget_of, backend, validate
    )
    options = Options(
        temperature=float(temperature),
        softcap=None if softcap is None else float(softcap),
        ignore_index=int(ignore_index),
        grad_budget=float(grad_budget),
        backend=_choose_backend(backend, (hidden, aug_hidden, weight, bias), vocab_group),
        group="" if vocab_group is None else vocab_group.group_name,
        validate=targets.device.type == "cpu" if validate is None else validate,
        aug_constant=aug_constant,
        budget_of=budget_of,
    )
    if options.backend == "reference":
        if vocab_group is not None:
            raise ValueError("vocab_group is given; backend='reference' needs the whole weight")
        return TokenStats(*_by_reference(hidden, aug_hidden, weight, bias, targets, options))
    return TokenStats(*op.token_stats(hidden, aug_hidden, weight, bias, targets, options))


def _by_reference(hidden, aug_hidden, weight, bias, targets, options):
    if options.validate:
        op.check_targets(targets, weight.shape[0], options.ignore_index)
    with torch.autocast(hidden.device.type, enabled=False):
        return reference.token_stats(
            hidden,
            weight,
            targets,
            aug_hidden=aug_hidden,
            bias=bias,
            temperature=options.temperature,
            softcap=options.softcap,
            ignore_index=options.ignore_index,
            aug_constant=options.aug_constant,
        )


def _choose_backend(backend, operands, vocab_group):
    """The backend that will run; says why where "auto" has to take the slower one on a GPU."""
    if backend in ("torch", "reference"):
        return backend
    device = operands[0].device.type
    lacking = _lacks_triton(device, operands, vocab_group)
    if backend == "triton":
        if lacking:
            raise NotImplementedError(
                f"backend='triton' cannot run here: {lacking}; backend='torch' can"
            )
        return backend
    if device == "cpu":
        return "torch"
    if lacking:
        _log_once(f"token_stats on {device} runs the torch backend: {lacking}")
    return "torch" if lacking else "triton"


def _lacks_triton(device, operands, vocab_group):
    if not HAS_TRITON:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"hidden is on {device}, and the kernels need a GPU"
    if any(x is not None and x.dtype == torch.float64 for x in operands):
        return "an operand is float64"
    if vocab_group is not None:
        return "vocab_group is given, and the kernels know no shards"
    return ""


@functools.cache
def _log_once(message):
    log.warning(message)


def _describe(tensor):
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _about_dtensor(name):
    if name != "weight":
        return f"{name} is a DTensor; expected the plain tensor that this rank works on"
    # A bare full_tensor() gives each rank the gradient of its own rows alone.
    return (
        "weight is a DTensor; expected a plain tensor: read it inside the forward for which FSDP2 "
        "gathers it, or pass weight.full_tensor(grad_placements=[Partial('avg')] * "
        "weight.device_mesh.ndim), or weight.to_local() with vocab_group where the vocabulary is "
        "sharded"
    )


def _check_operands(hidden, weight, targets, aug_hidden, bias, vocab_group):
    operands = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets,
        "aug_hidden": aug_hidden,
        "bias": bias,
    }
    for name, x in operands.items():
        if x is None and name in ("aug_hidden", "bias"):
            continue
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
        if type(x).__name__ == "DTensor":  # by name: to import the class takes half a second
            raise ValueError(_about_dtensor(name))
        if x.layout != torch.strided:
            raise ValueError(f"{name} is {_describe(x)} in {x.layout}; expected a dense tensor")
        if name == "targets":
            if x.dtype != torch.int64:
                raise ValueError(f"targets is {_describe(x)}; expected (N,) int64")
        elif x.dtype not in FLOATS:
            raise ValueError(
                f"{name} is {_describe(x)}; expected float16, bfloat16, float32 or float64"
            )
        if x.device != hidden.device:
            raise ValueError(
                f"{name} is on {x.device}; expected the device of hidden, {hidden.device}"
            )
    if vocab_group is not None and not isinstance(vocab_group, torch.distributed.ProcessGroup):
        raise ValueError(
            f"vocab_group is {_shown(vocab_group)}; expected a torch.distributed.ProcessGroup that "
            "this rank is in, or None"
        )
    if hidden.ndim != 2:
        raise ValueError(f"hidden is {_describe(hidden)}; expected (N, D)")
    n, d = hidden.shape
    empty = weight.ndim > 0 and weight.shape[0] == 0 and vocab_group is None
    if weight.ndim != 2 or weight.shape[1] != d or empty:
        raise ValueError(
            f"weight is {_describe(weight)}; expected (V, {d}) with V > 0, "
            f"as hidden is {tuple(hidden.shape)}"
        )
    if targets.shape != (n,):
        raise ValueError(
            f"targets is {_describe(targets)}; expected ({n},) int64, "
            f"as hidden is {tuple(hidden.shape)}"
        )
    if aug_hidden is not None and aug_hidden.shape != hidden.shape:
        raise ValueError(
            f"aug_hidden is {_describe(aug_hidden)}; expected {tuple(hidden.shape)}, as hidden"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias is {_describe(bias)}; expected ({weight.shape[0]},), "
            f"as weight is {tuple(weight.shape)}"
        )


def _check_options(
    temperature, softcap, ignore_index, aug_constant, grad_budget, budget_of, backend, validate
):
    if not _is_scale(temperature):
        raise ValueError(f"temperature is {_shown(temperature)}; expected a number in {_SCALES}")
    if softcap is not None and not _is_scale(softcap):
        raise ValueError(f"softcap is {_shown(softcap)}; expected a number in {_SCALES}, or None")
    if not _is_integer(ignore_index) or not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index is {_shown(ignore_index)}; expected an int of 64 bits")
    for name, value in (("aug_constant", aug_constant), ("validate", validate)):
        if not isinstance(value, bool) and (name, value) != ("validate", None):
            raise ValueError(f"{name} is {_shown(value)}; expected True or False")
    if not _is_number(grad_budget) or not 0 <= grad_budget < 1:
        raise ValueError(
            f"grad_budget is {_shown(grad_budget)}; expected a number in [0, 1), 0 for dense"
        )
    if budget_of not in BUDGETS:
        raise ValueError(
            f"budget_of is {budget_of!r}; expected one of {', '.join(map(repr, BUDGETS))}"
        )
    if backend not in BACKENDS:
        raise ValueError(
            f"backend is {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}"
        )


# Within these bounds a scale's square, its reciprocal and the ratio of two are ordinary float32
# numbers, and so are logits that it divides.
LEAST_SCALE, LARGEST_SCALE = 1e-6, 1e6
_SCALES = f"[{LEAST_SCALE:g}, {LARGEST_SCALE:g}]"


def _is_scale(value):
    return _is_number(value) and LEAST_SCALE <= value <= LARGEST_SCALE


# The ordinary types come first in these two because compilers know them.


def _is_number(value):
    """Whether it is a real number, numpy's included."""
    return isinstance(value, int | float | numbers.Real) and not isinstance(value, bool)


def _is_integer(value):
    return isinstance(value, int | numbers.Integral) and not isinstance(value, bool)


def _shown(value):
    """`value` as messages show it: one short line, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return " ".join(repr(value).split())[:80]
