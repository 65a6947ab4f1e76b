"""Linear attention over packed trees against sequences of their own, which share nothing."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from papo_fast.config import ModelConfig
from papo_fast.data.encoder import PromptEncoder
from papo_fast.model.attention import Segment, TreeLayout
from papo_fast.model.choice import load_encoder
from papo_fast.model.linear_attention import branch_linear_attention
from papo_fast.model.plain import PlainPolicy
from papo_fast.model.policy import Policy
from support.groups import DATA, group_of
from support.hybrid_float64 import hybrid_in_float64, library
from support.plain_checkpoints import write_plain_checkpoint
from support.whole_logits import picture

# Tokens of prompts and of their responses: shorter than the convolution reads (4), about a chunk
# of the delta rule (64), and longer.
TREES = [(1, [1, 2]), (2, [3]), (70, [64, 65, 3]), (3, [4, 1, 70]), (130, [1, 30]), (5, [300, 2])]
TOKENS = sum(prompt + sum(responses) for prompt, responses in TREES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_plain_checkpoint(tmp_path_factory.mktemp("hybrid") / "qwen3_5", "qwen3_5")


def layout(trees):
    segments, start = [], 0
    for prompt, responses in trees:
        root = Segment(start, prompt)
        segments.append(root)
        start += prompt
        for length in responses:
            segments.append(Segment(start, length, root.start, root.length))
            start += length
    return TreeLayout(segments)


def a_layer(checkpoint, modeling, name="Qwen3_5GatedDeltaNet", **changes):
    """A layer of random weights that forgets slowly enough for a prompt to matter."""
    config = AutoConfig.from_pretrained(checkpoint).text_config
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    layer = getattr(modeling, name)(config, 0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=0.3)
        layer.A_log.copy_(torch.linspace(-5, -1, len(layer.A_log)))
    return layer


def alone(layer, x_TD, tree):
    """Each response behind a prompt of its own; prompts' outputs are those of the first time."""
    out = {}
    for s in tree.segments:
        if s.prefix:
            before = slice(s.prefix_start, s.prefix_start + s.prefix)
            own = slice(s.start, s.start + s.length)
            rows = layer(torch.cat([x_TD[before], x_TD[own]])[None])[0]
            out.setdefault(s.prefix_start, rows[: s.prefix])
            out[s.start] = rows[s.prefix :]
    return torch.cat([out[s.start] for s in tree.segments])


def gradients_of(loss, x_TD, layer):
    """Of the inputs and of each weight, as one vector each."""
    named = {"inputs": x_TD} | dict(layer.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize(
    ("modeling", "name", "changes"),
    [
        (library(), "Qwen3_5GatedDeltaNet", {}),
        (library(), "Qwen3_5GatedDeltaNet", {"linear_num_value_heads": 4}),
        (library(), "Qwen3_5GatedDeltaNet", {"linear_conv_kernel_dim": 2}),
        (modeling_qwen3_5, "Qwen3_5GatedDeltaNet", {}),
        (modeling_qwen3_5_moe, "Qwen3_5MoeGatedDeltaNet", {}),
    ],
    ids=["float64", "heads share keys", "another kernel", "float32", "MoE float32"],
)
def test_a_tree_is_its_sequences_and_its_prompt_gets_all_their_gradients(
    checkpoint, modeling, name, changes
):
    exact = modeling is library()
    layer = a_layer(checkpoint, modeling, name, **changes).to(torch.float64 if exact else None)
    tree = layout(TREES)
    weight = next(layer.parameters())
    x, w = (torch.randn(TOKENS, 32, dtype=weight.dtype) for _ in range(2))
    x.requires_grad_()
    want = alone(layer, x, tree)
    of_want = gradients_of((want * w).sum(), x, layer)
    branch_linear_attention(layer)
    got = layer(x[None], tree=tree)[0]
    of_got = gradients_of((got * w).sum(), x, layer)
    errors = {n: ((of_got[n] - g).norm() / g.norm()).item() for n, g in of_want.items()}
    errors["outputs"] = ((got - want).norm() / want.norm()).item()
    print({n: f"{e:.1e}" for n, e in errors.items()})
    assert max(errors.values()) < (1e-10 if exact else 1e-5), errors
    # and it would show: what reaches prompts from their responses is no small part
    own = [s.start + i for s in tree.segments if s.prefix for i in range(s.length)]
    only = torch.zeros_like(w)
    only[own] = w[own]
    through = gradients_of((layer(x[None], tree=tree)[0] * only).sum(), x, layer)["inputs"]
    for s in tree.segments:
        if not s.prefix:
            rows = slice(s.start, s.start + s.length)
            assert through[rows].abs().amax() > 1e-2 * through.abs().amax()


def test_what_stands_in_one_segment_reaches_no_other(checkpoint):
    layer = a_layer(checkpoint, modeling_qwen3_5)
    branch_linear_attention(layer)
    tree = layout(TREES)
    x = torch.randn(1, TOKENS, 32)
    with torch.no_grad():
        before = layer(x, tree=tree)
        for changed in tree.segments:
            y = x.clone()
            y[:, changed.start : changed.start + changed.length] = torch.nan
            moved = (layer(y, tree=tree) != before).any(-1)[0]
            for s in tree.segments:
                sees = s == changed or (s.prefix and s.prefix_start == changed.start)
                rows = moved[s.start : s.start + s.length]
                assert rows.all() if sees else not rows.any(), (changed, s)


def test_without_a_tree_a_layer_is_what_it_was_and_others_are_left_alone(checkpoint):
    x = torch.randn(2, 9, 32)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    layer, other = (a_layer(checkpoint, modeling_qwen3_5) for _ in range(2))
    for _ in range(2):
        branch_linear_attention(layer)
    assert type(other) is modeling_qwen3_5.Qwen3_5GatedDeltaNet is type(layer).__mro__[2]
    assert type(layer).__name__ == type(other).__name__
    assert torch.equal(layer(x, None, mask), other(x, None, mask))


def test_a_stream_whose_text_sees_no_picture_has_a_state_without_it(checkpoint):
    """The corruption `attention`: the text's own tokens, each in its place."""
    policy = Policy(hybrid_in_float64(checkpoint), [], torch.float64)
    encoder = PromptEncoder(checkpoint, DATA)
    prompt = encoder.encode("a<image>bc", [picture(60, 110, 1)])
    responses = [[70, 71, 72], [90]]
    batch = policy.pack([group_of(prompt, responses)], aug=True)
    kept = prompt.mm_token_type_ids == 0
    axes = policy.prompt_positions(prompt)
    with torch.no_grad():
        got = policy._hidden(batch)[1].split([3, 1])
        for response, rows in zip(responses, got, strict=True):
            after = int(axes.max()) + 1 + torch.arange(len(response))
            want = policy.model.model(
                input_ids=torch.cat([prompt.input_ids[kept], torch.tensor(response)])[None],
                position_ids=torch.cat([axes[:, kept], after.expand(3, -1)], 1)[:, None],
                use_cache=False,
            ).last_hidden_state[0]
            torch.testing.assert_close(rows, want[int(kept.sum()) - 1 : -1], atol=1e-10, rtol=1e-10)


@pytest.mark.slow
def test_a_long_prompt_that_runs_once_is_cheaper(checkpoint):
    """A group of 8 on one thread, in seconds of the processor: others may use the machine too."""
    assert torch.get_num_threads() == 1
    response = [list(range(60 + i, 108 + i)) for i in range(8)]
    spent = {}
    for forward, kind in (("fast", Policy), ("plain", PlainPolicy)):
        config = ModelConfig(path=str(checkpoint), dtype="float32", forward=forward)
        encoder = load_encoder(config, DATA)
        policy = kind.load(config, encoder.banned_token_ids, torch.device("cpu")).train()
        group = group_of(encoder.encode("word " * 200, []), response)
        times = []
        for _ in range(4):
            start = time.process_time()
            policy.stats(policy.pack([group]))[0].logprobs.sum().backward()
            times.append(time.process_time() - start)
        spent[forward] = min(times)
    ratio = spent["plain"] / spent["fast"]
    print(f"prompt {len(group.prompt.encoded)}, 8 x 48: plain {spent['plain']:.2f} s, "
          f"fast {spent['fast']:.2f} s, {ratio:.1f} times faster")  # fmt: skip
    assert ratio > 2
