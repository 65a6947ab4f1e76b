"""The order of rows: each once in an epoch, by the seed alone, and on from where it was."""

import io
from itertools import chain

import pytest
import torch

from papo_fast.data.prompts import PromptStream
from papo_fast.errors import InputError
from support.data_rows import ROWS, dataset, row


def test_data_smaller_than_a_batch_is_named_with_both_numbers(seven):
    with pytest.raises(
        InputError, match=r"has 7 rows, fewer than rollout.prompts = 8: lower --rollout.prompts"
    ):
        PromptStream(seven, 8, seed=0)
    stream = PromptStream(seven, 7, seed=0, option="rollout.filter_prompts")
    with pytest.raises(InputError, match=r"fewer than rollout.filter_prompts = 9: lower --rollout"):
        stream.take(9)


def draw(stream, batches):
    return [[p.index for p in next(stream)] for _ in range(batches)]


def test_every_epoch_holds_every_row_once_in_a_new_order(seven):
    drawn = list(chain.from_iterable(draw(PromptStream(seven, 3, seed=5), 7)))
    epochs = [drawn[i : i + ROWS] for i in range(0, 3 * ROWS, ROWS)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_depends_on_the_seed_alone(seven):
    torch.manual_seed(1)
    first = draw(PromptStream(seven, 3, seed=5), 6)
    torch.manual_seed(2)
    torch.rand(10)
    assert draw(PromptStream(seven, 3, seed=5), 6) == first
    assert draw(PromptStream(seven, 3, seed=6), 6) != first


def test_drawing_leaves_the_global_generator_alone(seven):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    draw(PromptStream(seven, 3, seed=5), 6)
    assert torch.equal(torch.rand(4), expected)


def test_without_shuffling_the_rows_come_in_order(seven):
    drawn = chain.from_iterable(draw(PromptStream(seven, 4, seed=0, shuffle=False), 3))
    assert list(drawn) == [
        *range(ROWS),
        *range(5),
    ]


@pytest.mark.parametrize("before", range(8))
def test_a_restored_stream_goes_on_where_it_was(seven, before):
    stream = PromptStream(seven, 3, seed=1)
    draw(stream, before)
    state = io.BytesIO()
    torch.save(stream.state_dict(), state)
    state.seek(0)
    restored = PromptStream(seven, 3, seed=1)
    restored.load_state_dict(torch.load(state))
    assert restored.epoch == stream.epoch
    assert draw(restored, 6) == draw(stream, 6)


def test_a_position_in_other_data_is_refused(folder, encoder, seven):
    state = PromptStream(seven, 3, seed=1).state_dict()
    other = dataset(folder, encoder, [row(n) for n in range(5)], name="other.jsonl")
    with pytest.raises(InputError, match=r"in data of 7 rows but .* has 5"):
        PromptStream(other, 3, seed=1).load_state_dict(state)


def test_worker_processes_give_the_same_prompts(seven):
    assert draw(PromptStream(seven, 3, seed=1, num_workers=1), 5) == draw(
        PromptStream(seven, 3, seed=1), 5
    )
