"""float32 is float32 inside `exact_float32`, and as before after it."""

import pytest
import torch

from papo_kernels.precision import exact_float32


@pytest.mark.parametrize(
    "flags", [torch.backends.cuda.matmul, torch.backends.cudnn.conv], ids=["products", "conv"]
)
def test_it_is_exact_inside_and_as_before_after_an_error(flags):
    first = flags.fp32_precision
    flags.fp32_precision = "tf32"

    @exact_float32(flags)
    def run():
        assert flags.fp32_precision == "ieee"
        raise KeyError

    try:
        with pytest.raises(KeyError):
            run()
        assert flags.fp32_precision == "tf32"
    finally:
        flags.fp32_precision = first
