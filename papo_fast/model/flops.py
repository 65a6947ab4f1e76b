"""Floating-point operations of a model's parts, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a forward pass depends on; a multiply and an add count as two.

    `block_weights` are the weights of all decoder layers that a token is multiplied with,
    `attention_width` heads x head size summed over the layers, `head_weights` those of the output
    embedding; `patch_weights` are the vision tower's, per patch before merging.
    """

    block_weights: int
    attention_width: int
    head_weights: int
    patch_weights: int
    merge: int

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """From the HuggingFace configuration of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model."""
        text, vision = config.text_config, config.vision_config
        hidden, heads = text.hidden_size, text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or hidden // heads
        attention = head_size * (2 * heads + 2 * text.num_key_value_heads) * hidden
        mlp = 3 * hidden * text.intermediate_size
        # Qwen2-VL calls the tower's width embed_dim, and its hidden_size the language model's
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        merge = vision.spatial_merge_size
        inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
        # Qwen2.5-VL's tower has a gated MLP, of three matrices; the others' have two
        mlp_matrices = 3 if config.model_type == "qwen2_5_vl" else 2
        merged = width * merge**2
        # one merger, and in Qwen3-VL one more for each layer that feeds the decoder (deepstack)
        mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
        merger = mergers * (merged * merged + merged * hidden) / merge**2  # per patch
        pixels = vision.patch_size**2 * vision.temporal_patch_size * vision.in_channels
        blocks = vision.depth * (4 * width**2 + mlp_matrices * width * inner)
        return cls(
            block_weights=text.num_hidden_layers * (attention + mlp),
            attention_width=text.num_hidden_layers * heads * head_size,
            head_weights=hidden * text.vocab_size,
            patch_weights=int(pixels * width + blocks + merger),
            merge=merge**2,
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
