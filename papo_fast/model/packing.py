"""Groups of responses as trees, packed without padding into batches of a token budget.

The responses of a prompt share its text and its pictures, so the prompt stands once in front of its
responses, its *branches*, in each stream (real and corrupted pictures):

    prompt | response 1 | response 2 | ... | prompt' | response 1 | response 2 | ...

Attention keeps the branches apart (`papo_fast.model.attention`), and every branch continues the
prompt's positions. The result equals one forward pass per sequence, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from papo_fast.data.encoder import EncodedPrompt
from papo_fast.errors import InputError
from papo_fast.model.attention import Segment, TreeLayout
from papo_fast.model.flops import ModelShape


@dataclass(frozen=True)
class Group:
    """One prompt and responses to it.

    Attributes:
        prompt: with its real pictures.
        responses: token ids; each has at least one.
        sequences: for each response the index by which the caller knows it.
        aug_pixels: corrupted pictures, shaped as the prompt's; None for a prompt without pictures,
            whose corrupted stream is then the same as the real one.
    """

    prompt: EncodedPrompt
    responses: Sequence[Sequence[int]]
    sequences: Sequence[int]
    aug_pixels: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Length of the tree in one stream."""
        return len(self.prompt) + sum(len(r) for r in self.responses)

    def flops(self, shape: ModelShape) -> int:
        """Of one stream's forward pass."""
        prompt, lengths = len(self.prompt), [len(r) for r in self.responses]
        pairs = prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in lengths)
        images = int(self.prompt.mm_token_type_ids.sum())
        return (
            shape.language(self.tokens, pairs)
            + shape.vision(images)
            + shape.head(sum(lengths))
        )  # fmt: skip

    def split(self, budget: int) -> Iterator[Group]:
        """Groups of consecutive responses with trees of at most `budget` tokens.

        The prompt is repeated in each. A response that does not fit with its prompt alone makes a
        tree of its own, over the budget.
        """
        room = budget - len(self.prompt)
        first, used = 0, 0
        for i, response in enumerate(self.responses):
            if i > first and used + len(response) > room:
                yield self._part(first, i)
                first, used = i, 0
            used += len(response)
        if first < len(self.responses):
            yield self._part(first, len(self.responses))

    def _part(self, first: int, end: int) -> Group:
        return replace(
            self, responses=self.responses[first:end], sequences=self.sequences[first:end]
        )


def plan(
    groups: Sequence[Group], budget: int, streams: int, shape: ModelShape, ranks: int = 1
) -> list[list[list[Group]]]:
    """Distribute groups over ranks and batches.

    Args:
        budget: tokens of one batch, over all its streams. Trees larger than it are split.
        streams: 1, or 2 where a batch holds the corrupted stream too.
        shape: of the model, to balance the batches by their FLOPs.
        ranks: every rank gets the same number of batches, none of them empty.

    Returns:
        Rank, batch, groups.

    Raises:
        InputError: there are fewer responses than ranks.
    """
    responses = sum(len(group.responses) for group in groups)
    if responses < ranks:
        raise InputError(
            f"{responses} responses cannot be spread over {ranks} ranks: raise "
            "train.update_prompts or rollout.group_size, or use fewer ranks"
        )
    room = budget // streams
    pieces = [piece for group in groups for piece in group.split(room)]
    count = -(-sum(piece.tokens for piece in pieces) // room)
    count += -count % ranks
    batches = None
    while batches is None and count <= responses:
        pieces = _at_least(count, pieces)
        batches = _fill(pieces, count, room, shape)
        count += ranks
    if batches is None:  # single responses over the budget, and too few of them for the ranks
        batches = _fill(pieces, responses - responses % ranks, None, shape)
    # the heaviest batches first, dealt to and fro, so that ranks have equal sums
    batches.sort(key=lambda b: -sum(g.flops(shape) for g in b))
    dealt: list[list[list[Group]]] = [[] for _ in range(ranks)]
    for i, batch in enumerate(batches):
        lap, place = divmod(i, ranks)
        dealt[ranks - 1 - place if lap % 2 else place].append(batch)
    return dealt


def _at_least(count: int, pieces: list[Group]) -> list[Group]:
    """The pieces, the ones of most responses halved until there are `count`."""
    pieces = list(pieces)
    while len(pieces) < count:
        at = max(range(len(pieces)), key=lambda i: len(pieces[i].responses))
        n = len(pieces[at].responses)
        pieces[at : at + 1] = [pieces[at]._part(0, n // 2), pieces[at]._part(n // 2, n)]
    return pieces


def _fill(
    pieces: Sequence[Group], count: int, room: int | None, shape: ModelShape
) -> list[list[Group]] | None:
    """`count` batches of about equal FLOPs, none empty, or None where some piece finds no room."""
    order = sorted(range(len(pieces)), key=lambda i: -pieces[i].flops(shape))
    batches: list[list[int]] = [[] for _ in range(count)]
    tokens, flops = [0] * count, [0] * count
    for i in order:
        size = pieces[i].tokens
        free = [not used or room is None or used + size <= room for used in tokens]
        fits = [b for b in range(count) if free[b]]
        if not fits:
            return None
        best = min(fits, key=lambda b: (flops[b], tokens[b]))
        batches[best].append(i)
        tokens[best] += size
        flops[best] += pieces[i].flops(shape)
    # groups in their given order, so that what is summed does not depend on their sizes
    return [[pieces[i] for i in sorted(b)] for b in batches]


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of some trees in one or two streams, ready for one forward pass.

    `position_ids_3T` are the three axes of M-RoPE. `rows` holds for each stream the (N,) positions
    *before* each response token, whose hidden states predict it; `targets_N` are those tokens and
    `sequence_ids_N` says which entry of `sequences` a token belongs to. A picture that several
    trees share (a split group's) is held once: `image_index` says which picture stands where.
    """

    input_ids_T: Tensor
    position_ids_3T: Tensor
    tree: TreeLayout
    rows: tuple[Tensor, ...]
    targets_N: Tensor
    sequence_ids_N: Tensor
    sequences: list[int]
    pixel_values: Tensor | None
    image_grid_thw: Tensor | None
    image_index: Tensor | None

    @property
    def n_tokens(self) -> int:
        """Response tokens of one stream."""
        return self.targets_N.numel()

    def to(self, device: torch.device) -> PackedBatch:
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | TreeLayout)
        }
        return replace(self, **moved, rows=tuple(r.to(device) for r in self.rows))


def pack(
    groups: Sequence[Group],
    positions: Callable[[EncodedPrompt], Tensor],
    *,
    full: bool = True,
    aug: bool = False,
) -> PackedBatch:
    """One batch of the groups' trees.

    Args:
        positions: M-RoPE positions of a prompt, (3, L); `Policy.prompt_positions`.
        full, aug: the streams: real pictures, corrupted pictures. At least one of them.
    """
    pictures = _Pictures()
    axes_of = [positions(group.prompt) for group in groups]
    ids, places, segments, owners = [], [], [], []
    rows: list[list[Tensor]] = []
    start = 0
    for stream in ("full",) * full + ("aug",) * aug:
        rows.append([])
        for group, axes in zip(groups, axes_of, strict=True):
            prompt = group.prompt
            pixels = prompt.pixel_values if stream == "full" else group.aug_pixels
            pictures.add(pixels, prompt.image_grid_thw)
            root = Segment(start, len(prompt))
            ids.append(prompt.input_ids)
            places.append(axes)
            segments.append(root)
            start += len(prompt)
            after = int(axes.max()) + 1
            for response in group.responses:
                n = len(response)
                ids.append(torch.as_tensor(response, dtype=torch.int64))
                places.append(torch.arange(after, after + n).expand(3, n))
                segments.append(Segment(start, n, root.start, root.length))
                row = torch.arange(start - 1, start + n - 1)
                row[0] = root.start + root.length - 1
                rows[-1].append(row)
                start += n
    responses = [r for group in groups for r in group.responses]
    for i, response in enumerate(responses):
        owners.append(torch.full((len(response),), i, dtype=torch.int64))
    pixel_values, grids, image_index = pictures.joined()
    return PackedBatch(
        input_ids_T=torch.cat(ids),
        position_ids_3T=torch.cat(places, dim=1),
        tree=TreeLayout(segments),
        rows=tuple(torch.cat(r) for r in rows),
        targets_N=torch.cat([torch.as_tensor(r, dtype=torch.int64) for r in responses]),
        sequence_ids_N=torch.cat(owners),
        sequences=[i for group in groups for i in group.sequences],
        pixel_values=pixel_values,
        image_grid_thw=grids,
        image_index=image_index,
    )


class _Pictures:
    """Collects the pictures that differ, in order, and which of them stands where.

    Trees of one prompt hold the very same tensor; that is what makes pictures equal here.
    """

    def __init__(self) -> None:
        self.first: dict[int, int] = {}
        self.pixels: list[Tensor] = []
        self.grids: list[Tensor] = []
        self.index: list[Tensor] = []
        self.n = 0

    def add(self, pixels: Tensor | None, grid: Tensor | None) -> None:
        if pixels is None:
            return
        if id(pixels) not in self.first:
            self.first[id(pixels)] = self.n
            self.n += len(grid)
            self.pixels.append(pixels)
            self.grids.append(grid)
        first = self.first[id(pixels)]
        self.index.append(torch.arange(first, first + len(grid)))

    def joined(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.pixels:
            return None, None, None
        return torch.cat(self.pixels), torch.cat(self.grids), torch.cat(self.index)
