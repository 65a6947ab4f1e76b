"""The two custom operators behind `token_stats`: compilers and FSDP2 see one node each way."""

import torch

from papo_kernels import torch_backend

FIELDS = 5


def _engine(backend):
    """The module that does the work; triton's is imported only where it runs."""
    if backend == "torch":
        return torch_backend
    from papo_kernels import triton_backend

    return triton_backend


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
    budget: float,
    backend: str,
    group: str,
    validate: bool,
    sparse: bool,
) -> list[torch.Tensor]:
    """The outputs of `TokenStats` that exist, then row statistics and levels for the backward.

    group: name of the process group whose ranks hold shards of `weight`; "" for none.
    sparse: the backward may be sparse, so keep levels; else they are empty.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        head = torch_backend.make_head(hidden, aug_hidden, weight, bias, temperature, softcap)
        shard = torch_backend.make_shard(weight, group)
        if validate:
            check_targets(targets, shard.vocab, ignore_index)
        outputs, rows, levels = _engine(backend).forward(
            hidden, aug_hidden, weight, bias, targets, ignore_index, head, shard, sparse
        )
    return [*outputs, rows, levels]


@forward.register_fake
def _(
    hidden, aug_hidden, weight, bias, targets, temperature, softcap, ignore_index, budget, backend,
    group, validate, sparse,
):  # fmt: skip
    n, two = targets.shape[0], aug_hidden is not None
    dtype = torch_backend.compute_dtype(hidden, aug_hidden, weight, bias)
    outputs = [hidden.new_empty(n, dtype=dtype) for _ in range(5 if two else 2)]
    rows = hidden.new_empty(torch_backend.saved_rows(two), n, dtype=dtype)
    shape = _engine(backend).levels_shape(n, weight.shape[0], dtype, sparse)
    return [*outputs, rows, hidden.new_empty(shape, dtype=torch.uint8)]


@torch.library.custom_op("papo::token_stats_backward", mutates_args=())
def backward(
    logprobs: torch.Tensor | None,
    entropy: torch.Tensor | None,
    aug_logprobs: torch.Tensor | None,
    aug_entropy: torch.Tensor | None,
    kl_prcp: torch.Tensor | None,
    hidden: torch.Tensor,
    aug_hidden: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    rows: torch.Tensor,
    levels: torch.Tensor,
    needs: list[bool],
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    budget: float,
    backend: str,
    group: str,
) -> list[torch.Tensor]:
    """Gradients of hidden, aug_hidden, weight and bias; empty where `needs` is False."""
    with torch.autocast(hidden.device.type, enabled=False):
        grads = _engine(backend).backward(
            (logprobs, entropy, aug_logprobs, aug_entropy, kl_prcp),
            (hidden, aug_hidden, weight, bias),
            needs,
            targets,
            rows,
            levels if len(levels) else None,
            ignore_index,
            torch_backend.make_head(hidden, aug_hidden, weight, bias, temperature, softcap),
            torch_backend.make_shard(weight, group),
            budget,
        )
    return [hidden.new_empty(0) if g is None else g for g in grads]


@backward.register_fake
def _(
    logprobs, entropy, aug_logprobs, aug_entropy, kl_prcp, hidden, aug_hidden, weight, bias,
    targets, rows, levels, needs, temperature, softcap, ignore_index, budget, backend, group,
):  # fmt: skip
    operands = (hidden, aug_hidden, weight, bias)
    return [
        torch.empty_like(x) if need else hidden.new_empty(0)
        for x, need in zip(operands, needs, strict=True)
    ]


def _setup_context(ctx, inputs, output):
    hidden, aug_hidden, weight, bias, targets, *options, _validate, _sparse = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, aug_hidden, weight, bias, targets, *output[-2:])
    ctx.options = options


def _autograd(ctx, grads):
    upstream = list(grads[:-2])
    upstream += [None] * (FIELDS - len(upstream))
    needs = list(ctx.needs_input_grad[:4])
    found = backward(*upstream, *ctx.saved_tensors, needs, *ctx.options)
    found = [g if need else None for g, need in zip(found, needs, strict=True)]
    return (*found, *[None] * 9)


forward.register_autograd(_autograd, setup_context=_setup_context)


def token_stats(
    hidden, weight, targets, *, aug_hidden, bias, temperature, softcap, ignore_index, grad_budget,
    backend, group, validate,
):  # fmt: skip
    """Two or five (N,) tensors: logprobs, entropy, aug_logprobs, aug_entropy, kl_prcp."""
    operands = (hidden, aug_hidden, weight, bias)
    differentiable = any(x is not None and x.requires_grad for x in operands)
    sparse = grad_budget > 0 and not group and differentiable and torch.is_grad_enabled()
    outputs = forward(
        *operands, targets, temperature, softcap, ignore_index, grad_budget, backend, group,
        validate, sparse,
    )  # fmt: skip
    return outputs[:-2]


def check_targets(targets, vocab, ignore_index):
    bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}; expected a value in [0, {vocab}) "
            f"or ignore_index={ignore_index}"
        )
