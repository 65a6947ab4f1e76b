"""The vision-language model as a policy: load it, score sequences with it, save it.

Scoring gives the per-token statistics of DESIGN §2 for the `full` stream (real picture) and, where
asked, the `aug` stream (corrupted picture), from one forward pass over both. Logits are never
held as a whole: `papo_kernels.token_stats` takes hidden states and the output embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationConfig

from papo_fast.config import ModelConfig
from papo_fast.sequences import SequenceBatch
from papo_kernels import TokenStats, token_stats

# Added to the logits of tokens that are never sampled, so that they are scored as impossible too.
# Finite: 0 * inf would turn the entropy into NaN.
BANNED_LOGIT = -1e4


class Policy(nn.Module):
    """A Qwen-VL model with the tokens it must never sample.

    Args:
        model: the HuggingFace model, an `...ForConditionalGeneration` of `processing.FAMILIES`.
        banned_token_ids: ids that are excluded from sampling and from every statistic.
        dtype: of the forward pass; the model's weights stay in theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        banned_token_ids: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.model = model
        self.dtype = dtype
        # `generate` fills every option left unset from the checkpoint's own (Qwen ships a
        # repetition penalty and a near-zero temperature), which is not the policy that is scored.
        self._shipped_generation_config = model.generation_config
        model.generation_config = GenerationConfig()
        weight = model.lm_head.weight
        ban = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        ban[[i for i in banned_token_ids if i < len(ban)]] = BANNED_LOGIT
        self.register_buffer("banned_V", ban, persistent=False)

    @classmethod
    def load(
        cls, config: ModelConfig, banned_token_ids: Sequence[int], device: torch.device
    ) -> Policy:
        model = AutoModelForImageTextToText.from_pretrained(
            config.path,
            dtype=torch.float32,  # master weights, see ModelConfig.dtype
            trust_remote_code=config.trust_remote_code,
            attn_implementation="sdpa",
        ).to(device)
        if not config.train_vision:
            model.model.visual.requires_grad_(False)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(model, banned_token_ids, getattr(torch, config.dtype))

    @property
    def device(self) -> torch.device:
        return self.banned_V.device

    def autocast(self) -> torch.autocast:
        """Context in which the model computes in `dtype`."""
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed)

    def stats(
        self,
        batch: SequenceBatch,
        *,
        aug: SequenceBatch | None = None,
        aug_gradient: bool = True,
        kl_to: Policy | None = None,
        temperature: float = 1.0,
    ) -> tuple[TokenStats, Tensor | None]:
        """Statistics of the batch's N response tokens, (N,) float32 each, and the exact KL.

        Args:
            batch: sequences with their real pictures.
            aug: the same sequences with corrupted pictures, or None for a single stream.
            aug_gradient: False lets no gradient into the `aug` stream's hidden states.
            kl_to: a reference policy; the second result is then KL(policy || reference) of each
                token, exact over the vocabulary, (N,) float32, else None.
            temperature: the sampling temperature; statistics are those of the sampled policy.
        """
        if aug is None:
            hidden_ND, aug_hidden_ND = self._hidden([batch]), None
        elif aug_gradient:
            hidden_ND, aug_hidden_ND = self._hidden([batch, aug]).chunk(2)
        else:
            hidden_ND = self._hidden([batch])
            with torch.no_grad():
                aug_hidden_ND = self._hidden([aug])
        stats = token_stats(
            hidden_ND,
            self._head_weight(),
            batch.targets_N,
            aug_hidden=aug_hidden_ND,
            bias=self.banned_V,
            temperature=temperature,
        )
        if kl_to is None:
            return stats, None
        return stats, self._exact_kl(kl_to, hidden_ND, batch, temperature)

    def _exact_kl(
        self, reference: Policy, hidden_ND: Tensor, batch: SequenceBatch, temperature: float
    ) -> Tensor:
        # The two models have different output embeddings. [h, 0] @ [W, W_ref]^T = h @ W^T and
        # [0, h_ref] @ [W, W_ref]^T = h_ref @ W_ref^T make them two streams over one weight.
        with torch.no_grad():
            ref_ND = reference._hidden([batch])
        zeros = torch.zeros_like(hidden_ND)
        return token_stats(
            torch.cat([hidden_ND, zeros], dim=1),
            torch.cat([self._head_weight(), reference._head_weight()], dim=1),
            batch.targets_N,
            aug_hidden=torch.cat([zeros, ref_ND], dim=1),
            bias=self.banned_V,
            temperature=temperature,
        ).kl_prcp

    def _hidden(self, batches: Sequence[SequenceBatch]) -> Tensor:
        """Hidden states that predict the response tokens, (N, D), of equally shaped batches.

        One forward pass over all of them; each distinct picture goes through the vision tower once.
        """
        texts = [b.text_inputs() for b in batches]
        inputs = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
        with self.autocast():
            inputs |= self._encoded_images([b for b in batches if b.pixel_values is not None])
            hidden_BSD = self.model.model(**inputs, use_cache=False).last_hidden_state
        size = batches[0].input_ids_BS.numel()
        rows = torch.cat([b.rows_N + i * size for i, b in enumerate(batches)])
        return hidden_BSD.flatten(0, 1)[rows].to(self.dtype)

    def _encoded_images(self, batches: Sequence[SequenceBatch]) -> dict[str, object]:
        if not batches:
            return {}
        grids = torch.cat([b.image_grid_thw for b in batches])
        features = self.model.model.get_image_features(
            torch.cat([b.pixel_values for b in batches]), grids, return_dict=True
        )
        index, n = [], 0
        for b in batches:
            index.append(b.image_index + n)
            n += len(b.image_grid_thw)
        order = torch.cat(index)
        picked = order.tolist()
        features.pooler_output = tuple(features.pooler_output[i] for i in picked)
        if getattr(features, "deepstack_features", None) is not None:  # Qwen3-VL
            features.deepstack_features = [
                tuple(layer[i] for i in picked) for layer in features.deepstack_features
            ]
        return {"mm_encoder_outputs": {"image": features}, "image_grid_thw": grids[order]}

    def _head_weight(self) -> Tensor:
        return self.model.lm_head.weight.to(self.dtype)

    def frozen_copy(self) -> Policy:
        """The reference policy: the same weights, without gradients, from now on unchanged."""
        reference = copy.deepcopy(self)
        reference.requires_grad_(False)
        return reference.eval()

    def save(self, path: Path) -> None:
        """Write config and weights (safetensors) as a HuggingFace checkpoint under `path`."""
        path.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(path)
        # the checkpoint's own sampling options, written as they came: transformers refuses to
        # save some that published checkpoints carry
        shipped = self._shipped_generation_config.to_json_string(use_diff=True)
        (path / "generation_config.json").write_text(shipped)


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
