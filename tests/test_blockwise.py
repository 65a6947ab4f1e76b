"""Numbers in 8 and in 4 bits come back as the nearest that their code has."""

from __future__ import annotations

import pytest
import torch

from papo_fast import blockwise
from support.memory_options import CPU, needs

# The table of Dettmers et al., arXiv 2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.mark.parametrize("columns", [64, 200, 256, 3420])
def test_numbers_in_8_bits_come_back_within_their_code(columns):
    needs("8bit")
    torch.manual_seed(0)
    values = torch.randn(5, columns) * torch.tensor([1e-8, 1e-3, 1, 10, 0])[:, None]
    code = blockwise.code_8(True, CPU)
    codes, scales = blockwise.quantize_8(values, code)
    assert codes.shape == values.shape and codes.dtype == torch.uint8
    assert scales.shape == (5, blockwise.blocks_of(columns))
    back = blockwise.dequantize_8(codes, scales, code)
    largest = scales.repeat_interleave(blockwise.BLOCK_8, 1)[:, :columns]
    # neighbouring numbers of the code are at most 0.0143 apart
    assert ((back - values).abs() <= 0.0075 * largest + 1e-12).all()
    assert (back[4] == 0).all()


@pytest.mark.parametrize("shape", [(48, 16), (40, 96), (300, 70), (31, 33), (7, 5), (192, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_4_bits_are_the_nearest_of_16_numbers_whatever_the_width(shape, dtype):
    """On the CPU bitsandbytes itself is off by a fifth where rows are no whole number of blocks."""
    needs("4-bit LoRA")
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    codes, scales = blockwise.quantize_4(weight)
    back = blockwise.dequantize_4(codes, scales, shape, dtype)
    assert back.shape == shape and back.dtype == dtype
    assert codes.nbytes + scales.nbytes == blockwise.bytes_4(weight.numel())
    largest = scales.repeat_interleave(blockwise.BLOCK_4)[: weight.numel()].view(shape)

    def from_nearest(x):
        return (x.float() / largest)[..., None].sub(torch.tensor(NF4)).abs().amin(-1)

    assert from_nearest(back).max() < (1e-6 if dtype == torch.float32 else 2**-8)
    error = (back.float() - weight.float()).abs() / largest
    assert (error - from_nearest(weight)).max() < (1e-5 if dtype == torch.float32 else 5e-3)
