"""Widths and parameter counts of a model's parts, from an empty model built of its config.json."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

from papo_fast.config import ModelConfig
from papo_fast.data.model_folder import (
    HUB_NAME,
    check_config,
    load,
    may_be_hub_name,
    optional_file,
)
from papo_fast.errors import InputError
from papo_fast.model.family import Decoder, Vision
from papo_fast.model.flops import ModelShape
from papo_fast.model.loading import load_model

PLANNED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose memory has been modelled; others train without a plan."""


@dataclass(frozen=True)
class Part:
    """Modules of one kind: `count` of them with `parameters` each.

    `largest` is the largest matrix; `linear` holds the names of the linear layers in one of them
    and their inputs and outputs together, which LoRA of rank r has r parameters for each of;
    `in_linear` are the weights of these layers without their biases.
    """

    count: int
    parameters: int
    largest: int
    linear: tuple[tuple[str, int], ...] = ()
    in_linear: int = 0

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters that adapters add to one of them; no targets: all linear layers."""
        return sum(rank * width for name, width in self.linear if not targets or name in targets)

    @property
    def total(self) -> int:
        return self.count * self.parameters


@dataclass(frozen=True)
class ModelSizes:
    family: str
    vocab: int
    tied: bool
    layers: Part
    blocks: Part
    embedding: Part
    head: Part
    """Nothing where it is the embedding (`tied`)."""
    norm: Part
    vision_rest: Part
    """Patch embedding and mergers."""
    decoder: Decoder
    vision: Vision
    flops: ModelShape

    @property
    def parameters(self) -> int:
        return sum(part.total for part in self.text_parts + self.vision_parts)

    @property
    def text_parts(self) -> tuple[Part, ...]:
        return self.layers, self.embedding, self.head, self.norm

    @property
    def vision_parts(self) -> tuple[Part, ...]:
        return self.blocks, self.vision_rest

    @property
    def root(self) -> int:
        """Parameters outside decoder layers and vision blocks, which FSDP gathers as one unit."""
        return self.parameters - self.layers.total - self.blocks.total

    @classmethod
    def of(cls, config: ModelConfig) -> ModelSizes:
        """Sizes of `config.path`, a checkpoint's folder or its config.json.

        Raises:
            InputError: there is no such file, or it is not of a family that can be trained.
        """
        settings = _settings(config)
        model = load_model(config, empty=True)
        decoder, tower = model.model.language_model, model.model.visual
        tied = model.lm_head.weight is decoder.embed_tokens.weight
        text = Decoder.of(settings.text_config)
        return cls(
            family=settings.model_type,
            vocab=text.vocab,
            tied=tied,
            layers=_part(decoder.layers),
            blocks=_part(tower.blocks),
            embedding=_part([decoder.embed_tokens]),
            head=Part(0, 0, 0) if tied else _part([model.lm_head]),
            norm=_part([decoder.norm]),
            vision_rest=_rest(tower),
            decoder=text,
            vision=Vision.of(settings),
            flops=ModelShape.of(settings),
        )


def _settings(config: ModelConfig) -> Any:
    if not config.path:
        raise InputError("model.path is empty: pass --model.path, a checkpoint or its config.json")
    path = Path(config.path).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not path.exists() and may_be_hub_name(config.path):
        file = Path(optional_file(config.path, "config.json") or file)
    if not file.is_file():
        raise InputError(
            f"model.path = {config.path!r}: there is no file {file}; expected a local checkpoint "
            f"folder or its config.json, or {HUB_NAME}"
        )
    check_config(file, PLANNED)
    return load(AutoConfig, str(file), trust_remote_code=config.trust_remote_code)


def _part(modules: Iterable[nn.Module]) -> Part:
    modules = list(modules)
    first = modules[0]
    weights = list(first.parameters())
    linear = [(n, m) for n, m in first.named_modules() if isinstance(m, nn.Linear)]
    return Part(
        count=len(modules),
        parameters=sum(p.numel() for p in weights),
        largest=max(p.numel() for p in weights),
        linear=tuple((n.rpartition(".")[2], m.in_features + m.out_features) for n, m in linear),
        in_linear=sum(m.weight.numel() for _, m in linear),
    )


def _rest(tower: nn.Module) -> Part:
    """All of the vision tower but its blocks."""
    inside = {id(p) for p in tower.blocks.parameters()}
    rest = [p.numel() for p in tower.parameters() if id(p) not in inside]
    return Part(1, sum(rest), max(rest))
