"""PAPO inside EasyR1: two lines at the end of its `verl/workers/actor/dp_actor.py`.

    from papo_fast.integrations.easyr1 import papo_actor
    DataParallelPPOActor = papo_actor(DataParallelPPOActor, kl_prcp_coef=0.02)

The actor then lets `token_stats` compute log-probs, corrupts the pictures itself, and adds PAPO's
terms to the loss that EasyR1 computes: policy loss, reference KL, averages and optimizer stay
EasyR1's. docs/trainers.md says what ran.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor
from transformers.utils import ModelOutput

from papo_fast.data.corruption import corruption_of
from papo_fast.errors import InputError
from papo_fast.integrations.added_terms import PAPOSettings
from papo_fast.integrations.streams import IGNORED, AugStream, two_streams

_CALL = "_papo_call"
"""Attribute of the model in which the actor leaves what its next forward shall score."""


@dataclass
class _Call:
    labels: Tensor
    """(B, S) or, packed, (1, N) int64: the successor of each position that is scored, or -100."""
    temperature: float
    aug_gradient: bool
    names: tuple[str, ...]
    """The statistics behind the log-probs that the actor needs."""


def papo_actor(actor: type, **settings: Any) -> type:
    """A subclass of EasyR1's `DataParallelPPOActor` with `token_stats` and PAPO's terms in it.

    Without settings its loss is EasyR1's own. The terms are added to what EasyR1's
    `compute_policy_loss` returns, so `actor/pg_loss` holds them too; `actor/kl_prcp`,
    `actor/entropy` and `actor/aug_entropy` are logged beside it.

    Args:
        actor: EasyR1's class.
        settings: those of `PAPOSettings`.

    Raises:
        InputError: a setting is unknown or cannot be used; when the actor is made, the model or its
            output embedding cannot be used as it is; at an update, a micro-batch has no picture.
    """
    papo = PAPOSettings.of(settings, "papo_actor")
    return type("PAPOActor", (_PAPOActor, actor), {"papo": papo, "__module__": actor.__module__})


class _PAPOActor:
    """Stands before EasyR1's actor; what is not defined here is that actor's."""

    papo: PAPOSettings
    config: Any
    _easyr1: Any
    """The module of EasyR1's actor."""
    _corrupt: Any
    """None where no term needs a corrupted picture."""

    def __init__(self, config: Any, actor_module: nn.Module, actor_optimizer: Any = None):
        super().__init__(config, actor_module, actor_optimizer)  # type: ignore[call-arg]
        self._easyr1 = sys.modules[type(self).__module__]
        self._model = _inner(actor_module)
        if not hasattr(self._model, _CALL):  # with LoRA the reference has the same model
            setattr(self._model, _CALL, None)
            self._model.forward = types.MethodType(
                functools.partial(_forward, forward=self._model.forward), self._model
            )
        # EasyR1 gives this function what the model returned, and takes log-probs from it
        self.log_probs_from_logits = self._log_probs
        self._corrupt = None
        if self.papo.needs_aug and actor_optimizer is not None:
            config = self._model.config
            self._corrupt = corruption_of(
                AutoImageProcessor.from_pretrained(config._name_or_path),
                config,
                self.papo.corruption_ratio,
            )
        self._updates = 0

    def update_policy(self, data: Any) -> dict[str, Any]:
        with self._terms_added():
            metrics = super().update_policy(data)  # type: ignore[misc]
        self._updates += 1
        return metrics

    def _forward_micro_batch(self, micro_batch: Mapping[str, Any], temperature: float) -> Tensor:
        response = micro_batch["responses"].shape[-1]
        here = micro_batch["attention_mask"].bool()
        updating = torch.is_grad_enabled()
        names = tuple(self.papo.signed) if updating else ()
        if updating and self._corrupt is not None:
            micro_batch = {**micro_batch, "multi_modal_inputs": self._pictures(micro_batch)}
        successors = micro_batch["input_ids"].masked_fill(~here, IGNORED)
        successors[:, :-response] = IGNORED
        labels = successors.roll(-1, 1)
        if self.config.padding_free:
            labels = labels[here][None]
            if self.config.ulysses_size > 1:
                labels, _, pad = self._easyr1.ulysses_pad_and_slice_inputs(
                    labels, None, self.config.ulysses_size
                )
        setattr(self._model, _CALL, _Call(labels, temperature, self.papo.aug == "trained", names))
        log_probs = super()._forward_micro_batch(micro_batch, temperature)  # type: ignore[misc]
        others = self._others
        if self.config.padding_free and names:
            # the actor does this with the log-probs
            if self.config.ulysses_size > 1:
                others = self._easyr1.gather_outputs_and_unpad(
                    others, gather_dim=0, unpad_dim=0, padding_size=pad
                )
            rows = others.new_zeros(*here.shape, len(names))
            rows[here] = others
            others = rows[:, -response - 1 : -1]
        self._statistics = dict(zip(names, others.unbind(-1), strict=True))
        return log_probs

    def _log_probs(self, logits: Tensor, labels: Tensor) -> Tensor:
        self._others = logits[..., 1:]
        return logits[..., 0]

    def _pictures(self, micro_batch: Mapping[str, Any]) -> np.ndarray:
        """Each row's `multi_modal_inputs`, `aug_pixel_values` among them.

        EasyR1 hands whatever stands there to the model. A dataset may bring its own.
        """
        given = micro_batch["multi_modal_inputs"]
        found = np.empty(len(given), dtype=object)
        if any("aug_pixel_values" in its for its in given):
            found[:] = list(given)
            return found
        prompts = len(micro_batch["input_ids"][0]) - micro_batch["responses"].shape[-1]
        rows = zip(micro_batch["input_ids"], micro_batch["attention_mask"], strict=True)
        ids = (row[:prompts][mask[:prompts].bool()] for row, mask in rows)
        black = self.papo.corrupted(self._corrupt, ids, given, self._updates)
        for i, (its, pixels) in enumerate(zip(given, black, strict=True)):
            found[i] = its if pixels is None else {**its, "aug_pixel_values": pixels}
        return found

    @contextmanager
    def _terms_added(self) -> Iterator[None]:
        """While this lasts, EasyR1's `compute_policy_loss` returns PAPO's terms too."""
        own = self._easyr1.compute_policy_loss

        def compute_policy_loss(**given: Any) -> tuple[Tensor, dict[str, float]]:
            loss, metrics = own(**given)
            for name, coef in self.papo.signed.items():
                term = self._easyr1.average_loss(
                    self._statistics[name], given["response_mask"], mode=given["loss_avg_mode"]
                )
                loss = loss + coef * term
                metrics[name] = term.detach().item()
            return loss, metrics

        self._easyr1.compute_policy_loss = compute_policy_loss
        try:
            yield
        finally:
            self._easyr1.compute_policy_loss = own


def _inner(module: Any) -> Any:
    """The HuggingFace model below FSDP's or DDP's wrapper and peft's."""
    module = getattr(module, "module", module)
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _forward(model: Any, *args: Any, forward: Any, **inputs: Any) -> Any:
    """The model's own forward, or, where the actor has asked for it, statistics as `logits`."""
    call: _Call | None = getattr(model, _CALL)
    if call is None:
        return forward(*args, **inputs)
    setattr(model, _CALL, None)
    if args:
        raise InputError("the actor calls its model with positional arguments: expected keywords")
    inputs.pop("use_cache", None)
    pixels = inputs.pop("aug_pixel_values", None)
    aug = None
    if pixels is not None and call.names:
        aug = AugStream(pixels, call.aug_gradient)
    stats, _ = two_streams(model, inputs, call.labels, aug=aug, temperature=call.temperature)
    found = torch.stack([stats.logprobs, *(getattr(stats, name) for name in call.names)], -1)
    # As a tensor of the output: FSDP gathers weights for the backward where it finds such. The
    # actor divides logits by the temperature.
    return ModelOutput(logits=found * call.temperature)
