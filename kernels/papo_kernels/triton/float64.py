"""What Triton kernels with float64 numbers share; comparisons keep NaN."""

import triton
import triton.language as tl


@triton.jit
def number(ptrs, live):
    return tl.load(ptrs, mask=live, other=0.0).to(tl.float64)


@triton.jit
def larger(x, y):
    """The larger one; NaN where either is."""
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def finite_or_0(x):
    return tl.where(x - x == 0, x, 0.0)


@triton.jit
def log1p(x):
    """log(1 + x) for |x| < 1, also where 1 + x loses bits of x."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 or |x| < 1/4, to 1e-12 of itself."""
    series = 1.0 + x / 9.0
    for k in tl.static_range(8, 1, -1):
        series = 1.0 + x / k * series
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1.0)
