"""Rollout of the plain path: `generate` of transformers, which knows each family's caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from papo_fast.data.plain_encoder import PlainPrompt
from papo_fast.rollout.hf import HFRollout, draw
from papo_fast.samples import Completion


class PlainRollout(HFRollout):
    """`HFRollout` for a `PlainPolicy`: a prompt runs once for each of its responses."""

    @staticmethod
    def prompt_passes(n: int) -> int:
        """Once for each response."""
        return n

    def _generate(
        self, prompts: Sequence[PlainPrompt], n: int, temperature: float, max_new_tokens: int
    ) -> list[list[Completion]]:
        policy = self.policy
        rows = [prompt for prompt in prompts for _ in range(n)]
        inputs = policy.padded(rows, pad_token_id=self.pad_token_id)
        draw = _Draw(policy.banned_V, temperature)
        written = policy.model.generate(
            **{name: value.to(policy.device) for name, value in inputs.items()},
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
            ),
            logits_processor=[draw],
        )
        tokens = written[:, inputs["input_ids"].shape[1] :].tolist()
        logprobs = torch.stack(draw.logprobs, dim=1).tolist()
        done = [self._cut(*pair) for pair in zip(tokens, logprobs, strict=True)]
        return [done[i : i + n] for i in range(0, len(done), n)]


class _Draw(LogitsProcessor):
    """Draws each token itself, so that its log-prob is known and no scores have to be kept."""

    def __init__(self, banned_V: Tensor, temperature: float):
        self.banned_V, self.temperature = banned_V, temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # the same order as token_stats: (logits + bias) / T
        logprobs_RV = ((scores.float() + self.banned_V) / self.temperature).log_softmax(-1)
        drawn_R1 = draw(logprobs_RV)
        self.logprobs.append(logprobs_RV.gather(1, drawn_R1)[:, 0])
        # what is left for `generate` to choose
        return torch.full_like(scores, -torch.inf).scatter(1, drawn_R1, 0.0)
