"""`tiles.Tile` by the C++ of `cpu_kernels`: rows of the weight are read in place."""

import torch

from papo_kernels import cpu_kernels
from papo_kernels.row_math import slope
from papo_kernels.tiles import WORTH_DROPPING, Sums


class CppTile:
    """See `tiles.Tile`. Operands are float32 or bfloat16 on the CPU, arithmetic is float32.

    Matrices of a tile stand transposed, (columns, rows of both streams), and the rows of each
    stream are filled up to whole vectors.
    """

    # Tiles have most of their columns in common: together they read each of them once.
    together, most_waiting = 32, 1 << 22
    rounds_weight = True

    def __init__(self, states, weight, bias, head, full, aug, states_too):
        self.present = [x is not None for x in states]
        states = [x for x in states if x is not None]
        self.streams, self.count = len(states), len(states[0])
        self.padded = cpu_kernels.whole_vectors(self.count)
        rows = states[0].new_zeros(self.streams, self.padded, states[0].shape[1])
        for i, x in enumerate(states):
            rows[i, : self.count] = x
        self.rows = rows.flatten(0, 1)
        self.weight, self.bias, self.head = weight, bias, head
        self.states_too = states_too
        self.cols = self.z = self.g = None

    @staticmethod
    def logits(tiles, cols):
        rows = [t.rows for t in tiles]
        return cpu_kernels.picked_logits(list(zip(rows, cols, strict=True)), tiles[0].weight)

    def differentiate(self, cols, z, place, valid, s, g):
        self.cols, self.z = cols, z
        self.head.finish(z.T, None if self.bias is None else self.bias[cols])
        nothing = torch.zeros_like(s.peak)
        fields = []
        streams = (
            (s.peak, s.log_sum, s.entropy, g.logprobs, g.entropy),
            (s.aug_peak, s.aug_log_sum, s.aug_entropy, g.aug_logprobs, g.aug_entropy),
        )
        for stream, present in zip(streams, self.present, strict=True):
            if present:
                label = nothing if stream[3] is None else stream[3]
                fields += [*stream, torch.where(valid[:, None], label, torch.nan)]
        if self.streams == 2:
            fields += [s.kl, g.kl_prcp]
        rows = z.new_zeros(len(fields), self.padded)
        given = [nothing if x is None else x for x in fields]
        rows[:, : self.count] = torch.cat(given, 1).T
        labels = torch.full((self.padded,), -1, dtype=torch.int32)
        labels[: self.count] = place
        self.g, sums = cpu_kernels.column_gradients(z, self.streams, rows, labels)
        sums = list(sums[:, : self.count, None])
        if self.present[0]:
            return Sums(*sums)
        return Sums(None, None, None, *sums)

    def drop_least(self, allowances):
        order = [i for i, present in enumerate(self.present) if present]
        net = allowances[2] is not None
        given = [allowances[i] for i in order] + ([allowances[2]] if net else [])
        # A stream that is not asked for limits nothing.
        room = self.z.new_full((len(given), self.padded), torch.inf)
        for to, allowance in zip(room, given, strict=True):
            if allowance is not None:
                to[: self.count] = allowance.squeeze(1)
        keep, dropped = cpu_kernels.drop_least(self.g, self.streams, net, room)
        if len(self.cols) - len(keep) <= WORTH_DROPPING * len(self.cols):
            return [0, 0, 0]
        self.cols, self.g = self.cols[keep], self.g[keep]
        if self.head.softcap is not None:
            self.z = self.z[keep]
        found = dict(zip([*order, 2], dropped[:, : self.count, None], strict=False))
        return [found.get(i, 0) for i in range(3)]

    def finish(self):
        if self.head.softcap is not None or self.head.temperature != 1:
            self.g *= slope(self.z, self.head.temperature, self.head.softcap)
        self.z = None

    @staticmethod
    def add_gradients(tiles, d_weight, d_bias, dtype):
        weight = tiles[0].weight
        cols = torch.cat([t.cols for t in tiles]).unique()
        given = []
        for t in tiles:
            d_x = None
            if t.states_too:  # over the states themselves, which are not needed again
                d_x = t.rows if t.rows.dtype == dtype else torch.empty_like(t.rows, dtype=dtype)
            given.append((t.g, torch.searchsorted(cols, t.cols).int(), t.rows, d_x))
        cpu_kernels.add_picked_gradients(given, weight, cols, d_weight)
        found = []
        for t, (g, _, _, d_x) in zip(tiles, given, strict=True):
            if d_bias is not None:
                d_bias.index_add_(0, t.cols, g.sum(1))
            parts = (None, None) if d_x is None else d_x.split(t.padded)
            parts = iter([x if x is None else x[: t.count] for x in parts])
            found.append([next(parts) if present else None for present in t.present])
        return found
