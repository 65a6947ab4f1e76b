"""What the hooks into verl and EasyR1 share: settings of PAPO's terms, and the corrupted pictures.

Both projects' packages are called `verl`, and neither is imported here.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from papo_fast.data.corruption import prompt_seed
from papo_fast.errors import InputError


@dataclass(frozen=True)
class PAPOSettings:
    """What the trainer has no setting for. Without any of the coefficients this is its own loss."""

    kl_prcp_coef: float = 0.0
    """γ, weight of the exact perception KL, which is maximised."""
    entropy_loss_coef: float = 0.0
    """η₁, weight of the entropy, which is minimised; verl's `entropy_coeff` rewards entropy."""
    aug_entropy_loss_coef: float = 0.0
    """η₂, weight of the entropy given the corrupted picture, which is minimised."""
    aug: Literal["frozen", "trained"] = "frozen"
    """The corrupted stream is a constant in every gradient, or gradients flow into it too."""
    corruption_ratio: float = 0.6
    """Share of an image's patches that turns black."""
    corruption_seed: int = 0
    """With the trainer's step and the prompt it says which patches these are."""

    @classmethod
    def of(cls, found: Mapping[str, Any], place: str) -> PAPOSettings:
        """From the settings at `place`; raises `InputError`, naming what cannot be used."""
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(found.keys() - set(known)):
            raise InputError(f"{place}.{unknown[0]} is unknown: expected one of {', '.join(known)}")
        settings = cls(**found)
        if settings.aug not in ("frozen", "trained"):
            raise InputError(f"{place}.aug is {settings.aug!r}: expected frozen or trained")
        return settings

    @property
    def signed(self) -> dict[str, float]:
        """Each statistic's coefficient in a loss that is minimised, where it is not 0."""
        every = {
            "kl_prcp": -self.kl_prcp_coef,
            "entropy": self.entropy_loss_coef,
            "aug_entropy": self.aug_entropy_loss_coef,
        }
        return {name: coef for name, coef in every.items() if coef != 0}

    @property
    def needs_aug(self) -> bool:
        return bool(self.signed.keys() - {"entropy"})

    def corrupted(
        self,
        corrupt: Callable[..., Tensor],
        prompts: Iterable[Tensor],
        pictures: Iterable[Mapping[str, Any] | None],
        step: int,
    ) -> list[Tensor | None]:
        """Each row's `pixel_values` with black patches, the same for all rows of a prompt.

        Args:
            corrupt: a `PatchCorruption` or `TileCorruption`.
            prompts: (P,) token ids of each row.
            pictures: each row's `pixel_values` and `image_grid_thw`, if it has pictures.
            step: other patches in another step.

        Raises:
            InputError: no row has a picture.
        """
        found: list[Tensor | None] = []
        for prompt, its in zip(prompts, pictures, strict=True):
            if its is None or its.get("pixel_values") is None:
                found.append(None)
                continue
            index = zlib.crc32(prompt.cpu().numpy().tobytes())
            seed = prompt_seed(self.corruption_seed, step, index)
            found.append(corrupt(its["pixel_values"], its.get("image_grid_thw"), seed))
        if all(x is None for x in found):
            raise InputError(
                "a micro-batch has no picture: its ranks would run one stream and others two, and "
                "wait for each other; leave prompts without pictures out of the data"
            )
        return found
