import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papo_fast.errors import InputError
from papo_fast.rewards.shaping import dynamic_filter, group_advantages, overlong_penalty


def test_grpo_is_the_z_score_within_each_group():
    rewards = torch.tensor([1.0, 0.1, 0.0, 0.9, 1.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([7, 3, 7, 3, 7, 3])  # interleaved, ids arbitrary
    expected = []
    for reward, group in zip(rewards.tolist(), groups.tolist(), strict=True):
        members = rewards[groups == group].tolist()
        spread = statistics.stdev(members) + 1e-6
        expected.append((reward - statistics.mean(members)) / spread)
    assert group_advantages(rewards, groups).tolist() == pytest.approx(expected, rel=1e-12)


def test_dr_grpo_only_subtracts_the_mean():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5, 0.1])
    advantages = group_advantages(rewards, torch.tensor([0, 0, 0, 0, 1, 1]), "dr_grpo")
    assert advantages.tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25, 0.2, -0.2])


@given(st.floats(-10, 10, width=32), st.integers(2, 9), st.sampled_from(["grpo", "dr_grpo"]))
def test_equal_rewards_give_exact_zeros(reward, size, kind):
    rewards = torch.tensor([reward] * size + [0.0, 1.0])
    groups = torch.tensor([0] * size + [1, 1])
    advantages = group_advantages(rewards, groups, kind)
    assert (advantages[:size] == 0).all()
    assert advantages[size] < 0 < advantages[size + 1]


def test_float32_rewards_lose_nothing_in_the_mean():
    # 0.9 five times: a float32 mean is off by one bit, which 1e-6 would turn into an advantage.
    rewards = torch.tensor([0.9] * 5 + [0.9, 0.9, 0.9, 0.9, 0.90001])
    groups = torch.tensor([0] * 5 + [1] * 5)
    advantages = group_advantages(rewards, groups)
    assert advantages.dtype == torch.float32
    assert advantages[:5].tolist() == [0] * 5
    assert advantages[5:].sum().item() == pytest.approx(0, abs=1e-6)


def test_a_group_of_one_is_refused_by_its_id():
    with pytest.raises(InputError, match="group 9 has a single response"):
        group_advantages(torch.zeros(3), torch.tensor([4, 9, 4]))


def test_bad_rewards_are_refused():
    groups = torch.tensor([0, 0])
    with pytest.raises(InputError, match=r"rewards\[1\] is nan"):
        group_advantages(torch.tensor([0.0, float("nan")]), groups)
    with pytest.raises(InputError, match=r"expected .B,. and .B,."):
        group_advantages(torch.zeros(3), groups)
    with pytest.raises(InputError, match="expected grpo or dr_grpo"):
        group_advantages(torch.zeros(2), groups, "gae")


def test_filter_drops_hopeless_and_solved_groups():
    accuracies = torch.tensor([0.0, 0, 0, 1, 1, 1, 0, 1, 0])
    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    kept = dynamic_filter(accuracies, groups, 0.01, 0.99)
    assert kept.tolist() == [False] * 6 + [True] * 3


def test_filter_bounds_are_excluded():
    accuracies = torch.tensor([0.0, 1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 1])
    groups = torch.arange(3).repeat_interleave(4)  # means 0.75, 0.25, 0.5
    kept = dynamic_filter(accuracies, groups, 0.25, 0.75)
    assert kept.tolist() == [False] * 8 + [True] * 4
    assert dynamic_filter(accuracies, groups, 0.249, 0.751).all()


def test_filter_keeps_interleaved_groups_apart():
    accuracies = torch.tensor([1.0, 0, 1, 1])
    kept = dynamic_filter(accuracies, torch.tensor([5, 2, 5, 2]), 0.01, 0.99)
    assert kept.tolist() == [False, True, False, True]


def test_overlong_penalty_is_linear_in_the_buffer():
    lengths = torch.tensor([1, 80, 90, 100, 200])
    assert overlong_penalty(lengths, 100, 20).tolist() == [0, 0, -0.5, -1, -1]
    assert overlong_penalty(lengths, 100, 0).tolist() == [0] * 5
    assert overlong_penalty(lengths, 100, 100).tolist() == pytest.approx(
        [-0.01, -0.8, -0.9, -1, -1]
    )
    with pytest.raises(InputError, match="overlong_buffer is 101"):
        overlong_penalty(lengths, 100, 101)
