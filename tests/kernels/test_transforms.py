"""Derivatives that an operator has no formula for are refused by name; the reference has them."""

import pytest
import torch
from kernel_oracle import Oracle, make_case
from torch.autograd import forward_ad

from papo_kernels import token_stats

# ---- Forward mode


def forward_modes(function, x, tangent):
    def dual(requires_grad):
        with forward_ad.dual_level():
            x_too = x.clone().requires_grad_(requires_grad)
            return function(forward_ad.make_dual(x_too, tangent))

    return {
        "jvp": lambda: torch.func.jvp(function, (x,), (tangent,)),
        "jacfwd": lambda: torch.func.jacfwd(function)(x),
        "dual": lambda: dual(False),
        "dual with gradients": lambda: dual(True),
        "linearize": lambda: torch.func.linearize(function, x)[1](tangent),
        "vmap of jvp": lambda: torch.func.vmap(lambda t: torch.func.jvp(function, (x,), (t,))[1])(
            tangent[None]
        ),
        "compiled": lambda: torch.compile(
            lambda x, t: torch.func.jvp(function, (x,), (t,)), backend="aot_eager"
        )(x, tangent),
    }


@pytest.mark.parametrize("mode", forward_modes(None, None, None))
def test_forward_mode_is_refused_and_never_zero(mode):
    case = make_case(9, 8, 50, aug=False)

    def function(hidden):
        return token_stats(hidden, case.weight, case.targets).logprobs

    run = forward_modes(function, case.hidden, torch.randn(9, 8))[mode]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        run()


def test_the_reference_has_forward_mode():
    case = make_case(9, 8, 50, aug=False, dtype=torch.float64)
    tangent = torch.randn(9, 8, dtype=torch.float64)

    def function(hidden):
        return token_stats(hidden, case.weight, case.targets, backend="reference").logprobs

    _, got = torch.func.jvp(function, (case.hidden,), (tangent,))
    dz, p = tangent @ case.weight.T, Oracle(case).p
    want = dz.gather(1, case.targets[:, None]).squeeze(1) - (p * dz).sum(1)
    torch.testing.assert_close(got, want)


# ---- Gradients and maps of torch.func, and gradients of gradients


def _twice(function, x):
    """The gradient of the squared length of the gradient."""
    leaf = x.clone().requires_grad_()
    (once,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
    return torch.autograd.grad(once.square().sum(), leaf)[0]


def _mapped_backward(function, x):
    """Gradients of each of the first two results, in one backward."""
    leaf = x.clone().requires_grad_()
    result = function(leaf)
    return torch.func.vmap(lambda up: torch.autograd.grad(result, leaf, up)[0])(
        torch.eye(len(result), dtype=x.dtype)[:2]
    )


BY_FUNC, MAP = "gradient by torch.func (grad, vjp, jacrev)", "rule for torch.func.vmap"
TRANSFORMS = {
    "create_graph": ("second derivative", _twice),
    "grad": (BY_FUNC, lambda f, x: torch.func.grad(lambda x: f(x).sum())(x)),
    "jacrev": (BY_FUNC, lambda f, x: torch.func.jacrev(f)(x)),
    "vjp": (BY_FUNC, lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x[:, 0]))[0]),
    "vmap": (MAP, lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x]))),
    "vmap of a backward": (MAP, _mapped_backward),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_it_cannot_do_is_named_and_the_reference_can(name):
    lacking, run = TRANSFORMS[name]
    case = make_case(9, 8, 50, aug=False, dtype=torch.float64)
    case.weight.requires_grad_(False)

    def by(backend):
        return lambda x: token_stats(x, case.weight, case.targets, backend=backend).logprobs

    with pytest.raises(NotImplementedError) as raised:
        run(by("torch"), case.hidden)
    assert str(raised.value).startswith(f"token_stats has no {lacking}")
    assert "backend='reference' has one" in str(raised.value)

    def plain(x):
        return (x @ case.weight.T).log_softmax(-1).gather(1, case.targets[:, None]).squeeze(1)

    torch.testing.assert_close(run(by("reference"), case.hidden), run(plain, case.hidden))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_statistics_that_do_not_depend_on_what_is_transformed_are_left_alone(transform):
    case = make_case(9, 8, 50, aug=False)
    with torch.no_grad():
        want = case.call(token_stats).logprobs

    def function(scale):
        return (scale * token_stats(case.hidden, case.weight, case.targets).logprobs).sum()

    case.hidden.requires_grad_(False)
    case.weight.requires_grad_(False)
    got = transform(function)(torch.ones(() if transform is torch.func.grad else 1))
    torch.testing.assert_close(got.squeeze(), want.sum())
