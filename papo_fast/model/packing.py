"""Groups as trees, packed without padding into one forward pass.

The samples of a group share its prompt's text and pictures, so the prompt stands once in front of
its samples, its *branches*, in each stream (real and corrupted pictures):

    prompt | sample 1 | sample 2 | ... | prompt' | sample 1 | sample 2 | ...

Attention keeps the branches apart (`papo_fast.model.attention`), and every branch continues the
prompt's positions. The result equals one forward pass per sequence, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from papo_fast.data.encoded import EncodedPrompt
from papo_fast.model.attention import Segment, TreeLayout
from papo_fast.samples import Group, Sample, all_samples


@dataclass(frozen=True)
class PackedBatch:
    """T tokens of some trees in one or two streams, ready for one forward pass.

    `position_ids_3T` are the three axes of M-RoPE. `predictors` holds for each stream the (N,)
    positions *before* each response token, whose hidden states predict it; `targets_N` are those
    tokens and `sequence_ids_N` says which of `samples` a token belongs to. A picture that several
    trees share (those of a group that was cut) is held once: `image_index` says which picture
    stands where.
    """

    input_ids_T: Tensor
    position_ids_3T: Tensor
    tree: TreeLayout
    predictors: tuple[Tensor, ...]
    targets_N: Tensor
    sequence_ids_N: Tensor
    samples: list[Sample]
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
        return replace(self, **moved, predictors=tuple(x.to(device) for x in self.predictors))


def pack(
    groups: Sequence[Group],
    positions: Callable[[EncodedPrompt], Tensor],
    *,
    full: bool = True,
    aug: bool = False,
    second: bool = False,
) -> PackedBatch:
    """One batch of the groups' trees.

    Args:
        positions: M-RoPE positions of a prompt, (3, L); `Policy.prompt_positions`.
        full, aug, second: the streams: real pictures, corrupted ones, those of the second view. At
            least one of them. Text in a corrupted stream without pixels attends to no picture.
    """
    pictures = _Pictures()
    axes_of = [positions(group.prompt.encoded) for group in groups]
    ids, places, segments = [], [], []
    predictors: list[list[Tensor]] = []
    start = 0
    for stream in ("full",) * full + ("aug",) * aug + ("second",) * second:
        predictors.append([])
        for group, axes in zip(groups, axes_of, strict=True):
            prompt = group.prompt.encoded
            pixels = group.pixels(stream)
            pictures.add(pixels, prompt.image_grid_thw)
            # text that sees no picture: its tokens, which nothing would attend to, are left out
            kept = (prompt.mm_token_type_ids == 0) | (pixels is not None)
            ids.append(prompt.input_ids[kept])
            places.append(axes[:, kept])
            root = Segment(start, len(ids[-1]))
            segments.append(root)
            start += root.length
            after = int(axes.max()) + 1
            for sample in group.samples:
                n = len(sample)
                ids.append(torch.as_tensor(sample.completion.token_ids, dtype=torch.int64))
                places.append(torch.arange(after, after + n).expand(3, n))
                segments.append(Segment(start, n, root.start, root.length))
                before = torch.arange(start - 1, start + n - 1)
                before[0] = root.start + root.length - 1
                predictors[-1].append(before)
                start += n
    samples = all_samples(groups)
    lengths = torch.tensor([len(s) for s in samples])
    pixel_values, grids, image_index = pictures.joined()
    return PackedBatch(
        input_ids_T=torch.cat(ids),
        position_ids_3T=torch.cat(places, dim=1),
        tree=TreeLayout(segments),
        predictors=tuple(torch.cat(x) for x in predictors),
        targets_N=torch.tensor([t for s in samples for t in s.completion.token_ids]),
        sequence_ids_N=torch.arange(len(samples)).repeat_interleave(lengths),
        samples=samples,
        pixel_values=pixel_values,
        image_grid_thw=grids,
        image_index=image_index,
    )


class _Pictures:
    """Collects pictures in the order of the trees, and which of them stands where.

    Trees that stem from one group follow one another and hold the very same tensor of pixels: its
    pictures are then held once.
    """

    def __init__(self) -> None:
        self.pixels: list[Tensor] = []
        self.grids: list[Tensor] = []
        self.index: list[Tensor] = []
        self.n = 0

    def add(self, pixels: Tensor | None, grid: Tensor | None) -> None:
        if pixels is None or grid is None:
            return
        if not self.pixels or self.pixels[-1] is not pixels:
            self.n += len(grid)
            self.pixels.append(pixels)
            self.grids.append(grid)
        self.index.append(torch.arange(self.n - len(grid), self.n))

    def joined(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.pixels:
            return None, None, None
        return torch.cat(self.pixels), torch.cat(self.grids), torch.cat(self.index)
