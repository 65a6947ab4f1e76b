"""The plain path: any family of `AutoModelForImageTextToText`, one padded forward per stream.

Nothing is packed and nothing is shared: each response is a sequence of its own behind its prompt,
with its pictures, and the base model gets the processor's tensors as they come. Hidden states that
predict responses are gathered and go to `token_stats`, as on the fast path. Slower, and exact.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from papo_fast.config import ModelConfig
from papo_fast.data.plain_encoder import PlainPrompt
from papo_fast.errors import InputError
from papo_fast.model.flops import ModelShape
from papo_fast.model.loading import load_model
from papo_fast.model.policy import BANNED_LOGIT, Policy
from papo_fast.samples import Group, Sample, all_samples

_log = logging.getLogger(__name__)

BANNED_UNDER_CAP = -1e30
"""A soft cap would bound any smaller bias (see `token_stats`)."""


@dataclass(frozen=True)
class PaddedBatch:
    """R sequences of at most S tokens, padded on the right, in one or more streams.

    The last sequence may be one that nothing is asked of, see `PlainPolicy.stand_in`.
    `streams` are the base model's inputs; `predictors_N` the places in (R * S,) before each of the
    N response tokens `targets_N`, and `sequence_ids_N` whose they are of `samples`.
    """

    streams: tuple[dict[str, Tensor], ...]
    predictors_N: Tensor
    targets_N: Tensor
    sequence_ids_N: Tensor
    samples: list[Sample]

    @property
    def n_tokens(self) -> int:
        """Response tokens of one stream."""
        return self.targets_N.numel()

    def to(self, device: torch.device) -> PaddedBatch:
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        streams = tuple({n: v.to(device) for n, v in s.items()} for s in self.streams)
        return replace(self, **moved, streams=streams)


class PlainPolicy(Policy):
    """`Policy` of a model that transformers can build and whose head is a linear layer.

    Attributes:
        stand_in: a prompt with a picture, which joins batches that have none where several
            processes share the vision tower's weights: all of them have to run it. None: such a
            batch is refused.

    Raises:
        InputError: the model has no such head, or its logits are something else than what is
            computed here.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        self.stand_in: PlainPrompt | None = None
        self._cap, self._scale = cap_and_scale(model.config)
        self.banned_logit = BANNED_LOGIT if self._cap is None else BANNED_UNDER_CAP
        super().__init__(model, *args, **kwargs)

    @staticmethod
    def _model(config: ModelConfig, device: torch.device, *, empty: bool) -> nn.Module:
        if config.liger == "on":
            raise InputError("model.liger is on, which needs the fast path: pass auto or off")
        model = load_model(config, empty=empty, plain=True)
        if not empty:
            check_head(model)
        _say(model.config.model_type)
        return model

    @staticmethod
    def _vision(model: nn.Module) -> nn.Module:
        decoder = model.get_decoder()
        parts = [m for m in model.model.children() if m is not decoder]
        return nn.ModuleList(parts)

    @staticmethod
    def _units(model: nn.Module) -> list[nn.Module]:
        return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    @cached_property
    def shape(self) -> ModelShape:
        """By its weights' numbers, each counted as used by every token."""
        config, decoder = self.model.config.get_text_config(), self.model.get_decoder()
        size = sum(p.numel() for p in decoder.parameters())
        rest = sum(p.numel() for p in self.model.model.parameters()) - size
        width = config.hidden_size
        return ModelShape(
            block_weights=size - config.vocab_size * width,
            attention_width=config.num_hidden_layers * width,
            head_weights=config.vocab_size * width,
            patch_weights=rest,
            merge=1,
            shares_prompt=False,
        )

    @cached_property
    def _inputs(self) -> set[str]:
        """What the model takes by name: processors write some things for themselves alone."""
        return set(inspect.signature(type(self.model).forward).parameters)

    def pack(
        self, groups: Sequence[Group], *, full: bool = True, aug: bool = False, second: bool = False
    ) -> PaddedBatch:
        """The groups' sequences, one after the other, in the streams that are asked for."""
        samples, streams = all_samples(groups), []
        others = self._stand_ins(groups)
        names = ("full",) * full + ("aug",) * aug + ("second",) * second
        responses = [s.completion.token_ids for s in samples]
        for stream in names:
            prompts = []
            for group in groups:
                prompt = group.prompt.encoded
                if stream != "full":
                    prompt = replace(prompt, pixel_values=group.pixels(stream))
                prompts += [prompt] * len(group.samples)
            streams.append(self.padded([*prompts, *others], responses + [[]] * len(others)))
        prompts = [group.prompt.encoded for group in groups for _ in group.samples]
        width = streams[0]["input_ids"].shape[1]
        lengths = torch.tensor([len(r) for r in responses])
        return PaddedBatch(
            streams=tuple(streams),
            predictors_N=torch.cat(
                [
                    torch.arange(len(p) - 1, len(p) - 1 + len(r)) + i * width
                    for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
                ]
            ),
            targets_N=torch.tensor([t for r in responses for t in r]),
            sequence_ids_N=torch.arange(len(samples)).repeat_interleave(lengths),
            samples=samples,
        ).to(self.device)

    def _stand_ins(self, groups: Sequence[Group]) -> list[PlainPrompt]:
        """What joins the groups so that the vision tower runs.

        No response follows it, so that the tower gets a gradient, and one of zero.
        """
        if not self.always_run_vision or any(g.prompt.encoded.has_pictures for g in groups):
            return []
        if self.stand_in is None:
            raise ValueError("a batch has no picture, and the policy no stand_in to run instead")
        return [self.stand_in]

    def padded(
        self,
        prompts: Sequence[PlainPrompt],
        responses: Sequence[Sequence[int]] = (),
        pad_token_id: int = 0,
    ) -> dict[str, Tensor]:
        """The model's inputs for these sequences; without responses padded on the left."""
        rows, masks, tokens = [], [], {n: [] for p in prompts for n in p.tokens}
        ends = [torch.as_tensor(r, dtype=torch.int64) for r in responses]
        ends = ends or [torch.zeros(0, dtype=torch.int64)] * len(prompts)
        width = max(len(p) + len(r) for p, r in zip(prompts, ends, strict=True))
        for prompt, end in zip(prompts, ends, strict=True):
            empty = width - len(prompt) - len(end)
            pad = (0, empty) if responses else (empty, 0)
            ids = torch.cat([prompt.input_ids, end])
            rows.append(F.pad(ids, pad, value=pad_token_id))
            masks.append(F.pad(torch.ones_like(ids), pad))
            nothing = torch.zeros(1, len(prompt), dtype=torch.int64)
            for name, of_name in tokens.items():
                row = prompt.tokens.get(name, nothing)[0]
                of_name.append(F.pad(F.pad(row, (0, len(end))), pad))
        inputs = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
        inputs |= {name: torch.stack(of_name) for name, of_name in tokens.items()}
        seen = [
            {"pixel_values": p.pixel_values, **p.pictures}
            for p in prompts
            if p.pixel_values is not None
        ]
        for name in seen[0] if seen else ():
            inputs[name] = joined([pictures[name] for pictures in seen])
        return {n: v for n, v in inputs.items() if n in self._inputs}

    def head_options(self, temperature: float) -> dict[str, Any]:
        """With the family's soft cap and the bias of its head."""
        bias = self.banned_V
        if self.model.lm_head.bias is not None:
            bias = bias + self._scale * self.model.lm_head.bias
        return {"bias": bias, "temperature": temperature, "softcap": self._cap}

    def _hidden(self, batch: PaddedBatch) -> list[Tensor]:
        found = []
        with self.autocast():
            for inputs in batch.streams:
                hidden_RSD = self.model.model(**inputs, use_cache=False).last_hidden_state
                rows_ND = hidden_RSD.flatten(0, 1)[batch.predictors_N].to(self.dtype)
                found.append(rows_ND if self._scale == 1 else rows_ND * self._scale)
        return found


@functools.cache
def _say(family: str) -> None:
    """Once: a run may load a reference and a sampler too."""
    _log.info("%s goes the plain path: one padded sequence per response", family)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of several prompts as one: end to end, and padded with 0 where they differ."""
    sizes = [max(s) for s in zip(*(p.shape[1:] for p in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [n - m for n, m in zip(sizes, part.shape[1:], strict=True)]
        padded.append(F.pad(part, [x for n in reversed(missing) for x in (0, n)]))
    return torch.cat(padded)


def cap_and_scale(config: Any) -> tuple[float | None, float]:
    """The soft cap of the logits, and what hidden states are multiplied with in front of it."""
    text = config.get_text_config()

    def setting(name: str, default: float | None) -> float | None:
        of_text = getattr(text, name, None)
        value = getattr(config, name, None) if of_text is None else of_text
        return default if value is None else float(value)

    scale = setting("logit_scale", 1.0) / setting("logits_scaling", 1.0)
    return setting("final_logit_softcapping", None), scale


def check_head(model: nn.Module) -> None:
    """Raise `InputError` where the family's logits are not what the plain path computes.

    The model runs on four tokens; in front of its head their states are replaced by random ones,
    large enough that a cap or a scale shows.
    """
    family = model.config.model_type
    head, base = model.get_output_embeddings(), getattr(model, "model", None)
    if not isinstance(head, nn.Linear) or head is not getattr(model, "lm_head", None) or not base:
        raise InputError(
            f"model.path is a {family!r} model, which the plain path does not take: expected a "
            "base model in .model and a linear .lm_head over it"
        )
    cap, scale = cap_and_scale(model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = torch.randn(1, 4, head.in_features)
    with torch.no_grad():
        logits = head(hidden) * scale
        hidden *= 50 / logits.abs().max().clamp(min=1e-6)
        ours = head(hidden) * scale
        ours = ours if cap is None else cap * (ours / cap).tanh()

        def swapped(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            output.last_hidden_state = hidden
            return output

        held, was_training = base.register_forward_hook(swapped), model.training
        model.eval()
        try:
            theirs = model(input_ids=torch.zeros(1, 4, dtype=torch.int64), use_cache=False).logits
        finally:
            held.remove()
            model.train(was_training)
    worst = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    if not worst < 1e-3:
        raise InputError(
            f"model.path is a {family!r} model, which the plain path does not take: its logits "
            f"differ from its head's, capped at {cap} and scaled by {scale}, by {worst:.2g}"
        )
