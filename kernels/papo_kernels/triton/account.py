"""Host side of the certificate: what the rows of a call may drop, for all of them at once."""

from typing import NamedTuple

import torch
import triton

from papo_kernels.triton import account_kernels as kernels
from papo_kernels.triton import size_kernels
from papo_kernels.triton.launch import LAUNCHES


class Shares(NamedTuple):
    """What rows drop; three rows of a tensor are of both streams and of their sum."""

    bounds: torch.Tensor  # (3, N) float64, on sum |dz| outside the candidates
    whole: torch.Tensor  # (3, N) float64, what these are shares of
    spare: torch.Tensor  # (3, N) float32, what rows may drop of their candidates, or infinite
    largest: torch.Tensor  # (N,) float64, the largest share of a row; infinite where one is NaN


class Account:
    """What the rows of a call may drop, by row of the call; it learns from the sums of rows."""

    def __init__(self, run, tile, count, budget):
        """run: a `words.Backward`. tile: (N,) int32, each row's; count: (1,) int64, rows that
        count; budget: the share that a row may drop."""
        call, o, w, g = run.call, run.operands, run.wanted, run.upstream
        self._run, self._tile, self._count, self._budget = run, tile, count, budget
        self._asked = dict(FULL=w.full, AUG=w.aug, NET=w.net)
        self._flags = self._asked | dict(
            TWO=call.streams == 2,
            LOGPROB=g.full.logprobs is not None,
            ENTROPY=g.full.entropy is not None,
            LOGPROB_AUG=g.aug.logprobs is not None,
            ENTROPY_AUG=g.aug.entropy is not None,
            KL=w.kl,
            KL_REVERSE=w.kl_reverse,
        )
        self._sharpness = 1 / call.head.temperature
        device = tile.device
        self._least = torch.empty(3, o.n, dtype=torch.float64, device=device)
        size_kernels.least_kernel[self._grid("least")](
            run.saved.rows, run.up, self._least, o.n, self._sharpness, call.head.softcap or 1.0,
            CAP=call.head.softcap is not None, **self._flags, **LAUNCHES["least"],
        )  # fmt: skip
        # Nobody reads them where the weight wants no gradient.
        self._norms = torch.zeros(2, o.n if w.weight else 0, dtype=torch.float64, device=device)
        if w.weight:
            aug = o.full if o.aug is None else o.aug
            size_kernels.norms_kernel[(o.n, call.streams)](
                o.full, aug, self._norms, o.d, *o.full.stride(), *aug.stride(), **LAUNCHES["norms"]
            )
        # The gradients of states and bias see dz itself.
        self._plain = dict(
            PLAIN=w.bias or w.hidden, PLAIN_AUG=w.bias or w.aug_hidden, PLAIN_NET=w.bias
        )

    def _grid(self, name):
        return (triton.cdiv(self._run.operands.n, LAUNCHES[name]["BLOCK"]),)

    def shares(self, sums, beyond):
        """Shares of what rows drop if these are all their candidates.

        sums: (len(SUMS), N) over candidates. beyond: `certificate.Beyond` of (T,) float64.
        """
        run, n, device = self._run, self._run.operands.n, sums.device
        (programs,) = self._grid("outside")
        doubles = dict(dtype=torch.float64, device=device)
        squares = torch.empty(programs, kernels.SQUARES.value, **doubles)
        # Of what is not certified, bounds are 0.
        bounds, whole = torch.zeros(2, 3, n, **doubles)
        spare = torch.empty(3, n, dtype=torch.float32, device=device)
        largest = torch.empty(n, **doubles)
        kernels.outside_kernel[(programs,)](
            sums, run.saved.rows, run.up, self._tile, *beyond, self._norms, self._least, squares,
            bounds, n, self._sharpness, WEIGHT=run.wanted.weight, **self._flags,
            **LAUNCHES["outside"],
        )  # fmt: skip
        kernels.whole_kernel[self._grid("whole")](
            sums, self._norms, squares, self._count, bounds, whole, spare, largest, n, programs,
            self._budget, OF_TOKEN=run.call.options.budget_of == "token",
            WEIGHT=run.wanted.weight, **self._plain, **self._asked, **LAUNCHES["whole"],
        )  # fmt: skip
        return Shares(bounds, whole, spare, largest)
