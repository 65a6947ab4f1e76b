"""TRL's trainer as it is, with the hook, and PAPO by whole logits: the same steps of each.

`steps_of` trains one of them for a few optimiser steps and keeps what `farthest` compares: losses,
gradients and logged metrics. The tests and `bench/peers/compare_trl.py` share these functions.
"""

from __future__ import annotations

import copy
import math
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from papo_fast.config import DataConfig
from papo_fast.integrations.conversations import conversations
from papo_fast.integrations.processor import load_processor
from papo_fast.integrations.trl import PAPOConfig, PAPOTrainer, use_token_stats

Kind = Literal["TRL", "hook", "PAPO by logits", "PAPO"]
KINDS: tuple[Kind, ...] = ("TRL", "hook", "PAPO by logits", "PAPO")

TERMS = {"kl_prcp_coef": 0.5, "entropy_loss_coef": 0.03, "aug_entropy_loss_coef": 0.05}

SETTINGS: dict[str, Any] = dict(
    per_device_train_batch_size=4,
    num_generations=4,
    max_completion_length=16,
    # both steps are of one rollout, so that no rounding can change what is sampled
    num_iterations=2,
    max_steps=2,
    # the step is proportional to the gradient; the second has ratios on both sides of the clip
    optim="sgd",
    learning_rate=0.005,
    lr_scheduler_type="constant",
    max_grad_norm=1e9,
    epsilon_high=0.3,
    delta=3.0,
    beta=0.0,
    use_bias_correction_kl=False,
    gradient_checkpointing=False,
    model_init_kwargs={"dtype": "float32"},
    bf16=False,
    use_cpu=True,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)


@dataclass(frozen=True)
class Case:
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of `GRPOConfig`, over `SETTINGS`."""
    papo: Mapping[str, Any] = field(default_factory=dict)
    """Of `PAPOConfig` alone, over `TERMS`."""
    lora: Mapping[str, Any] | None = None
    ranks: int = 1


@dataclass
class Steps:
    """What one training did."""

    losses: list[float]
    """One of each micro-batch, of this rank."""
    gradients: list[dict[str, Tensor]]
    """Of each optimiser step, by parameter."""
    metrics: list[dict[str, float]]
    """What was logged at each step, without times."""
    seconds: float
    """The fastest micro-batch, forward and backward."""


class WholeLogits(PAPOTrainer):
    """PAPO with its three terms from whole float32 logits of both streams, averaged by TRL.

    Neither `token_stats` nor our weights of tokens take part. The pictures are corrupted by
    `PAPOTrainer`, so that both corrupt the same patches.
    """

    _black: Tensor | None = None

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **rest
    ):
        kept = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
        inputs = {k: rest[k] for k in kept if rest.get(k) is not None}
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        black, self._black = self._black, None
        if black is not None:  # both streams in one batch: one forward pass of DDP
            inputs = {k: torch.cat([v, black if k == "pixel_values" else v])
                      for k, v in inputs.items()}  # fmt: skip
        inner = self.accelerator.unwrap_model(model)
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        head, forward = inner.get_output_embeddings(), inner.get_output_embeddings().forward
        head.forward = lambda hidden: _product(hidden, head.weight, self.args)
        with self.accelerator.autocast():
            logits = model(**inputs, use_cache=False).logits
        head.forward = forward
        logits = logits[:, -logits_to_keep - 1 : -1].float() / self.temperature
        p = logits.log_softmax(-1)
        if black is not None:
            p, q = p.chunk(2)
            self._streams = p, q if self.goal.aug_stream == "trained" else q.detach()
        here = attention_mask[:, -logits_to_keep:].bool()
        labels = input_ids[:, -logits_to_keep:, None]
        logprobs = p.gather(-1, labels)[..., 0].masked_fill(~here, 0)
        return logprobs, (-(p.exp() * p).sum(-1)).masked_fill(~here, 0), None

    def _compute_loss(self, model, inputs):
        self._black = self.corrupted(inputs)
        loss = GRPOTrainer._compute_loss(self, model, inputs)
        p, q = self._streams
        statistics = {
            "kl_prcp": (p.exp() * (p - q)).sum(-1),
            "entropy": -(p.exp() * p).sum(-1),
            "aug_entropy": -(q.exp() * q).sum(-1),
        }
        mask = inputs["completion_mask"]
        for name in ("kl_prcp", "aug_entropy"):
            pair = torch.stack([(statistics[name].detach() * mask).sum(), mask.sum().float()])
            total, n = self.accelerator.reduce(pair)
            self._metrics["train"][name].append((total / n).item())
        terms = (
            -self.args.kl_prcp_coef * statistics["kl_prcp"]
            + self.args.entropy_loss_coef * statistics["entropy"]
            + self.args.aug_entropy_loss_coef * statistics["aug_entropy"]
        )
        return loss + self.averaged_by_trl(terms, inputs)

    def averaged_by_trl(self, values: Tensor, inputs: dict[str, Any]) -> Tensor:
        """(B, T) → what TRL's own loss makes of a token's loss, without clipping or penalties.

        At a policy ratio of 1 a token's loss is −A times a known number, in every `loss_type`.
        """
        ones = torch.ones_like(values)
        factor = min(1.0, self.epsilon_high) if self.loss_type == "cispo" else 1.0
        alone = copy.copy(self)
        alone.args = copy.copy(self.args)
        alone.args.sapo_temperature_pos = alone.args.sapo_temperature_neg = 2.0
        alone._get_per_token_logps_and_entropies = lambda *_, **__: (ones, 0 * ones, None)
        alone._metrics = copy.deepcopy(self._metrics)
        alone.beta, alone.top_entropy_quantile, alone.off_policy_mask_threshold = 0.0, 1.0, None
        alone._entropy_bonus_enabled, alone.importance_sampling_level = False, "token"
        given = {**inputs, "advantages": -values / factor, "old_per_token_logps": ones}
        return GRPOTrainer._compute_loss(alone, None, given)


def _product(hidden: Tensor, weight: Tensor, args: GRPOConfig) -> Tensor:
    """Float32 logits; under autocast of the rounded operands, as a 16-bit head has them."""
    with torch.autocast("cpu", enabled=False):
        if args.bf16 and not args.cast_lm_head_to_fp32:
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        return functional.linear(hidden.float(), weight.float())


class _Recorder(TrainerCallback):
    def __init__(self, trainer: GRPOTrainer):
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.seconds: list[float] = []
        self._trainer = trainer
        step, prepare, loss_of = (
            trainer.training_step,
            trainer._prepare_inputs,
            trainer._compute_loss,
        )

        def training_step(*args, **kwargs):
            start, self._preparing = time.perf_counter(), 0.0
            out = step(*args, **kwargs)
            self.seconds.append(time.perf_counter() - start - self._preparing)
            return out

        def _prepare_inputs(inputs):
            start = time.perf_counter()
            out = prepare(inputs)
            self._preparing = time.perf_counter() - start
            return out

        def _compute_loss(model, inputs):
            loss = loss_of(model, inputs)
            self.losses.append(loss.item())
            return loss

        trainer.training_step = training_step
        trainer._prepare_inputs = _prepare_inputs
        trainer._compute_loss = _compute_loss
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = self._trainer.accelerator.unwrap_model(self._trainer.model).named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def varied_reward(completion_ids, **_):
    """A number that looks random for each response, so that every group has advantages."""
    return [zlib.crc32(repr(ids).encode()) / 2**32 for ids in completion_ids]


def trainer_of(kind: Kind, case: Case, folder: Path, grad_budget: float = 0.0) -> GRPOTrainer:
    """The trainer that `kind` names, from `folder/model` and `folder/train.parquet`."""
    processor = load_processor(folder / "model", min_pixels=28 * 28, max_pixels=28 * 28 * 64)
    ids = processor.tokenizer.convert_tokens_to_ids
    words = AutoConfig.from_pretrained(folder / "model").get_text_config().vocab_size
    settings = {
        **SETTINGS,
        "output_dir": str(folder / "out"),
        "generation_kwargs": {
            # about one token in nine ends its response; a random model would also write pictures
            "sequence_bias": [[[processor.tokenizer.eos_token_id], math.log(words / 9)]],
            "suppress_tokens": [ids(f"<|{x}_pad|>") for x in ("image", "video")],
        },
        **({"ddp_backend": "gloo"} if case.ranks > 1 else {}),
        **case.settings,
    }
    made: type[GRPOTrainer] = GRPOTrainer
    if kind in ("TRL", "hook"):
        args = GRPOConfig(**settings)
    else:
        made = PAPOTrainer if kind == "PAPO" else WholeLogits
        args = PAPOConfig(**settings, **{**TERMS, "grad_budget": grad_budget, **case.papo})
    peft_config = None
    if case.lora is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(**case.lora)
    torch.manual_seed(0)  # adapters
    trainer = made(
        str(folder / "model"),
        varied_reward,
        args,
        train_dataset=conversations(folder / "train.parquet", DataConfig(prompt_suffix="")),
        processing_class=processor,
        peft_config=peft_config,
    )
    if kind == "hook":
        use_token_stats(trainer, grad_budget=grad_budget)
    return trainer


def steps_of(kind: Kind, case: Case, folder: Path, grad_budget: float = 0.0) -> Steps:
    """Train the trainer that `kind` names for the case's optimiser steps."""
    trainer = trainer_of(kind, case, folder, grad_budget)
    trainer.remove_callback(PrinterCallback)
    recorder = _Recorder(trainer)
    trainer.train()
    timed = ("time", "runtime", "per_second")
    metrics = [
        {k: float(v) for k, v in entry.items() if not any(word in k for word in timed)}
        for entry in trainer.state.log_history
        if "grad_norm" in entry
    ]
    return Steps(recorder.losses, recorder.gradients, metrics, min(recorder.seconds))


def farthest(ours: Steps, theirs: Steps) -> dict[str, float]:
    """Largest differences: of a loss and of a gradient's element as shares of the largest one of
    their step, of a metric as a share of its value where that is above 1."""
    assert len(ours.losses) == len(theirs.losses) and ours.losses, "no micro-batch"
    assert len(ours.gradients) == len(theirs.gradients) and ours.gradients, "no step"
    largest = max(abs(x) for x in theirs.losses)
    assert largest > 0, "no response has an advantage"
    pairs = zip(ours.losses, theirs.losses, strict=True)
    found = {"loss": max(abs(x - y) for x, y in pairs) / largest, "gradients": 0.0, "metrics": 0.0}
    for mine, its in zip(ours.gradients, theirs.gradients, strict=True):
        assert mine.keys() == its.keys(), mine.keys() ^ its.keys()
        scale = max(g.abs().max() for g in its.values())
        assert scale > 0, "there is no gradient"
        apart = max(((mine[k] - g).abs().max() / scale).item() for k, g in its.items())
        found["gradients"] = max(found["gradients"], apart)
    for mine, its in zip(ours.metrics, theirs.metrics, strict=True):
        assert mine.keys() == its.keys(), mine.keys() ^ its.keys()
        apart = max(abs(mine[k] - x) / max(1, abs(x)) for k, x in its.items())
        found["metrics"] = max(found["metrics"], apart)
    return found


def row_of(case: Case, folder: Path) -> dict[str, Any]:
    """What `farthest` finds of the hook beside TRL and of PAPO beside its whole logits.

    The largest over ranks; `seconds` are this rank's.
    """
    done = {kind: steps_of(kind, case, folder) for kind in KINDS}
    row: dict[str, float] = {}
    for name, ours, theirs in (("GRPO", "hook", "TRL"), ("PAPO", "PAPO", "PAPO by logits")):
        for what, x in farthest(done[ours], done[theirs]).items():
            row[f"{name}: {what}"] = x
    row["what PAPO adds"] = abs(done["PAPO"].losses[0] - done["TRL"].losses[0])
    if case.ranks > 1:
        everywhere: list[Any] = [None] * case.ranks
        torch.distributed.all_gather_object(everywhere, row)
        row = {k: max(its[k] for its in everywhere) for k in row}
    return row | {"seconds": {kind: steps.seconds for kind, steps in done.items()}}
