"""Attention inside pictures: transformers' own numbers, in one call where a kernel takes it."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from papo_fast.model import picture_attention
from papo_fast.model.picture_attention import attend_inside_pictures
from support.family_checkpoints import byte_tokenizer, family_config

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
# patches of three pictures: windows of Qwen2.5-VL do not divide them evenly
GRIDS = torch.tensor([[1, 6, 10], [1, 4, 4], [1, 10, 14]])


def tower(family, ours):
    torch.manual_seed(0)
    config = family_config(family, byte_tokenizer())
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    if ours:
        attend_inside_pictures(model)
    return model.model.visual


def features_and_gradients(visual):
    g = torch.Generator().manual_seed(1)
    size = visual.config.patch_size**2 * 2 * 3
    pixels = torch.randn(int(GRIDS.prod(1).sum()), size, generator=g)
    out = visual(pixels, grid_thw=GRIDS)
    found = out if isinstance(out, torch.Tensor) else out.pooler_output
    found.square().mean().backward()
    grads = [p.grad for p in visual.parameters() if p.grad is not None]
    assert len(grads) > 10
    return [found.detach(), *grads]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_kernel_it_is_transformers_own_bit_for_bit(family):
    want = features_and_gradients(tower(family, ours=False))
    got = features_and_gradients(tower(family, ours=True))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_gets_all_pictures_in_one_call(family, monkeypatch):
    """The kernel here is attention written out, with a mask of who sees whom."""
    calls = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
        assert cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k) and not causal
        assert max_q == max_k == int(cu_q.diff().max()) and int(cu_q[-1]) == len(q)
        calls.append(len(cu_q) - 1)
        picture = torch.searchsorted(cu_q[1:].contiguous(), torch.arange(len(q)), right=True)
        scores = scale * torch.einsum("qhd,khd->hqk", q, k)
        scores = scores.masked_fill(picture[:, None] != picture[None, :], -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

    want = features_and_gradients(tower(family, ours=False))
    monkeypatch.setattr(picture_attention, "variable_length", lambda device, dtype: kernel)
    got = features_and_gradients(tower(family, ours=True))
    assert len(calls) == 2  # one for each block
    if family == "qwen2_5_vl":
        assert calls[0] > len(GRIDS) and calls[1] == len(GRIDS)  # windows, then whole pictures
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_autocast_gives_the_kernel_one_dtype(monkeypatch):
    """Rotary embedding makes queries and keys float32, which the kernels do not take."""
    seen = []

    def kernel(q, k, v, *rest):
        seen.append({x.dtype for x in (q, k, v)})
        return v

    monkeypatch.setattr(picture_attention, "variable_length", lambda device, dtype: kernel)
    with torch.autocast("cpu", torch.bfloat16):
        features_and_gradients(tower("qwen2_5_vl", ours=True))
    assert seen == [{torch.bfloat16}] * 2
