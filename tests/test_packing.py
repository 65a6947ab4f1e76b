"""Packed trees against the plain model, one sequence at a time; and how groups are distributed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from papo_fast.data.encoded import EncodedPrompt
from papo_fast.data.encoder import PromptEncoder
from papo_fast.errors import InputError
from papo_fast.model import attention
from papo_fast.model.attention import Segment, TreeLayout, tree_attention
from papo_fast.model.batching import distribute, tree_flops, tree_tokens
from papo_fast.model.flops import ModelShape
from papo_fast.model.packing import pack
from papo_fast.model.policy import Policy
from papo_fast.samples import all_samples
from support.family_checkpoints import FAMILIES
from support.groups import DATA, group_of, load_policy, token_ids
from support.hybrid_float64 import hybrid_in_float64
from support.plain_checkpoints import write_plain_checkpoint
from support.whole_logits import picture

OUTPUTS = ("logprobs", "entropy", "aug_logprobs", "aug_entropy", "kl_prcp")
property_test = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen3_5"])
def policy_and_encoder(request, tmp_path_factory):
    """In float32; in float64 where chunks of linear attention round gradients to four digits."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in FAMILIES:
        return load_policy(folder, request.param)
    encoder = PromptEncoder(write_plain_checkpoint(folder, request.param), DATA)
    return Policy(hybrid_in_float64(folder), encoder.banned_token_ids, torch.float64), encoder


@st.composite
def grouped_responses(draw):
    """(text, picture sizes, responses) of some groups."""
    size = st.tuples(st.integers(56, 110), st.integers(56, 110))
    text = st.text("abc ", min_size=1, max_size=12)
    response = st.lists(st.integers(60, 120), min_size=1, max_size=9)
    group = st.tuples(text, st.lists(size, max_size=2), st.lists(response, min_size=1, max_size=5))
    return draw(st.lists(group, min_size=1, max_size=3))


def encoded_groups(encoder, described, seed):
    groups = []
    for text, sizes, responses in described:
        prompt = encoder.encode(text, [picture(w, h, seed + i) for i, (w, h) in enumerate(sizes)])
        pixels = prompt.pixel_values
        aug = None if pixels is None else torch.randn_like(pixels)
        groups.append(group_of(prompt, responses, aug))
    return groups


def plain_loss(policy, groups, weights):
    """Statistics and loss of one sequence at a time through the model's own forward, in float64.

    Only the logits come from the model; the statistics are their definitions.
    """
    columns, loss = [], 0.0
    for group in groups:
        prompt = group.prompt.encoded
        for response in token_ids(group):
            ids = torch.cat([prompt.input_ids, torch.tensor(response)])[None]
            types = torch.zeros_like(ids)
            types[0, : len(prompt)] = prompt.mm_token_type_ids
            log = []
            for pixels in (prompt.pixel_values, group.aug_pixels):
                inputs = {"input_ids": ids, "mm_token_type_ids": types}
                if pixels is not None:
                    inputs |= {"pixel_values": pixels, "image_grid_thw": prompt.image_grid_thw}
                policy.model.model.rope_deltas = None
                logits = policy.model(**inputs).logits[0, len(prompt) - 1 : -1]
                log.append((logits.double() + policy.banned_V.double()).log_softmax(-1))
            (log_p, log_q), label = log, torch.tensor(response)[:, None]
            p, q = log_p.exp(), log_q.exp()
            stats = torch.stack(
                [
                    log_p.gather(1, label)[:, 0],
                    -(p * log_p).sum(-1),
                    log_q.gather(1, label)[:, 0],
                    -(q * log_q).sum(-1),
                    (p * (log_p - log_q)).sum(-1),
                ]
            )
            loss = loss + (stats * weights[len(columns)][:, None]).sum()
            columns.append(stats.detach())
    return columns, loss


def gradients(policy, loss):
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


@property_test
@given(described=grouped_responses(), split=st.booleans(), remat=st.booleans(), data=st.data())
def test_packed_trees_equal_one_sequence_at_a_time(
    policy_and_encoder, described, split, remat, data
):
    policy, encoder = policy_and_encoder
    torch.manual_seed(data.draw(st.integers(0, 99)))
    groups = encoded_groups(encoder, described, seed=len(described))
    samples = all_samples(groups)
    weights = torch.randn(len(samples), 5, dtype=torch.float64)
    want, loss = plain_loss(policy, groups, weights)
    want_gradients = gradients(policy, loss)
    budget = max(map(tree_tokens, groups)) * 2 if split else 10**6
    [batches] = distribute(groups, budget, 2, policy.shape)
    policy.train(remat)
    if remat:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    got, loss = {}, 0.0
    for pieces in batches:
        batch = pack(pieces, policy.prompt_positions, aug=True)
        stats, _ = policy.stats(batch)
        stacked = torch.stack([getattr(stats, o) for o in OUTPUTS]).double()
        # which of the samples these are, by identity: two responses may be the same words
        members = [next(i for i, s in enumerate(samples) if s is own) for own in batch.samples]
        loss = loss + (stacked * weights[members][batch.sequence_ids_N].T).sum()
        lengths = [len(s) for s in batch.samples]
        got |= dict(zip(members, stacked.detach().split(lengths, 1), strict=True))
    # the gradient budget is a knob of the kernels, with tests of its own
    got_gradients = gradients(policy, loss)
    if remat:
        policy.model.gradient_checkpointing_disable()
    policy.eval()
    assert got.keys() == set(range(len(want)))
    worst = max(
        ((got[i] - x).abs() / x.abs().clamp_min(1)).max().item() for i, x in enumerate(want)
    )
    size = torch.stack([g.norm() for g in want_gradients.values()]).norm()
    assert got_gradients.keys() == want_gradients.keys()
    errors = {
        n: ((got_gradients[n] - g).norm() / torch.maximum(g.norm(), 1e-3 * size)).item()
        for n, g in want_gradients.items()
    }
    most = 1e-10 if policy.dtype == torch.float64 else 1e-5
    print(f"statistics {worst:.1e}, gradients {max(errors.values()):.1e}")
    assert worst < most
    assert max(errors.values()) < most, max(errors.items(), key=lambda e: e[1])


def test_text_only_batches_can_run_the_vision_tower_without_changing_anything(policy_and_encoder):
    policy, encoder = policy_and_encoder
    groups = encoded_groups(encoder, [("only text", [], [[65, 66], [67]])], seed=0)
    batch = pack(groups, policy.prompt_positions, aug=True)
    results = []
    for policy.always_run_vision in (False, True):
        stats, _ = policy.stats(batch)
        results.append((stats.logprobs, gradients(policy, stats.logprobs.sum())))
    policy.always_run_vision = False
    (before, without), (after, including) = results
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for name, gradient in including.items():
        torch.testing.assert_close(gradient, without.get(name, torch.zeros_like(gradient)))
    tower = {n for n, _ in policy.named_parameters() if ".visual." in n}
    assert tower and tower <= including.keys() and not tower & without.keys()


@pytest.mark.parametrize("changed", [1, 2])
def test_a_branch_sees_its_prompt_and_itself_and_nothing_else(changed):
    # prompt 0-3 with branches 4-6 and 7-8, prompt 9-10 with branch 11-12
    tree = TreeLayout(
        [
            Segment(0, 4),
            Segment(4, 3, 0, 4),
            Segment(7, 2, 0, 4),
            Segment(9, 2),
            Segment(11, 2, 9, 2),
        ]
    )
    visible = {1: {4, 5, 6}, 2: {7, 8}}[changed]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 13, 8) for heads in (4, 2, 2))
    before, _ = tree_attention(torch.nn.Module(), q, k, v, None, tree=tree)
    segment = tree.segments[changed]
    k, v = k.clone(), v.clone()
    k[:, :, segment.start] += 1
    v[:, :, segment.start] += 1
    after, _ = tree_attention(torch.nn.Module(), q, k, v, None, tree=tree)
    moved = (after - before).abs().amax((0, 2, 3)).nonzero().flatten().tolist()
    assert set(moved) == visible
    k[:, :, 10] += 1  # the second prompt's last token
    again, _ = tree_attention(torch.nn.Module(), q, k, v, None, tree=tree)
    moved = (again - after).abs().amax((0, 2, 3)).nonzero().flatten().tolist()
    assert set(moved) == {10, 11, 12}


def test_under_autocast_attention_runs_in_its_dtype(monkeypatch):
    # weights in float32 give float32 queries there, which no variable-length kernel takes
    asked, choose = [], attention._implementation
    monkeypatch.setattr(attention, "_implementation", lambda *a: asked.append(a) or choose(*a))
    x = torch.randn(1, 2, 10, 4)
    tree = TreeLayout([Segment(0, 6), Segment(6, 4, 0, 6)])
    plain, _ = tree_attention(torch.nn.Module(), x, x, x, None, tree=tree)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = tree_attention(torch.nn.Module(), x, x, x, None, tree=tree)
    assert asked == [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain, rtol=2e-2, atol=2e-2)


def test_sliding_windows_and_dropout_are_refused():
    tree = TreeLayout([Segment(0, 2)])
    x = torch.randn(1, 1, 2, 8)
    for options in ({"sliding_window": 4}, {"dropout": 0.1}):
        with pytest.raises(ValueError, match="sliding window"):
            tree_attention(torch.nn.Module(), x, x, x, None, tree=tree, **options)


SHAPE = ModelShape(10_000, 256, 5_000, 3_000, 4)


def text_group(prompt, lengths, first=0):
    encoded = EncodedPrompt(
        torch.arange(prompt), torch.zeros(prompt, dtype=torch.int64), None, None
    )
    return group_of(encoded, [[first + i] * n for i, n in enumerate(lengths)])


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), lengths), min_size=1, max_size=12),
    budget=st.integers(40, 600),
    streams=st.integers(1, 2),
    ranks=st.integers(1, 4),
)
def test_every_response_is_planned_once_and_ranks_get_equal_counts(sizes, budget, streams, ranks):
    groups, n = [], 0
    for prompt, group in sizes:
        groups.append(text_group(prompt, group, n))
        n += len(group)
    if n < ranks:
        with pytest.raises(InputError, match="ranks"):
            distribute(groups, budget, streams, SHAPE, ranks)
        return
    planned = distribute(groups, budget, streams, SHAPE, ranks)
    assert len({len(batches) for batches in planned}) == 1 and len(planned) == ranks
    pieces = [piece for batches in planned for batch in batches for piece in batch]
    # a response is its own number, repeated
    assert sorted(ids[0] for piece in pieces for ids in token_ids(piece)) == list(range(n))
    whole = {ids[0]: (group, ids) for group in groups for ids in token_ids(group)}
    for piece in pieces:
        for ids in token_ids(piece):
            group, of_group = whole[ids[0]]
            assert ids == of_group and piece.prompt is group.prompt
    largest = max(p + r for p, group in sizes for r in group)
    if largest * streams <= budget and n % ranks == 0:
        for batches in planned:
            for batch in batches:
                assert batch and sum(map(tree_tokens, batch)) * streams <= budget


def test_ranks_carry_about_equal_work():
    torch.manual_seed(0)
    groups = [
        text_group(int(p), r.tolist(), 5 * i)
        for i, (p, r) in enumerate(
            zip(torch.randint(50, 800, (64,)), torch.randint(1, 400, (64, 5)), strict=True)
        )
    ]
    planned = distribute(groups, 12_000, 2, SHAPE, ranks=4)
    work = [sum(tree_flops(g, SHAPE) for batch in rank for g in batch) for rank in planned]
    print("FLOPs by rank over their mean:", [w * 4 / sum(work) for w in work])
    assert max(work) < 1.05 * min(work)


def test_flops_are_those_that_torch_counts(policy_and_encoder):
    from torch.utils.flop_counter import FlopCounterMode

    policy, encoder = policy_and_encoder
    short = len(encoder.encode("", [picture(90, 90, 1)]))
    # whole chunks of linear attention, which would pad others
    described = ("t" * (-short % 64), [(90, 90)], [[65] * 64, [66] * 64])
    groups = encoded_groups(encoder, [described], seed=1)
    batch = pack(groups, policy.prompt_positions)
    counter = FlopCounterMode(display=False)
    with counter:
        policy._hidden(batch)
    shape = policy.shape
    images = int(groups[0].prompt.encoded.mm_token_type_ids.sum())
    ours = shape.language(batch.tree.segments[-1].start + 64, batch.tree.pairs)
    ours += shape.vision(images)
    counts = counter.get_flop_counts()["Global"]
    matmuls = sum(n for op, n in counts.items() if "attention" not in str(op))
    pairs = shape.language(0, batch.tree.pairs)
    print("FLOPs counted", matmuls, "estimated", ours - pairs)
    assert abs(ours - pairs - matmuls) < 0.02 * matmuls
