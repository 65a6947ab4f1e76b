"""The micro-batch and the step that a configuration makes of prompts and responses of given size.

The same arithmetic as `papo_fast.model.batching`, on averages instead of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

from papo_fast.config import Config
from papo_fast.model.flops import ModelShape
from papo_fast.planning.arguments import Lengths
from papo_fast.rollout.engines import engine_class


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass; numbers of tokens are of all streams together."""

    tokens: int
    keys: int
    """Keys that attention gathers: a response's own and its prompt's."""
    patches: int
    response_tokens: int
    """Response tokens of one stream, which go through the lm_head."""
    streams: int
    segments: int
    """Prompts and responses, which attention pads to one length where it runs by SDPA."""
    accumulated: bool
    """Gradients of an earlier micro-batch are there."""


def update_streams(config: Config) -> int:
    return config.objective.streams_at_once


def micro_batch(config: Config, lengths: Lengths, merge: int, ranks: int) -> MicroBatch:
    """The largest one that `batching.distribute` makes of an update, on every one of `ranks` ranks.

    Args:
        merge: patches of an image token.
    """
    streams, n = update_streams(config), config.rollout.group_size
    room = config.train.max_tokens // streams
    # responses that share one copy of their prompt
    together = max(1, min(n, (room - lengths.prompt) // lengths.response))
    pieces = config.train.update_prompts * -(-n // together)
    trees = config.train.update_prompts * n / together
    tokens = trees * lengths.tree(together)
    batches = max(1, -(-int(tokens) // room))
    batches += -batches % ranks
    batches = min(batches, max(ranks, pieces - pieces % ranks))
    trees /= batches
    prompt, responses = trees * lengths.prompt, trees * together * lengths.response
    return MicroBatch(
        tokens=round(streams * (prompt + responses)),
        keys=round(streams * (prompt + responses + trees * together * lengths.prompt)),
        patches=round(streams * trees * lengths.image * merge),
        response_tokens=round(responses),
        streams=streams,
        segments=round(streams * trees * (1 + together)),
        accumulated=batches > ranks,
    )


@dataclass(frozen=True)
class StepWork:
    """FLOPs of one step over all ranks, by phase, and what the sampler makes."""

    experience: float
    update: float
    prefill: float
    sequences: int


def step_work(config: Config, lengths: Lengths, shape: ModelShape) -> StepWork:
    """Work of one rollout and its updates.

    A backward pass counts twice its forward, once where weights are frozen; checkpointing repeats
    the forward. The lm_head counts dense, which is more than its sparse backward does.
    """
    objective, model, n = config.objective, config.model, config.rollout.group_size
    prompts = config.rollout.prompts
    length, prompt = lengths.response, lengths.prompt
    pairs = prompt * (prompt + 1) // 2 + n * (length * prompt + length * (length + 1) // 2)
    text = prompts * shape.language(round(lengths.tree(n)), pairs)
    head = prompts * n * shape.head(length)
    vision = prompts * shape.vision(lengths.image)
    forward = text + head + vision
    passes = (
        (objective.needs_reference and objective.kl_estimator == "sampled")
        + (config.old_logprobs_from == "pass")
        + (objective.aug_stream == "stored") * (1 + objective.needs_second)
        + 2 * (objective.weighs_on == "rollout")  # both streams
    )
    again = int(model.gradient_checkpointing)
    text_factor = 2 + again + (model.lora_rank == 0)
    vision_factor = 1
    if model.train_vision:
        vision_factor = 2 + again + (model.lora_rank == 0)
    update = update_streams(config) * (
        text_factor * text + vision_factor * vision + (4 - (model.lora_rank > 0)) * head
    )
    once = vision + prompts * shape.language(prompt, prompt * (prompt + 1) // 2)
    prefill = engine_class(config.rollout.engine).prompt_passes(n) * once
    return StepWork(passes * forward, update, prefill, prompts * n)
