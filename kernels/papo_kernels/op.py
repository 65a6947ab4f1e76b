"""The two custom operators behind `token_stats`: compilers and FSDP2 see one node each way.

The schema of an operator knows tensors and numbers only. So the options travel one by one here, in
the order of `rows.Options`, and are put together again at once.
"""

from dataclasses import astuple

import torch
from torch.autograd import forward_ad

from papo_kernels import chunked_forward
from papo_kernels.cpu import backward as cpu_backward
from papo_kernels.cpu import forward as cpu_forward
from papo_kernels.eager import backward as eager_backward
from papo_kernels.eager import forward as eager_forward
from papo_kernels.precision import exact_products
from papo_kernels.reference import compute_dtype
from papo_kernels.rows import OUTPUTS, Options, Saved, make_call, make_upstream, of_words

# The last results of the forward operator are not outputs, but the fields of `rows.Saved`.
SAVED = 4

# Elements of a weight up to which the CPU's backward is dense, whatever the budget. At V = 2048 and
# D = 128 the dense one takes as long as the search at best; at V = 316 it is ten times faster.
DENSE_WEIGHT = 2**18


def forward_of(call, keep_levels):
    """`rows.Saved`, by the way that serves the call."""
    if call.options.backend == "triton":
        return _triton_forward().forward(call, keep_levels)
    way = cpu_forward if cpu_forward.usable(call) else eager_forward
    return way.forward(call, keep_levels)


def backward_of(call, saved, upstream, needs):
    """Gradients of the four operands or None, by the way that serves the call.

    The ways of `backend="torch"` save the same, so another one may do the forward.
    """
    if call.options.backend == "triton":
        from papo_kernels.triton import backward as triton_backward

        return triton_backward.backward(call, saved, upstream, needs)
    way = cpu_backward if cpu_backward.usable(call) else eager_backward
    return way.backward(call, saved, upstream, needs)


def _layout(backend):
    """The module that knows what the forward of a backend saves."""
    return _triton_forward() if backend == "triton" else chunked_forward


def _triton_forward():
    # Imported only where it runs: triton may not be installed.
    from papo_kernels.triton import forward as triton_forward

    return triton_forward


@torch.library.custom_op("papo::token_stats", mutates_args=())
def forward(
    hidden: torch.Tensor,
    aug_hidden: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    grad_budget: float,
    backend: str,
    group: str,
    validate: bool,
    aug_constant: bool,
    budget_of: str,
    keep_levels: bool,
) -> list[torch.Tensor]:
    """The (N,) outputs of `TokenStats` that exist, then the four tensors of `rows.Saved`.

    keep_levels: whether the backward may be sparse; if not, levels and lists are empty.
    """
    options = Options(
        temperature, softcap, ignore_index, grad_budget, backend, group, validate, aug_constant,
        budget_of,
    )  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False), exact_products(hidden.device):
        call = make_call(hidden, aug_hidden, weight, bias, targets, options)
        if validate:
            check_targets(targets, call.shard.vocab, ignore_index)
        saved = forward_of(call, keep_levels)
    outputs = saved.outputs(_layout(backend).names(call.streams))
    return [*outputs, saved.rows, saved.levels, saved.order, saved.lists]


@forward.register_fake
def _(
    hidden, aug_hidden, weight, bias, targets, temperature, softcap, ignore_index, grad_budget,
    backend, group, validate, aug_constant, budget_of, keep_levels,
):  # fmt: skip
    n, vocab, layout = targets.shape[0], weight.shape[0], _layout(backend)
    streams = 1 if aug_hidden is None else 2
    names = layout.names(streams)
    dtype = compute_dtype(hidden, aug_hidden, weight, bias)
    levels = layout.levels_shape(n, vocab, keep_levels)
    return [
        *(hidden.new_empty(n, dtype=dtype) for name in OUTPUTS if name in names),
        hidden.new_empty(len(names), n, dtype=dtype),
        hidden.new_empty(levels, dtype=torch.uint8),
        targets.new_empty(n),
        targets.new_empty(layout.lists_size(n, vocab, streams, keep_levels), dtype=torch.int32),
    ]


# It asks the device for numbers, which a graph that is being captured cannot answer.
@torch.library.custom_op(
    "papo::token_stats_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def backward(
    logprobs: torch.Tensor | None,
    entropy: torch.Tensor | None,
    aug_logprobs: torch.Tensor | None,
    aug_entropy: torch.Tensor | None,
    kl_prcp: torch.Tensor | None,
    kl_reverse: torch.Tensor | None,
    hidden: torch.Tensor,
    aug_hidden: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor,
    levels: torch.Tensor,
    order: torch.Tensor,
    lists: torch.Tensor,
    needs: list[bool],
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    grad_budget: float,
    backend: str,
    group: str,
    validate: bool,
    aug_constant: bool,
    budget_of: str,
) -> list[torch.Tensor]:
    """Gradients of hidden, aug_hidden, weight and bias; empty where `needs` is False.

    They are contiguous, whatever strides the operands have: the fake operator has to know that.
    """
    options = Options(
        temperature, softcap, ignore_index, grad_budget, backend, group, validate, aug_constant,
        budget_of,
    )  # fmt: skip
    upstream = make_upstream(logprobs, entropy, aug_logprobs, aug_entropy, kl_prcp, kl_reverse)
    with torch.autocast(hidden.device.type, enabled=False), exact_products(hidden.device):
        call = make_call(hidden, aug_hidden, weight, bias, targets, options)
        upstream = of_words(upstream, targets, call.shard, ignore_index)
        grads = backward_of(call, Saved(rows, levels, order, lists), upstream, needs)
    return [hidden.new_empty(0) if g is None else g.contiguous() for g in grads]


@backward.register_fake
def _(
    logprobs, entropy, aug_logprobs, aug_entropy, kl_prcp, kl_reverse, hidden, aug_hidden, weight,
    bias, targets, rows, levels, order, lists, needs, temperature, softcap, ignore_index,
    grad_budget, backend, group, validate, aug_constant, budget_of,
):  # fmt: skip
    operands = (hidden, aug_hidden, weight, bias)
    return [
        x.new_empty(x.shape) if need else hidden.new_empty(0)
        for x, need in zip(operands, needs, strict=True)
    ]


def _setup_context(ctx, inputs, output):
    hidden, aug_hidden, weight, bias, targets, *options, _keep_levels = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, aug_hidden, weight, bias, targets, *output[-SAVED:])
    ctx.options = options


def _autograd(ctx, grads):
    upstream = list(grads[:-SAVED])
    upstream += [None] * (len(OUTPUTS) - len(upstream))
    needs = list(ctx.needs_input_grad[:4])
    if Options(*ctx.options).aug_constant:
        needs[1] = False
    found = backward(*upstream, *ctx.saved_tensors, needs, *ctx.options)
    found = [g if need else None for g, need in zip(found, needs, strict=True)]
    return (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))


forward.register_autograd(_autograd, setup_context=_setup_context)


# ---- What the operators cannot do


def _lacking(what):
    return NotImplementedError(
        f"token_stats has no {what}; backend='reference' has one, with whole logits in memory"
    )


def _refuse_second_derivative(ctx, *grads):
    raise _lacking("second derivative, only gradients")


def _refuse_map(info, in_dims, *args):
    raise _lacking("rule for torch.func.vmap")


backward.register_autograd(_refuse_second_derivative)
forward.register_vmap(_refuse_map)
backward.register_vmap(_refuse_map)


def _refuse_transforms(operands, differentiable):
    """Refuses the transforms that torch has no way to register a refusal for."""
    # An operator without a formula for forward mode loses tangents without a word.
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in operands):
        raise _lacking("forward-mode derivative (jvp), only gradients")
    # The registered gradient is an `autograd.Function` of a kind that torch.func does not know.
    if differentiable and torch._C._are_functorch_transforms_active():
        raise _lacking("gradient by torch.func (grad, vjp, jacrev), only by autograd")


# ---- The call


def token_stats(hidden, aug_hidden, weight, bias, targets, options):
    """The two or six (N,) tensors that OUTPUTS lists; options: `rows.Options`.

    Raises:
        NotImplementedError: a derivative or a map is asked for that the operators do not have.
    """
    if options.aug_constant and aug_hidden is not None:
        aug_hidden = aug_hidden.detach()
    operands = (hidden, aug_hidden, weight, bias)
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in operands
    )
    _refuse_transforms(operands, differentiable)
    keep_levels = (
        options.grad_budget > 0
        and not options.group
        and differentiable
        and _search_pays(weight, options.backend)
    )
    outputs = forward(*operands, targets, *astuple(options), keep_levels)[:-SAVED]
    if not options.aug_constant:
        return outputs
    # The operator's outputs all hang on the weight, and these depend on it through q alone.
    named = zip(OUTPUTS, outputs, strict=False)
    return [x.detach() if name in ("aug_logprobs", "aug_entropy") else x for name, x in named]


def _search_pays(weight, backend):
    """Whether leaving words out can save more than the search for them costs."""
    return backend == "triton" or weight.numel() > DENSE_WEIGHT


def check_targets(targets, vocab, ignore_index):
    bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}; expected a value in [0, {vocab}) "
            f"or ignore_index={ignore_index}"
        )
