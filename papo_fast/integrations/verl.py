"""PAPO in verl and EasyR1: what their actors call, with their names, shapes and layout.

Neither is imported. Under verl 0.9 `papo_fast.integrations.verl_engine` puts all of it in place by
itself, and in EasyR1 `papo_fast.integrations.easyr1`; these are the parts for an actor of one's
own. `forward_with_token_stats` is a model's `forward` as verl's fused backends are;
`linear_cross_entropy` and `FusedLinearForPPO` are the two functions such a forward ends in;
`papo_loss` takes what an actor holds at its update, (batch, response) tensors and a response mask.
The interfaces as they were published:
`tests/data/verl_interfaces.json`.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from papo_fast.config import Average, ObjectiveConfig
from papo_fast.errors import InputError
from papo_fast.integrations.streams import AugStream, two_streams, whole
from papo_fast.objective import mean_metrics, objective
from papo_fast.token_batch import Denominators, TokenBatch
from papo_kernels import token_stats

AVERAGES: dict[str, Average] = {
    "token-mean": "token",
    "token": "token",
    "seq-mean-token-mean": "sequence",
    "seq": "sequence",
}
"""Their names of an average, verl's and EasyR1's → ours."""


@dataclass
class StatsOutput(ModelOutput):
    """verl's `CausalLMOutputForPPO` with the corrupted stream's statistics, (B, S) each.

    Position t holds those of token t + 1, so that an actor takes `[:, -response_length - 1 : -1]`.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aug_log_probs: Tensor | None = None
    aug_entropy: Tensor | None = None
    kl_prcp: Tensor | None = None
    kl_reverse: Tensor | None = None
    hidden_states: Tensor | None = None


def forward_with_token_stats(
    self: nn.Module,
    input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    shift_labels: Tensor | None = None,
    aug_pixel_values: Tensor | None = None,
    aug_gradient: bool = True,
    **kwargs: Any,
) -> StatsOutput:
    """A drop-in `forward` for a HuggingFace model under verl or EasyR1.

    Args:
        input_ids: (B, S), or (1, N) of sequences without padding.
        labels: as `input_ids`; None: `input_ids`. Their successors are scored.
        temperature: divides the logits.
        shift_labels: (B, S) of the hidden states: the labels, already shifted by one. Needed where
            Ulysses splits sequences over ranks: a part's last successor is on the next rank.
        aug_pixel_values: corrupted pictures; the output then has the corrupted stream's fields.
        aug_gradient: let the gradient flow into the corrupted stream.
        kwargs: whatever else the model's backbone takes.

    Raises:
        InputError: there is nothing to score, shift_labels is missing under Ulysses, or one that
            `papo_fast.integrations.streams.two_streams` raises.
    """
    for name in ("return_dict", "use_cache", "logits_to_keep"):
        kwargs.pop(name, None)
    if shift_labels is None:
        labels = input_ids if labels is None else labels
        if labels is None:
            raise InputError("input_ids and labels are missing: one of them says what is scored")
        ranks = _sequence_parallel_ranks()
        if ranks > 1:
            raise InputError(
                f"shift_labels is missing: {ranks} ranks hold a part of each sequence (Ulysses), "
                "and the last label of a part is on the next rank; pass the successors of this "
                "rank's tokens"
            )
        shift_labels = labels.roll(-1, -1)
    aug = None if aug_pixel_values is None else AugStream(aug_pixel_values, aug_gradient)
    stats, hidden = two_streams(
        self, {"input_ids": input_ids, **kwargs}, shift_labels, aug=aug, temperature=temperature
    )
    logprobs, entropy, *aug_stats = stats
    return StatsOutput(logprobs, entropy, *aug_stats, hidden_states=hidden)


def _sequence_parallel_ranks() -> int:
    """Over how many ranks verl or EasyR1, whichever is running, splits a sequence."""
    ulysses = sys.modules.get("verl.utils.ulysses")
    return 1 if ulysses is None else ulysses.get_ulysses_sequence_parallel_world_size()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """verl's function of this name: log-probs and entropies from hidden states.

    (…, D), (V, D) and (…) int64 → two of (…) float32. Labels may also be flat, or have 1s elsewhere
    in their shape: Megatron's states are (S, 1, D) and its labels (1, S). The results have their
    shape. With `dist_process_group` the ranks hold row shards of `weight`; without, a `DTensor` is
    gathered, and its gradient averaged over ranks, as FSDP2 does. Raises `InputError` for a
    reduction other than "none" and for labels of any other shape.
    """
    if str(reduction).lower() != "none":
        raise InputError(f"reduction is {reduction!r}: expected 'none', which is what actors use")
    shape = hidden.shape[:-1]
    if labels.shape != (shape.numel(),) and _without_ones(labels.shape) != _without_ones(shape):
        raise InputError(
            f"labels have shape {tuple(labels.shape)}: expected {tuple(shape)}, one for each "
            "hidden state"
        )
    stats = token_stats(
        hidden.flatten(0, -2),
        weight if dist_process_group is not None else whole(weight),
        labels.flatten(),
        temperature=float(temperature),
        vocab_group=dist_process_group,
    )
    return stats.logprobs.view(labels.shape), stats.entropy.view(labels.shape)


def _without_ones(shape: torch.Size) -> list[int]:
    return [size for size in shape if size != 1]


class FusedLinearForPPO(nn.Module):
    """verl's module of this name; `chunk_size` and `impl_backend` are accepted and not needed."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(…, D), (V, D), (…) int64, the tokens to score → log-probs and entropies, (…) float32."""
        return linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)


def papo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str | None = None,
    config: ObjectiveConfig | None = None,
    rollout_is_weights: Tensor | None = None,
    *,
    ref_log_prob: Tensor | None = None,
    aug_log_prob: Tensor | None = None,
    entropy: Tensor | None = None,
    aug_entropy: Tensor | None = None,
    kl_prcp: Tensor | None = None,
    kl_reverse: Tensor | None = None,
    correct: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: int | Tensor | None = None,
    global_batch_size: int | Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The whole PAPO loss, policy term and reference KL included, and its metrics.

    The first seven arguments are those of a policy loss registered with verl. The result is the
    loss to call `backward` on: do not add an entropy or KL loss of the actor's own.

    A response of which no token counts is a response all the same: it counts where responses are
    counted. Metrics of a micro-batch in which no token counts are 0, and the ratios' extremes 1.

    Args:
        old_log_prob, log_prob, advantages: (B, L) floating.
        response_mask: (B, L) bool or int, 1 where a response token is to be counted.
        loss_agg_mode: "token-mean" ("token" in EasyR1) or "seq-mean-token-mean" ("seq"); None: what
            `config` says.
        config: coefficients and estimators; None: `ObjectiveConfig()`, PAPO-G with exact terms.
        rollout_is_weights: (B, L) importance weights of trainer over sampler.
        ref_log_prob, aug_log_prob, entropy, aug_entropy, kl_prcp, kl_reverse: (B, L) floating, each
            where a term of `config` needs it.
        correct: (B,) or (B, L) bool, response is right; for the SFT term.
        dp_size: ranks whose gradients are averaged; the loss is multiplied by it where the average
            is over the global batch.
        batch_num_tokens, global_batch_size: response tokens and sequences of the global batch, of
            all ranks; None: those of these tensors (EasyR1 scales micro-batches itself).

    Raises:
        InputError: a tensor has another shape, a needed one is missing, the average is unknown, or
            `config` asks for token weights or a second corrupted view.
    """
    goal = (config or ObjectiveConfig()).resolved()
    if loss_agg_mode is not None:
        if loss_agg_mode not in AVERAGES:
            raise InputError(
                f"loss_agg_mode is {loss_agg_mode!r}: expected one of {', '.join(AVERAGES)}"
            )
        goal = dataclasses.replace(goal, average=AVERAGES[loss_agg_mode])
    if goal.weighs_on != "none":
        raise InputError(
            f"config.token_weights is {goal.token_weights!r}: papo_loss applies none, multiply "
            "advantages by those of papo_fast.token_weights"
        )
    if goal.needs_second:
        raise InputError(
            "config has a term that compares two corrupted views (dvrp_*, margin_coef, or a term "
            "of terms that needs second_logprobs): papo_loss takes one view; add "
            "papo_fast.view_terms.dvrp_term or margin_loss to its loss, or train by papo-fast"
        )
    mask = response_mask.bool()
    if correct is not None and correct.ndim == 1:
        correct = correct[:, None].expand_as(mask)
    sequence_ids = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    per_token = {
        "logprobs": log_prob,
        "old_logprobs": old_log_prob,
        "advantages": advantages,
        "sequence_ids": sequence_ids,
        "entropy": entropy,
        "aug_logprobs": aug_log_prob,
        "aug_entropy": aug_entropy,
        "kl_prcp": kl_prcp,
        "kl_reverse": kl_reverse,
        "ref_logprobs": ref_log_prob,
        "correct": correct,
        "rollout_weights": rollout_is_weights,
    }
    for name, x in per_token.items():
        if x is not None and x.shape != mask.shape:
            raise InputError(
                f"{name} has shape {tuple(x.shape)}: expected {tuple(mask.shape)} as response_mask"
            )
    vectors: dict[str, Any] = {
        name: None if x is None else _wide(x[mask]) for name, x in per_token.items()
    }
    batch = TokenBatch(**vectors, responses=len(mask))
    tokens = mask.sum() if batch_num_tokens is None else batch_num_tokens
    sequences = max(1, len(mask)) if global_batch_size is None else global_batch_size
    right_tokens = None if batch.correct is None else batch.correct.sum()
    loss, metrics = objective(
        batch, goal, Denominators(tokens, sequences, correct_tokens=right_tokens)
    )
    return loss * dp_size, {f"actor/{name}": x for name, x in mean_metrics([metrics]).items()}


def _wide(values: Tensor) -> Tensor:
    """16-bit log-probs make ratios of noise; the objective refuses them."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
