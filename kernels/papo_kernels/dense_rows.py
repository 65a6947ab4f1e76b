"""The backward of rows on all words, a block of words at a time.

All rows go through a block together. So each row of the weight, and of its gradient, is used once,
and a 16-bit gradient of the weight is rounded as soon as its block is summed.
"""

from papo_kernels.certificate import record
from papo_kernels.equations import TargetPlace

# Logits of a block and of one stream: 8 MiB of float32, which a cache holds.
BLOCK_ELEMENTS = 1 << 21
# Numbers of the block's part of the weight's gradient: 64 MiB of float32.
WEIGHT_ELEMENTS = 1 << 24
# Products with fewer words are thin.
LEAST_WORDS = 1 << 9
# Words that a product takes at a time.
PART = 32
# More rows go some after others. The gradients of the states of so many are summed in float32.
MOST_ROWS = 1 << 15


def add_dense(run, rows, total):
    """Adds the gradients of `rows`, (R,) int64, to the `chunked_backward.GradientSum` `total`."""
    parts = rows.split(MOST_ROWS)
    for at in parts:
        _add_part(run, at, total, all_at_once=len(parts) == 1)


def _add_part(run, at, total, all_at_once):
    call, wanted, head, tiles = run.call, run.wanted, run.call.head, run.tiles
    states, (s, g) = run.states(at), run.of_rows(at)
    vocab, width = call.weight.shape
    d_states = [
        x.new_zeros(x.shape, dtype=head.dtype) if x is not None and of_it else None
        for x, of_it in zip(states, (wanted.hidden, wanted.aug_hidden), strict=True)
    ]
    d_weight = total.sum_of_weight(in_its_dtype=all_at_once)
    size = _words_of_a_block(len(at), vocab, width)
    room = [None if x is None else head.empty(x, size).flatten() for x in states]
    # one rounding at the end: sums over rows in 16 bits diverge
    rounds = d_weight is not None and d_weight.dtype != head.dtype
    sums = d_weight.new_empty(size, width, dtype=head.dtype) if rounds else None
    for first in range(0, vocab, size):
        words = slice(first, min(first + size, vocab))
        weight = call.weight[words]
        z = [
            None if x is None else _logits(run, x, words, r)
            for x, r in zip(states, room, strict=True)
        ]
        dz = tiles.d_products(z, s, g, _place(call, at, words), run)
        for grad, d_x in zip(dz, d_states, strict=True):
            if grad is not None and d_x is not None:
                tiles.add_products(grad, weight, d_x, head)
        if d_weight is not None:
            _add_to_weight(tiles, head, dz, states, d_weight[words], sums)
        total.add_bias(words, dz)
    total.put_states(at, d_states)
    record(len(at), vocab, vocab, None)


def _add_to_weight(tiles, head, dz, states, out, room):
    """Adds the products of a block's gradients and of states to (B, D) `out`.

    room: for the sum, if `out` is in 16 bits. It then has nothing yet, and is written.
    """
    total = out if room is None else room[: len(out)]
    fresh = room is not None
    for grad, x in zip(dz, states, strict=True):
        if grad is not None:
            tiles.add_transposed_products(grad, x, total, head, fresh)
            fresh = False
    if room is not None and not fresh:
        tiles.put_rounded(total, out)


def _words_of_a_block(rows, vocab, width):
    that_fit = min(BLOCK_ELEMENTS // rows, WEIGHT_ELEMENTS // max(1, width))
    # An odd number of the products' parts: see `chunked_forward._apart`.
    parts = (max(LEAST_WORDS, that_fit) // PART - 1) | 1
    return min(vocab, parts * PART)


def _logits(run, states, words, room):
    """(R, B) logits of a block of words, at the front of `room`."""
    call, count = run.call, words.stop - words.start
    z = room[: len(states) * count].view(len(states), count)
    bias = None if call.bias is None else call.bias[words]
    return run.tiles.logits(call.head, states, call.weight[words], bias, z)


def _place(call, at, words):
    """Where the rows' targets stand among a block of words."""
    _, owned, place = call.shard.from_word(words.start).place(
        call.targets[at], words.stop - words.start
    )
    return TargetPlace(owned[:, None], place[:, None])
