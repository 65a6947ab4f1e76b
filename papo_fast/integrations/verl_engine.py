"""PAPO inside verl, without a change to verl: `model.external_lib` names this module.

verl imports the module that `actor_rollout_ref.model.external_lib` names before it makes its
engine. This one registers `PAPOEngine` for verl's FSDP backends. The engine lets `token_stats`
compute log-probs and entropies, corrupts the pictures itself, and adds PAPO's terms to the loss
that verl computes: clipping, reference KL, importance weights, averages and optimizer stay verl's.
The settings are `PAPOSettings`, under `model.fused_kernel_options.papo`. Written for verl 0.9.1;
docs/trainers.md says what ran.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from papo_fast.data.corruption import PatchCorruption, TileCorruption, corruption_of
from papo_fast.errors import InputError
from papo_fast.integrations.added_terms import PAPOSettings
from papo_fast.integrations.verl import forward_with_token_stats

try:
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
    from verl.workers.utils.losses import ppo_loss
    from verl.workers.utils.padding import no_padding_2_padding
except ImportError as error:
    raise ImportError(
        "papo_fast.integrations.verl_engine is imported by verl and needs it, and its engine for "
        f"FSDP cannot be imported here ({error}): install verl 0.9.1"
    ) from error


def papo_ppo_loss(
    config: Any,
    model_output: Mapping[str, Tensor],
    data: Any,
    dp_group: Any = None,
    *,
    settings: PAPOSettings,
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `ppo_loss` − γ KL_prcp + η₁ H + η₂ H_aug, and its metrics with ours.

    Every term is averaged by verl's `agg_loss` as `actor.loss_agg_mode` says. The engine puts this
    in the place of `ppo_loss` by itself; give it to `set_loss_fn` to have other settings.

    Args:
        config: verl's `ActorConfig`.
        model_output: jagged (B, S) float32 of `log_probs`, and of `kl_prcp`, `entropy` and
            `aug_entropy` where they have a coefficient.
        data: the micro-batch.

    Raises:
        InputError: verl rewards the entropy that these settings lower, or a statistic is missing.
    """
    if config.entropy_coeff != 0 and settings.entropy_loss_coef != 0:
        raise InputError(
            f"actor.entropy_coeff = {config.entropy_coeff} rewards the entropy that "
            f"entropy_loss_coef = {settings.entropy_loss_coef} lowers: set one of them"
        )
    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    mask = data.select("response_mask").to_padded_tensor()["response_mask"].to(bool)
    for name, coef in settings.signed.items():
        if name not in model_output:
            raise InputError(
                f"model_output has no {name}: expected that of PAPOEngine, whose settings have "
                f"a term of the corrupted stream too"
            )
        values = no_padding_2_padding(model_output[name], data)
        term = agg_loss(values, mask, config.loss_agg_mode, **config.global_batch_info)
        loss = loss + coef * term
        metrics[f"actor/{name}"] = Metric(value=term.detach(), aggregation=AggregationType.SUM)
    return loss, metrics


@EngineRegistry.register(
    model_type="language_model",
    backend=["fsdp", "fsdp2"],
    device=["cuda", "cpu"],
    # with a vendor, verl finds it before its own engine, which has none
    vendor=["nvidia", "amd"],
)
class PAPOEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine with `token_stats` in it, and a corrupted stream where a term needs it."""

    papo: PAPOSettings
    corrupt: PatchCorruption | TileCorruption | None
    """None where no term needs a corrupted picture."""

    def _build_module(self) -> nn.Module:
        if not self.model_config.use_fused_kernels:
            raise InputError(
                "model.use_fused_kernels is False: verl then reads logits, which token_stats "
                "never makes; set it to True"
            )
        options = (self.model_config.fused_kernel_options or {}).get("papo") or {}
        self.papo = PAPOSettings.of(dict(options), "fused_kernel_options.papo")
        self.corrupt = None
        if self.papo.needs_aug:
            processor = self.model_config.get_processor()
            if not hasattr(processor, "image_processor"):
                raise InputError(
                    f"{self.model_config.path} has no image processor, which says what a black "
                    "patch is: PAPO's terms need a vision-language model and its processor"
                )
            self.corrupt = corruption_of(
                processor.image_processor, self.model_config.hf_config, self.papo.corruption_ratio
            )
        module = super()._build_module()
        module.forward = types.MethodType(forward_with_token_stats, module)
        return module

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        brought = model_inputs.pop("aug_pixel_values", None)  # the dataset's own, if it makes some
        if self.mode == "train" and self.corrupt is not None:
            model_inputs["aug_pixel_values"] = (
                self._corrupted(self.corrupt, micro_batch) if brought is None else brought
            )
            model_inputs["aug_gradient"] = self.papo.aug == "trained"
        return model_inputs, output_args

    def _corrupted(self, corrupt: PatchCorruption | TileCorruption, micro_batch: Any) -> Tensor:
        """The micro-batch's pictures in the layout of `pixel_values`, prompt by prompt.

        A prompt's patches are the same for all its responses, mini-batches and epochs of a step:
        verl moves the learning rate's schedule on once per step, and saves where it is.
        """
        pictures = (getattr(its, "data", its) for its in micro_batch["multi_modal_inputs"])
        found = self.papo.corrupted(
            corrupt, micro_batch["prompts"].unbind(), pictures, self.lr_scheduler.last_epoch
        )
        return torch.cat([x for x in found if x is not None])

    def prepare_model_outputs(
        self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        found = super().prepare_model_outputs(
            output, output_args, micro_batch, logits_processor_func
        )
        if self.mode != "train":
            return found
        offsets = micro_batch["input_ids"].offsets()
        for name in self.papo.signed:
            if "pad_size" in output_args:  # packed (1, N), in parts where Ulysses splits them
                row = output[name].squeeze(0)
                values = self._gather_and_unpad_packed(row, output_args["pad_size"])
            else:
                places = torch.arange(output[name].shape[1], device=offsets.device)
                values = output[name][places < offsets.diff()[:, None]]
            found[name] = torch.nested.nested_tensor_from_jagged(values, offsets)
        return found

    def forward_step(
        self, micro_batch: Any, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> Any:
        if not forward_only and self.papo.signed:
            loss_function = self._with_terms(loss_function)
        return super().forward_step(micro_batch, loss_function, forward_only)

    def _with_terms(self, loss_function: Any) -> Callable[..., Any]:
        function = getattr(loss_function, "func", None)  # verl hands over partial(ppo_loss, config)
        if function is papo_ppo_loss:
            return loss_function
        if function is not ppo_loss:
            raise InputError(
                f"the loss function is {loss_function!r}: PAPO's terms are added to verl's "
                "ppo_loss; pass partial(papo_ppo_loss, config=..., settings=...) to set_loss_fn"
            )
        return functools.partial(
            papo_ppo_loss, *loss_function.args, **loss_function.keywords, settings=self.papo
        )
