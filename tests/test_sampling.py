"""The parts of sampling: the draw, the cache with room, and the attention of one token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from papo_fast.model.attention import tree_attention
from papo_fast.rollout.hf import draw
from papo_fast.rollout.reserved_cache import ReservedLayer, branch


def test_words_are_drawn_with_their_probabilities():
    torch.manual_seed(0)
    logits = torch.tensor([2.0, -torch.inf, 0.0, 1.0, -torch.inf, -1.0, -torch.inf])
    p = logits.softmax(-1)
    n = 200_000
    drawn = draw(logits.log_softmax(-1).expand(n, -1))
    assert drawn.shape == (n, 1) and drawn.dtype == torch.int64
    counts = drawn[:, 0].bincount(minlength=7).double()
    assert not counts[p == 0].any()
    possible = p > 0
    expected = n * p[possible].double()
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum().item()
    print("chi² with 3 degrees of freedom:", chi2)
    assert chi2 < 16.3  # one time in a thousand it is more


def test_rare_words_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    # float32 sums over so many words would lose the small ones behind a large one
    torch.manual_seed(1)
    logits = torch.zeros(150_000)
    logits[0] = torch.tensor(150_000.0).log() + 3.0  # the first word has 95 %
    logprobs = logits.log_softmax(-1)
    drawn = torch.cat([draw(logprobs.expand(200, -1))[:, 0] for _ in range(20)])
    rare = drawn[drawn > 0]
    share = len(rare) / len(drawn)
    assert share == pytest.approx(1 - logprobs[0].exp().item(), abs=0.012)
    halves = (rare > 75_000).double().mean().item()
    assert halves == pytest.approx(0.5, abs=0.13)


def test_one_word_that_is_certain_is_always_drawn():
    logits = torch.full((4, 9), -torch.inf)
    logits[torch.arange(4), [0, 8, 3, 5]] = torch.tensor([0.0, 80.0, -80.0, 5.0])
    for _ in range(50):
        assert draw(logits.log_softmax(-1))[:, 0].tolist() == [0, 8, 3, 5]


def states(*shape):
    return torch.randn(shape), torch.randn(shape)


def test_a_cache_with_room_holds_what_a_growing_one_does():
    torch.manual_seed(2)
    grown, reserved = DynamicCache(), DynamicCache()
    for layer in range(2):
        keys, values = states(3, 2, 5, 4)
        grown.update(keys, values, layer)
        reserved.update(keys, values, layer)
    grown.batch_repeat_interleave(4)
    branch(reserved, 3, 4, room=3)
    for layer in reserved.layers:
        assert type(layer) is ReservedLayer
        for whole in layer._all:
            whole[:, :, 5:] = torch.nan  # what was not written yet must not be seen
    rows = torch.tensor([0, 3, 4, 9, 11])
    for step in range(3):
        if step == 2:
            grown.reorder_cache(rows)
            reserved.reorder_cache(rows)
        for layer in range(2):
            keys, values = states(5 if step == 2 else 12, 2, 1, 4)
            expected = grown.update(keys, values, layer)
            found = reserved.update(keys, values, layer)
            for x, y in zip(found, expected, strict=True):
                assert torch.equal(x, y)
        assert reserved.get_seq_length() == grown.get_seq_length() == 6 + step
    with pytest.raises(RuntimeError):
        reserved.update(*states(5, 2, 1, 4), 0)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_token_attends_as_with_repeated_keys(masked, scaling):
    torch.manual_seed(3)
    query = torch.randn(5, 6, 1, 8)
    keys, values = (torch.randn(5, 2, 9, 8)[:, :, :7] for _ in range(2))  # of a cache with room
    mask = None
    if masked:  # prompts are padded on the left
        mask = (torch.arange(7) >= torch.tensor([0, 1, 2, 3, 6])[:, None])[:, None, None]
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=False)
    expected, _ = sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)
    found, _ = tree_attention(module, query, keys, values, mask, scaling=scaling)
    assert found.shape == expected.shape == (5, 1, 6, 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_mask_of_each_head_is_left_to_transformers():
    torch.manual_seed(4)
    query = torch.randn(2, 4, 1, 8)
    keys, values = states(2, 2, 6, 8)
    mask = torch.rand(2, 4, 1, 6) > 0.3
    mask[..., 0] = True
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    expected, _ = sdpa_attention_forward(module, query, keys, values, mask)
    found, _ = tree_attention(module, query, keys, values, mask)
    assert torch.equal(found, expected)
