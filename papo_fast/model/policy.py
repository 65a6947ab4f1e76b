"""The vision-language model as a policy: load it, score sequences with it, save it.

Scoring gives the per-token statistics of docs/design.md for the `full` stream (real picture) and,
where asked, the `aug` stream (corrupted picture), from one forward pass over both. Logits are never
held as a whole: `papo_kernels.token_stats` takes hidden states and the output embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from papo_fast.config import Config, ModelConfig, ParallelConfig
from papo_fast.data.encoded import EncodedPrompt
from papo_fast.model.activations import OffloadedActivations
from papo_fast.model.flops import ModelShape
from papo_fast.model.four_bit import quantize_linears
from papo_fast.model.liger import use_liger
from papo_fast.model.loading import load_model
from papo_fast.model.lora import (
    add_adapters,
    freeze_in,
    without_adapters,
)
from papo_fast.model.packing import PackedBatch, pack
from papo_fast.model.saving import whole_shapes, whole_weights, write_checkpoint
from papo_fast.parallel import device_mesh, is_main, shard, whole
from papo_fast.samples import Group
from papo_kernels import TokenStats, token_stats

# Added to the logits of tokens that are never sampled, so that they are scored as impossible too.
# Finite: 0 * inf would turn the entropy into NaN.
BANNED_LOGIT = -1e4


class Policy(nn.Module):
    """A vision-language model with the tokens it must never sample, on the fast path.

    `papo_fast.model.plain.PlainPolicy` is the same for families that cannot be packed.

    Args:
        model: the HuggingFace model, an `...ForConditionalGeneration` of `encoder.FAMILIES`.
        banned_token_ids: ids that are excluded from sampling and from every statistic.
        dtype: of the forward pass; the model's weights stay in theirs.
        always_run_vision: run the vision tower, with weight zero, for batches without pictures
            too: ranks that share its parameters must all run it.
        offload_activations: `parallel.offload_activations`.
    """

    banned_logit = BANNED_LOGIT

    def __init__(
        self,
        model: nn.Module,
        banned_token_ids: Sequence[int],
        dtype: torch.dtype = torch.float32,
        always_run_vision: bool = False,
        offload_activations: bool = False,
    ):
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.always_run_vision = always_run_vision
        self.offload_activations = offload_activations
        # `generate` fills every option left unset from the checkpoint's own (Qwen ships a
        # repetition penalty and a near-zero temperature), which is not the policy that is scored.
        self._shipped_generation_config = model.generation_config
        model.generation_config = GenerationConfig()
        ban = torch.zeros(len(model.lm_head.weight))
        ban[[i for i in banned_token_ids if i < len(ban)]] = self.banned_logit
        self.register_buffer("banned_V", ban, persistent=False)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        banned_token_ids: Sequence[int],
        device: torch.device,
        parallel: ParallelConfig | None = None,
        mesh: DeviceMesh | None = None,
    ) -> Policy:
        """The checkpoint `config.path`; sharded over all processes with `parallel`.

        mesh: what to shard over with `parallel`; None: all processes, where there are several, or
            this one alone where it offloads its weights.
        """
        if mesh is None and parallel is not None:
            mesh = device_mesh(device, parallel)
        model = cls._model(config, device, empty=mesh is not None and not is_main())
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        dtype = getattr(torch, config.dtype)
        if config.lora_rank:
            add_adapters(model, config)
            if config.quantize == "nf4":
                quantize_linears(model, dtype, device if mesh is None else torch.device("cpu"))
            freeze_in(model, dtype)
        elif not config.train_vision:
            cls._vision(model).requires_grad_(False)
        for weight in model.parameters():
            if weight.requires_grad and weight.dtype != torch.float32:
                weight.grad_dtype = torch.float32  # in which micro-batches add up
        policy = cls(
            model,
            banned_token_ids,
            dtype,
            always_run_vision=mesh is not None,
            offload_activations=parallel is not None and parallel.offload_activations,
        )
        if mesh is None:
            return policy.to(device)
        return shard(
            policy,
            cls._units(model),
            mesh,
            dtype=dtype,
            offload=parallel.offload,
            forwards=("stats", "stats_of_views", "hidden_and_head"),
        )

    @staticmethod
    def _model(config: ModelConfig, device: torch.device, *, empty: bool) -> nn.Module:
        model = load_model(config, empty=empty)
        use_liger(model, config, device)
        return model

    @staticmethod
    def _vision(model: nn.Module) -> nn.Module:
        """What `model.train_vision` freezes."""
        return model.model.visual

    @staticmethod
    def _units(model: nn.Module) -> list[nn.Module]:
        """The layers that are sharded each on their own."""
        return [*model.model.visual.blocks, *model.model.language_model.layers]

    def reference(self, config: Config) -> Policy | SharedReference | None:
        """The frozen policy that the reference KL is taken to; None where its weight is 0.

        With LoRA it is this policy without its adapters, else the checkpoint once more.
        """
        if not config.objective.needs_reference:
            return None
        if config.model.lora_rank:
            return SharedReference(self)
        bans = self.banned_V.nonzero().flatten().tolist()
        kept = config.model.reference_dtype
        dtype = kept if kept == "bfloat16" else config.model.dtype
        model = replace(config.model, weights_dtype=kept, dtype=dtype)
        reference = type(self).load(model, bans, self.device, config.parallel)
        return reference.requires_grad_(False).eval()

    @cached_property
    def shape(self) -> ModelShape:
        """What a forward pass costs, for balancing batches."""
        return ModelShape.of(self.model.config)

    @property
    def device(self) -> torch.device:
        return self.banned_V.device

    @property
    def is_sharded(self) -> bool:
        """Whether no weight is whole outside of a forward pass."""
        return any(isinstance(p, DTensor) for p in self.parameters())

    def autocast(self) -> torch.autocast:
        """Context in which the model computes in `dtype`, where that is a half precision."""
        mixed = self.dtype.itemsize < 4
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed)

    def pack(self, groups: Sequence[Group], **streams: bool) -> PackedBatch:
        """The groups as one batch of the forward pass, on the policy's device; see `packing.pack`.

        Args:
            streams: `full`, `aug`, `second`: which of them it holds; by default `full` alone.
        """
        return pack(groups, self.prompt_positions, **streams).to(self.device)

    def head_options(self, temperature: float) -> dict[str, Any]:
        """What `token_stats` has to know of the logits besides hidden states and head."""
        return {"bias": self.banned_V, "temperature": temperature}

    def stats(self, batch: PackedBatch, **options: Any) -> tuple[TokenStats, Tensor | None]:
        """What `stats_of_views` returns but for the second view."""
        # the class's own, because FSDP wraps that of a sharded policy as it does this one
        return Policy.stats_of_views(self, batch, **options)[:2]

    def stats_of_views(
        self,
        batch: PackedBatch,
        *,
        frozen_aug: PackedBatch | None = None,
        kl_to: Policy | SharedReference | None = None,
        temperature: float = 1.0,
    ) -> tuple[TokenStats, Tensor | None, Tensor | None]:
        """Statistics of the batch's N response tokens, (N,) float32 each, the exact KL, and the
        tokens' log-probs given the second view, (N,) float32, or None without one.

        Args:
            batch: trees of one stream, or of the full and the corrupted ones in one forward pass.
            frozen_aug: the corrupted streams as a batch of their own, which are constants in every
                gradient; `batch` then holds the full stream alone.
            kl_to: a reference policy; the second result is then KL(policy || reference) of each
                token, exact over the vocabulary, (N,) float32, else None. Needs `batch` to hold
                one stream or the full stream first.
            temperature: the sampling temperature; statistics are those of the sampled policy.
        """
        hidden_ND, *views = self._hidden(batch)
        frozen, kl, second = frozen_aug is not None, None, None
        if frozen_aug is not None:
            with torch.no_grad():
                views = self._hidden(frozen_aug)
        head = (self._head_weight(), batch.targets_N)
        options = self.head_options(temperature)
        aug = views[0] if views else None
        stats = token_stats(hidden_ND, *head, aug_hidden=aug, aug_constant=frozen, **options)
        if len(views) > 1:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                second = token_stats(views[1], *head, **options).logprobs
        if kl_to is not None:
            kl = self._exact_kl(kl_to, hidden_ND, batch, temperature)
        return stats, kl, second

    def _exact_kl(
        self,
        reference: Policy | SharedReference,
        hidden_ND: Tensor,
        batch: PackedBatch,
        temperature: float,
    ) -> Tensor:
        options = self.head_options(temperature)
        if isinstance(reference, SharedReference):  # one output embedding, which is frozen
            with torch.no_grad(), without_adapters(self.model):
                ref_ND = self._hidden(batch)[0]
            weight = self._head_weight()
            return token_stats(
                hidden_ND, weight, batch.targets_N, aug_hidden=ref_ND, **options
            ).kl_prcp
        # The two models have different output embeddings. [h, 0] @ [W, W_ref]^T = h @ W^T and
        # [0, h_ref] @ [W, W_ref]^T = h_ref @ W_ref^T make them two streams over one weight.
        with torch.no_grad():
            ref_ND, ref_weight = reference.hidden_and_head(batch)
        zeros = torch.zeros_like(hidden_ND)
        return token_stats(
            torch.cat([hidden_ND, zeros], dim=1),
            torch.cat([self._head_weight(), ref_weight], dim=1),
            batch.targets_N,
            aug_hidden=torch.cat([zeros, ref_ND], dim=1),
            **options,
        ).kl_prcp

    def prompt_positions(self, prompt: EncodedPrompt) -> Tensor:
        """(3, L) int64 positions of a prompt along M-RoPE's axes, on the CPU."""
        if prompt.image_grid_thw is None:
            return torch.arange(len(prompt)).expand(3, -1)
        positions, _ = self.model.model.get_rope_index(
            prompt.input_ids[None],
            image_grid_thw=prompt.image_grid_thw,
            mm_token_type_ids=prompt.mm_token_type_ids[None],
        )
        return positions[:, 0]

    def hidden_and_head(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Hidden states of the batch's first stream, (N, D), and the output embedding, (V, D)."""
        return self._hidden(batch)[0], self._head_weight()

    def _hidden(self, batch: PackedBatch) -> list[Tensor]:
        """Hidden states that predict the response tokens, (N, D) of each of the batch's streams."""
        with self.autocast(), self._activations():
            if batch.pixel_values is None and self.always_run_vision:
                # in front, as with pictures: ranks gather weights in one order, both ways
                nothing = self._vision_of_nothing()
                words_TD = self.model.model.get_input_embeddings()(batch.input_ids_T)
                inputs = {"inputs_embeds": (words_TD + nothing)[None]}
            else:
                images = self._encoded_images(batch)
                inputs = {"input_ids": batch.input_ids_T[None], "mm_encoder_outputs": images}
            hidden_TD = self.model.model(
                **inputs,
                position_ids=batch.position_ids_3T[:, None],
                tree=batch.tree,
                use_cache=False,
            ).last_hidden_state[0]
        return [hidden_TD[at].to(self.dtype) for at in batch.predictors]

    def _encoded_images(self, batch: PackedBatch) -> dict[str, object]:
        """Each distinct picture through the vision tower once, put in the order of the trees."""
        if batch.pixel_values is None:
            return {}
        features = self.model.model.get_image_features(
            batch.pixel_values, batch.image_grid_thw, return_dict=True
        )
        picked = batch.image_index.tolist()
        features.pooler_output = tuple(features.pooler_output[i] for i in picked)
        if getattr(features, "deepstack_features", None) is not None:  # Qwen3-VL
            features.deepstack_features = [
                tuple(layer[i] for i in picked) for layer in features.deepstack_features
            ]
        return {"image": features}

    def _activations(self) -> AbstractContextManager:
        """Context that decides where a forward pass keeps them."""
        offload = self.offload_activations and torch.is_grad_enabled()
        return OffloadedActivations() if offload else nullcontext()

    def _vision_of_nothing(self) -> Tensor:
        """Zero, with a gradient of zero to every parameter of the vision tower."""
        vision = self.model.config.vision_config
        merge, channels = vision.spatial_merge_size, vision.in_channels
        pixels = channels * vision.temporal_patch_size * vision.patch_size**2
        features = self.model.model.get_image_features(
            torch.zeros(merge**2, pixels, device=self.device),
            torch.tensor([[1, merge, merge]], device=self.device),
            return_dict=True,
        )
        layers = [features.pooler_output, *(getattr(features, "deepstack_features", None) or ())]
        return 0.0 * sum(x.sum() for layer in layers for x in layer)

    def _head_weight(self) -> Tensor:
        return self.model.lm_head.weight.to(self.dtype)

    def save(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config and weights (safetensors) as a HuggingFace checkpoint under `path`.

        Adapters are merged into the weights. Every rank of a sharded policy takes part; the main
        one writes.

        Args:
            dtype: of the weights that are written.
        """
        whole = get_model_state_dict(
            self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        if not is_main():
            return
        shipped = self._shipped_generation_config
        write_checkpoint(self.model, whole, path, dtype, shipped)

    def copy_weights_from(self, other: Policy) -> None:
        """Take over the trained weights of a policy of the same model, sharded or not."""
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
                if not theirs.requires_grad:  # frozen: as both were loaded
                    continue
                mine.copy_(whole(theirs))

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole weights as in checkpoints, in `dtype` (see `saving.whole_weights`)."""
        return whole_weights(self.model, self.dtype)

    def whole_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of `whole_weights`, with nothing gathered."""
        return whole_shapes(self.model)


@contextmanager
def inference(policy: Policy):
    """No gradients and modules in eval mode; the mode is restored on leaving."""
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad():
            yield policy
    finally:
        policy.train(was_training)


class SharedReference:
    """The policy without its adapters, as a reference policy."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def stats(self, batch: PackedBatch, **options: object) -> tuple[TokenStats, Tensor | None]:
        """`Policy.stats` of the model beneath the adapters."""
        with without_adapters(self.policy.model):
            return self.policy.stats(batch, **options)
