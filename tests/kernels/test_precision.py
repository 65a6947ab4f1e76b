"""float32 is float32 inside `exact_float32`, and as before after it."""

import pytest
import torch
from kernel_oracle import make_case

from papo_kernels import op, token_stats
from papo_kernels.precision import exact_float32

FLAGS = {
    "products": torch.backends.cuda.matmul,
    "products on the CPU": torch.backends.mkldnn.matmul,
    "conv": torch.backends.cudnn.conv,
}


@pytest.fixture(params=FLAGS)
def lax(request):
    """Flags of the process, set to fewer bits for one test."""
    flags = FLAGS[request.param]
    first = flags.fp32_precision
    flags.fp32_precision = "tf32"
    yield flags
    flags.fp32_precision = first


def test_it_is_exact_inside_and_as_before_after_an_error(lax):
    @exact_float32(lax)
    def run():
        assert lax.fp32_precision == "ieee"
        raise KeyError

    with pytest.raises(KeyError):
        run()
    assert lax.fp32_precision == "tf32"


def test_it_ends_when_the_last_of_several_leaves_whichever_came_first(lax):
    """Threads that call `token_stats` at the same time come and go like this."""
    first, second = exact_float32(lax), exact_float32(lax)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert lax.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert lax.fp32_precision == "tf32"


@pytest.mark.parametrize("lax", ["products on the CPU"], indirect=True)
def test_products_of_a_call_do_not_follow_the_setting_of_the_process(lax, monkeypatch):
    """Numbers differ only on a CPU that multiplies matrices of fewer bits, as those with AMX."""
    seen = []

    def watch(name):
        inner = getattr(op, name)

        def watched(*args):
            seen.append((name, lax.fp32_precision))
            return inner(*args)

        monkeypatch.setattr(op, name, watched)

    watch("forward_of")
    watch("backward_of")
    case = make_case(6, 8, 50)
    case.hidden.requires_grad_()
    case.call(token_stats).logprobs.sum().backward()
    assert seen == [("forward_of", "ieee"), ("backward_of", "ieee")]
    assert lax.fp32_precision == "tf32"
