"""The precision of float32 products and convolutions on a GPU: a setting of the process."""

from contextlib import contextmanager


@contextmanager
def exact_float32(flags):
    """float32 operands are multiplied in float32 inside it, and as before after it.

    TF32, which a user may have set and cuDNN takes by default, has 10 bits of 23.

    Args:
        flags: `torch.backends.cuda.matmul`, or `torch.backends.cudnn.conv`.
    """
    before = flags.fp32_precision
    flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = before
