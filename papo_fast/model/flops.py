"""Floating-point operations of a model's parts, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from papo_fast.model.family import Decoder, Vision


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a forward pass depends on; a multiply and an add count as two.

    `block_weights` are the weights of all decoder layers that a token is multiplied with, and with
    linear attention its state too; `attention_width` heads x head size summed over the layers that
    attend, `head_weights` those of the output embedding; `patch_weights` are the vision tower's,
    per patch before merging.
    """

    block_weights: int
    attention_width: int
    head_weights: int
    patch_weights: int
    merge: int
    shares_prompt: bool = True
    """A group's prompt runs once for all of its samples, not once for each."""

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """From the HuggingFace configuration of a model of `encoder.FAMILIES`."""
        text, vision = Decoder.of(config.text_config), Vision.of(config)
        attending = text.layers - text.linear_layers
        mlp = 3 * text.hidden * text.inner
        merged = vision.hidden * vision.merge
        merger = vision.mergers * (merged * merged + merged * text.hidden) / vision.merge
        block = 4 * vision.hidden**2 + vision.mlp_matrices * vision.hidden * vision.inner
        return cls(
            block_weights=(
                text.layers * mlp + attending * text.attention + text.linear_layers * text.linear
            ),
            attention_width=attending * text.queries,
            head_weights=text.hidden * text.vocab,
            patch_weights=int(vision.pixels * vision.hidden + vision.blocks * block + merger),
            merge=vision.merge,
        )

    def language(self, tokens: int, pairs: int) -> int:
        """FLOPs of the decoder layers' forward pass; `pairs` are (query, key) pairs attended."""
        return 2 * self.block_weights * tokens + 4 * self.attention_width * pairs

    def head(self, rows: int) -> int:
        """FLOPs of the output embedding over `rows` hidden states."""
        return 2 * self.head_weights * rows

    def vision(self, image_tokens: int) -> int:
        """FLOPs of the vision tower's forward pass without its attention's pairs."""
        return 2 * self.patch_weights * self.merge * image_tokens
