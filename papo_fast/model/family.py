"""Widths of a model's parts as its family's configuration gives them, under the names used here.

The families name and count some of them differently; what is said about that is said here alone.
It needs no model and imports no library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """The language model: its layers' widths of residual, MLP, queries and keys, and heads."""

    layers: int
    hidden: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocab: int
    normed_queries: bool
    """Queries and keys are normed, head by head."""
    linear_layers: int = 0
    """Layers of the gated delta rule in the place of attention (Qwen3.5)."""
    linear: int = 0
    """Multiplications per token of one of them, its weights' and its state's."""

    @classmethod
    def of(cls, text: Any) -> Decoder:
        """From the `text_config` of a model of `encoder.FAMILIES`."""
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        # of a mixture of experts, those that a token goes through
        experts = getattr(text, "num_experts_per_tok", 0)
        inner = experts * text.moe_intermediate_size if experts else text.intermediate_size
        if experts:
            inner += getattr(text, "shared_expert_intermediate_size", 0)
        linear_layers = (getattr(text, "layer_types", None) or []).count("linear_attention")
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            inner=inner,
            queries=heads * head_size,
            keys=text.num_key_value_heads * head_size,
            heads=heads,
            vocab=text.vocab_size,
            normed_queries=text.model_type.startswith("qwen3_vl"),
            linear_layers=linear_layers,
            linear=_delta_rule(text) if linear_layers else 0,
        )

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the cache of keys and values."""
        return 2 * self.layers * self.keys

    @property
    def attention(self) -> int:
        """Weights of a layer's attention. That of hybrids is gated: a gate beside each query."""
        queries = (3 if self.linear_layers else 2) * self.queries
        return (queries + 2 * self.keys) * self.hidden


def _delta_rule(text: Any) -> int:
    d_k, d_v, heads = (
        text.linear_key_head_dim,
        text.linear_value_head_dim,
        text.linear_num_value_heads,
    )
    keys, values = text.linear_num_key_heads * d_k, heads * d_v
    # in: queries, keys, values, gate, two numbers a head; out: values
    weights = text.hidden_size * (2 * keys + 3 * values + 2 * heads)
    convolution = text.linear_conv_kernel_dim * (2 * keys + values)
    # a chunk of 64 tokens looks at itself, and three times at a head's matrix
    return weights + convolution + heads * (64 * (2 * d_k + d_v) + 3 * d_k * d_v)


@dataclass(frozen=True)
class Vision:
    """The vision tower: its blocks' widths, per patch before merging."""

    blocks: int
    hidden: int
    inner: int
    heads: int
    pixels: int
    """Numbers of one patch as it comes in."""
    merge: int
    """Patches that become one token."""
    mergers: int
    mlp_matrices: int
    rms_norm: bool
    inner_saved: int
    """How many tensors of width `inner` the MLP keeps for its backward."""

    @classmethod
    def of(cls, config: Any) -> Vision:
        """From the configuration of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model."""
        family, vision = config.model_type, config.vision_config
        # Qwen2-VL calls the tower's width embed_dim, and its hidden_size the language model's
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        return cls(
            blocks=vision.depth,
            hidden=width,
            inner=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
            heads=vision.num_heads,
            pixels=vision.patch_size**2 * vision.temporal_patch_size * vision.in_channels,
            merge=vision.spatial_merge_size**2,
            # one, and in Qwen3-VL one more for each layer that feeds the decoder (deepstack)
            mergers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
            # Qwen2.5-VL's tower has a gated MLP, of three matrices; the others' have two
            mlp_matrices=3 if family == "qwen2_5_vl" else 2,
            rms_norm=family == "qwen2_5_vl",
            # gate, its activation, up, product; fc1, (a sigmoid), its activation
            inner_saved={"qwen2_5_vl": 4, "qwen2_vl": 3}.get(family, 2),
        )
