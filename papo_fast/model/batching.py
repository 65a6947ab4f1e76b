"""How many groups run at once: batches of a token budget, balanced over batches and ranks.

A group is a *tree*, its prompt once and a branch for each sample (`papo_fast.model.packing`). One
that is larger than the budget is cut into groups of fewer samples, which repeat the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from papo_fast.errors import InputError
from papo_fast.model.flops import ModelShape
from papo_fast.samples import Group


def tree_tokens(group: Group, shape: ModelShape | None = None) -> int:
    """Tokens of the group in one stream: of its tree, or of its sequences padded to one length."""
    prompt, lengths = len(group.prompt.encoded), [len(s) for s in group.samples]
    if shape is None or shape.shares_prompt:
        return prompt + sum(lengths)
    return len(lengths) * (prompt + max(lengths))


def tree_flops(group: Group, shape: ModelShape) -> int:
    """FLOPs of one stream's forward pass over the group's tree."""
    encoded = group.prompt.encoded
    prompt, lengths = len(encoded), [len(s) for s in group.samples]
    pairs = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in lengths)
    images, times = int(encoded.mm_token_type_ids.sum()), 1
    if not shape.shares_prompt:
        times = len(lengths)
        pairs += (times - 1) * (prompt * (prompt + 1) // 2)
    return (
        shape.language(times * prompt + sum(lengths), pairs)
        + shape.vision(times * images)
        + shape.head(sum(lengths))
    )


def distribute(
    groups: Sequence[Group], budget: int, streams: int, shape: ModelShape, ranks: int = 1
) -> list[list[list[Group]]]:
    """Deal groups out to ranks and batches.

    Args:
        budget: tokens of one batch, over all its streams. Larger groups are cut.
        streams: 1, or 2 where a batch holds the corrupted stream too.
        shape: of the model, to balance the batches by their FLOPs.
        ranks: every rank gets the same number of batches, none of them empty.

    Returns:
        Rank, batch, groups. The samples are those of `groups`, each in one batch.

    Raises:
        InputError: there are fewer samples than ranks.
    """
    count_of_samples = sum(len(group.samples) for group in groups)
    if count_of_samples < ranks:
        raise InputError(
            f"{count_of_samples} responses cannot be spread over {ranks} ranks: raise "
            "train.update_prompts or rollout.group_size, or use fewer ranks"
        )
    room = budget // streams
    pieces = [piece for group in groups for piece in _cut(group, room, shape)]
    count = -(-sum(tree_tokens(piece, shape) for piece in pieces) // room)
    count += -count % ranks
    batches = None
    while batches is None and count <= count_of_samples:
        pieces = _at_least(count, pieces)
        batches = _fill(pieces, count, room, shape)
        count += ranks
    if batches is None:  # single samples over the budget, and too few of them for the ranks
        batches = _fill(pieces, count_of_samples - count_of_samples % ranks, None, shape)
    # the heaviest batches first, dealt to and fro, so that ranks have equal sums
    batches.sort(key=lambda batch: -sum(tree_flops(group, shape) for group in batch))
    dealt: list[list[list[Group]]] = [[] for _ in range(ranks)]
    for i, batch in enumerate(batches):
        lap, place = divmod(i, ranks)
        dealt[ranks - 1 - place if lap % 2 else place].append(batch)
    return dealt


def _cut(group: Group, budget: int, shape: ModelShape) -> Iterator[Group]:
    """Groups of consecutive samples with trees of at most `budget` tokens.

    A sample that does not fit with its prompt alone makes a tree of its own, over the budget.
    """
    first = 0
    for i in range(1, len(group.samples)):
        longer = replace(group, samples=group.samples[first : i + 1])
        if tree_tokens(longer, shape) > budget:
            yield replace(group, samples=group.samples[first:i])
            first = i
    if first < len(group.samples):
        yield replace(group, samples=group.samples[first:])


def _at_least(count: int, pieces: list[Group]) -> list[Group]:
    """The pieces, the ones of most samples halved until there are `count`."""
    pieces = list(pieces)
    while len(pieces) < count:
        at = max(range(len(pieces)), key=lambda i: len(pieces[i].samples))
        whole, half = pieces[at], len(pieces[at].samples) // 2
        pieces[at : at + 1] = [
            replace(whole, samples=whole.samples[:half]),
            replace(whole, samples=whole.samples[half:]),
        ]
    return pieces


def _fill(
    pieces: Sequence[Group], count: int, room: int | None, shape: ModelShape
) -> list[list[Group]] | None:
    """`count` batches of about equal FLOPs, none empty, or None where some piece finds no room."""
    sizes = [tree_tokens(piece, shape) for piece in pieces]
    costs = [tree_flops(piece, shape) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda i: -costs[i])
    batches: list[list[int]] = [[] for _ in range(count)]
    tokens, flops = [0] * count, [0] * count
    for i in order:
        fits = [
            b
            for b, used in enumerate(tokens)
            if not used or room is None or used + sizes[i] <= room
        ]
        if not fits:
            return None
        best = min(fits, key=lambda b: (flops[b], tokens[b]))
        batches[best].append(i)
        tokens[best] += sizes[i]
        flops[best] += costs[i]
    # groups in their given order, so that what is summed does not depend on their sizes
    return [[pieces[i] for i in sorted(batch)] for batch in batches]
