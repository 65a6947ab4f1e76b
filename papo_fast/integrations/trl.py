"""PAPO on TRL's own `GRPOTrainer`, and a hook that only replaces its log-probs and entropies.

TRL scores a batch by `model(..., labels=labels, fused_lm_head=True)`. `use_token_stats` answers
that call by `token_stats`; `PAPOTrainer` lets it answer for both streams and adds PAPO's terms to
whatever loss TRL computes. Generation, rewards, advantages, clipping, reference KL, importance
sampling, logging and saving remain TRL's. Written for TRL 1.16.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from papo_fast.config import ObjectiveConfig
from papo_fast.config_checks import check_objective
from papo_fast.data.corruption import PatchCorruption, TileCorruption, corruption_of, prompt_seed
from papo_fast.errors import InputError
from papo_fast.estimators import at_update
from papo_fast.integrations.streams import AugStream, check_model, two_streams
from papo_fast.objective import TERMS, sum_of_terms
from papo_fast.token_batch import TokenBatch
from papo_kernels import TokenStats

OUR_TERMS = ("kl_prcp", "entropy", "aug_entropy")
"""The terms of the objective that TRL does not have."""


@dataclass
class PAPOConfig(GRPOConfig):
    """`GRPOConfig` with PAPO's settings; defaults are those of PAPO-G for Qwen2.5-VL-3B.

    `entropy_coef` is TRL's own and rewards entropy; PAPO's double entropy loss lowers it and has
    names of its own. TRL's `loss_type` decides what all terms are averaged over ("bnpo" is the
    authors' token mean per micro-batch, "grpo" the paper's mean of sequence means), its `beta` is
    the weight of the reference KL and its `delta` the dual clip.
    """

    epsilon_high: float | None = field(
        default=0.3, metadata={"help": "Policy ratio is clipped above at 1 + epsilon_high."}
    )
    delta: float | None = field(default=3.0, metadata={"help": "Dual clip."})
    beta: float = field(default=0.01, metadata={"help": "Weight of the reference KL."})
    use_bias_correction_kl: bool = field(
        default=False,
        metadata={"help": "Multiply the reference KL by the policy ratio; PAPO does not."},
    )
    kl_prcp_coef: float = field(
        default=0.02, metadata={"help": "γ, weight of the perception KL, which is maximised."}
    )
    kl_prcp_clip: float | None = field(
        default=None, metadata={"help": "Upper bound of a token's perception KL."}
    )
    kl_prcp_anneal_steps: int = field(
        default=0,
        metadata={
            "help": "Steps over which γ falls linearly to 0, in official parity both entropies' "
            "weights with it; 0: constant."
        },
    )
    entropy_loss_coef: float = field(
        default=0.0, metadata={"help": "η₁, weight of the entropy, which is minimised."}
    )
    aug_entropy_loss_coef: float = field(
        default=0.0,
        metadata={"help": "η₂, weight of the entropy given the corrupted image, minimised."},
    )
    parity: Literal["ours", "official", "paper"] = field(
        default="ours",
        metadata={
            "help": "`ours`: exact terms; `official`: sampled; both without gradient into the "
            "corrupted stream; `paper`: sampled terms, both gradients."
        },
    )
    kl_prcp_direction: Literal["forward", "reverse"] = field(
        default="forward",
        metadata={"help": "KL(π ‖ π_aug), or `reverse`: KL(π_aug ‖ π), which is exact only."},
    )
    aug: Literal["frozen", "trained"] | None = field(
        default=None,
        metadata={
            "help": "The corrupted stream is a constant in every gradient (`frozen`), or gradients "
            "flow into it too (`trained`); None: as `parity` says."
        },
    )
    corruption_ratio: float = field(
        default=0.6, metadata={"help": "Share of an image's patches that turns black."}
    )
    grad_budget: float = field(
        default=3e-3,
        metadata={"help": "Share of a token's gradient the backward may leave out; 0: none."},
    )

    def objective(self) -> ObjectiveConfig:
        """The same settings for `papo_fast.objective`; raises `InputError` where they clash."""
        # TRL's adaptive control raises entropy_coef by itself, from 0 too
        rewarded = "use_adaptive_entropy = True" if self.use_adaptive_entropy else ""
        if self.entropy_coef != 0:
            rewarded = f"entropy_coef = {self.entropy_coef}"
        if rewarded and self.entropy_loss_coef != 0:
            raise InputError(
                f"{rewarded} rewards the entropy that entropy_loss_coef = "
                f"{self.entropy_loss_coef} lowers: set one of them"
            )
        if self.parity not in ("ours", "official", "paper"):
            raise InputError(f"parity = {self.parity!r}: expected ours, official or paper")
        goal = ObjectiveConfig(
            parity=self.parity,
            clip_low=self.epsilon,
            clip_high=self.epsilon if self.epsilon_high is None else self.epsilon_high,
            clip_dual=self.delta,
            kl_coef=self.beta,
            kl_prcp_coef=self.kl_prcp_coef,
            kl_prcp_clip=self.kl_prcp_clip,
            kl_prcp_anneal_steps=self.kl_prcp_anneal_steps,
            kl_prcp_direction=self.kl_prcp_direction,
            aug=self.aug,
            entropy_coef=self.entropy_loss_coef,
            aug_entropy_coef=self.aug_entropy_loss_coef,
        )
        check_objective(goal)
        return goal.resolved()


@dataclass
class TwoStreamOutput(FusedCausalLMOutput):
    """What TRL reads (`log_probs`, `entropy`) and the corrupted stream's, (B, S − 1) each."""

    aug_log_probs: Tensor | None = None
    aug_entropy: Tensor | None = None
    kl_prcp: Tensor | None = None
    kl_reverse: Tensor | None = None


class StatsHead:
    """Answers a model's calls with `fused_lm_head=True` by `token_stats`, and keeps the last.

    Attributes:
        aug: the corrupted stream that the next call scores too; taken away by that call.
        stats: `TokenStats` of the last call, (B, S − 1) each, or None.
    """

    def __init__(
        self, model: nn.Module, *, temperature: float, grad_budget: float, keep_dtype: bool
    ):
        check_model(model)
        self.aug: AugStream | None = None
        self.stats: TokenStats | None = None
        inner = model.forward

        # the signature stays: `generate` checks its keywords against it
        @functools.wraps(type(model).forward)
        def forward(
            model: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any
        ) -> Any:
            if not fused_lm_head:
                return inner(*args, **kwargs)
            if args or "labels" not in kwargs:
                raise InputError("fused_lm_head=True needs labels, and keywords alone: pass them")
            # labels stand one position behind the token that predicts them; the last predicts none
            labels = kwargs.pop("labels").roll(-1, 1)
            labels[:, -1] = -100
            aug, self.aug = self.aug, None
            stats, _ = two_streams(
                model,
                kwargs,
                labels,
                aug=aug,
                temperature=temperature,
                grad_budget=grad_budget,
                keep_dtype=keep_dtype,
            )
            self.stats = TokenStats._make(None if x is None else x[:, :-1] for x in stats)
            logprobs, entropy, *rest = self.stats
            return TwoStreamOutput(None, logprobs, entropy, **dict(zip(_AUG, rest, strict=True)))

        model.forward = types.MethodType(forward, model)


_AUG = ("aug_log_probs", "aug_entropy", "kl_prcp", "kl_reverse")


def use_token_stats(trainer: GRPOTrainer, *, grad_budget: float = 3e-3) -> StatsHead:
    """Let `token_stats` compute the log-probs and entropies of a `GRPOTrainer`, in place.

    Call it between making the trainer and `train()`. The loss is TRL's own; logits are float32
    (TRL's are of the model's dtype unless `cast_lm_head_to_fp32`), and rows of padding cost
    nothing.

    Raises:
        InputError: the model has a router loss (mixture of experts) or scales its logits; at the
            first step, its output embedding is not whole (DeepSpeed ZeRO-3).
    """
    if trainer.aux_loss_enabled:
        raise InputError(
            f"router_aux_loss_coef = {trainer.router_aux_loss_coef}: token_stats returns no router "
            "logits to compute that loss from, set router_aux_loss_coef=0"
        )
    options = dict(
        temperature=trainer.temperature,
        grad_budget=grad_budget,
        keep_dtype=trainer.args.cast_lm_head_to_fp32,
    )
    if trainer.ref_model is not None:
        StatsHead(trainer.accelerator.unwrap_model(trainer.ref_model), **options)
    model = trainer.model
    # TRL put its own head below an adapter, too
    return StatsHead(
        model.get_base_model() if hasattr(model, "get_base_model") else model, **options
    )


def _check_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise InputError(
                f"{name} drops out a share of {module.p}: the two streams would differ by more "
                "than the picture; set disable_dropout=True, or lora_dropout=0"
            )


class PAPOTrainer(GRPOTrainer):
    """`GRPOTrainer` that adds PAPO's terms to TRL's loss; takes a `PAPOConfig` as `args`.

    Of TRL it overrides the three methods below. Pictures are corrupted on the processor's own patch
    grid, once per prompt and rollout for all of its responses. With `parity="official"` the
    corrupted stream's log-probs are taken at each update, without gradient; the authors take them
    once per rollout, which is the same where a rollout makes one update.
    """

    _tag_names = ["trl", "grpo", "papo"]
    _name = "PAPO"
    _paper = {
        "title": "Perception-Aware Policy Optimization for Multimodal Reasoning",
        "id": "2507.06448",
        "citation": "",
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, **kwargs: Any):
        if not isinstance(args, PAPOConfig):
            raise InputError(f"args is a {type(args).__name__}: expected a PAPOConfig")
        self.goal = args.objective()
        super().__init__(model, reward_funcs, args, **kwargs)
        self._head = use_token_stats(self, grad_budget=args.grad_budget)
        self._corruption: PatchCorruption | TileCorruption | None = None
        if self.goal.needs_aug:
            _check_dropout(self.model)
            processor = getattr(self.processing_class, "image_processor", None)
            if processor is None:
                raise InputError(
                    f"processing_class is a {type(self.processing_class).__name__} without an "
                    "image processor: PAPO compares pictures, pass the model's AutoProcessor"
                )
            self._corruption = corruption_of(processor, self.model.config, args.corruption_ratio)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's, with a seed per sequence: responses to one prompt share their corruption."""
        batch = super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        size = self.num_generations if self.model.training else self.num_generations_eval
        batch["corruption_seeds"] = torch.tensor(
            [
                prompt_seed(self.args.seed, self.state.global_step, (first + i) // size)
                for i in range(len(inputs))
            ]
        )
        return batch

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss − γ KL_prcp + η₁ H + η₂ H_aug."""
        self._head.stats = None
        if self.goal.needs_aug:
            pixels = self.corrupted(inputs) if "pixel_values" in inputs else None
            self._head.aug = AugStream(pixels, self.goal.aug_stream == "trained")
        loss = super()._compute_loss(model, inputs)
        stats = self._head.stats
        if stats is None or self._head.aug is not None:
            raise InputError(
                "TRL did not call the model with fused_lm_head=True: this version of TRL is not "
                "supported, install trl 1.16"
            )
        return loss + self._our_terms(stats, inputs)

    def corrupted(self, inputs: dict[str, Any]) -> Tensor:
        """`inputs["pixel_values"]`, a share `corruption_ratio` of each image's patches black.

        Of pictures that are tiles: a share of each tile's blocks that are no padding.
        """
        pixels, counts = inputs["pixel_values"], inputs["num_images"]
        grids: Any = [None] * len(counts)
        if "image_grid_thw" in inputs:
            grids = inputs["image_grid_thw"].split(counts)
            parts = pixels.split([int(grid.prod(-1).sum()) for grid in grids])
        else:  # as TRL splits them: by tiles, by pictures, or a row for each sequence
            by_picture = counts if len(pixels) == sum(counts) else [1] * len(counts)
            parts = pixels.split(inputs.get("num_tiles") or by_picture)
        corrupt = self._corruption
        assert corrupt is not None, "the objective compares no pictures"
        seeds = inputs["corruption_seeds"].tolist()
        corrupted = [
            corrupt(part, grid, seed) if len(part) else part
            for part, grid, seed in zip(parts, grids, seeds, strict=True)
        ]
        return torch.cat(corrupted)

    def _our_terms(self, stats: TokenStats, inputs: dict[str, Any]) -> Tensor:
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        counted = mask.bool()
        weights = self.token_weights(mask, inputs)[counted]
        # the columns that score the completion are the last
        vectors: dict[str, Any] = {
            name: None if x is None else x[:, -mask.shape[1] :][counted]
            for name, x in stats._asdict().items()
        }
        ids = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[counted]
        batch = TokenBatch(
            old_logprobs=vectors["logprobs"].detach(),
            advantages=torch.zeros_like(vectors["logprobs"]),
            sequence_ids=ids,
            **vectors,
        )
        goal = at_update(self.goal, self.state.global_step)
        asked = [t for t in TERMS if t.name in OUR_TERMS and t.coef(self.goal) != 0]
        loss, _ = sum_of_terms(asked, batch, goal, lambda term: weights)
        for term in asked:
            if term.name != "entropy":  # TRL logs that one
                with torch.no_grad():
                    self._log_mean(term.name, term.values(batch, goal))
        return loss

    def token_weights(self, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """(B, T) the weight that TRL's loss of this `loss_type` gives each token."""
        training = self.model.training
        accumulated = self.current_gradient_accumulation_steps if training else 1
        if self.loss_type in ("grpo", "sapo"):
            return mask / mask.sum(-1, keepdim=True).clamp(min=1) / len(mask) / accumulated
        if self.loss_type == "bnpo":
            return mask / mask.sum().clamp(min=1) / accumulated
        if self.loss_type == "dr_grpo":
            return mask / (len(mask) * self.max_completion_length) / accumulated
        if self.loss_type == "luspo":
            return mask / len(mask) / accumulated
        if self.loss_type in ("dapo", "cispo", "vespo"):
            # the count is of all that was sampled together, which may make several updates
            total = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if training:
                total = total * accumulated / self.args.steps_per_generation
            return mask / total
        raise InputError(f"loss_type = {self.loss_type!r} is not known to PAPOTrainer")

    def _log_mean(self, name: str, values: Tensor) -> None:
        count = torch.tensor(float(values.numel()), device=values.device)
        total, n = self.accelerator.reduce(torch.stack([values.detach().sum(), count]))
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append((total / n.clamp(min=1)).item())
