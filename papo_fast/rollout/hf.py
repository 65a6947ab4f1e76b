"""Rollout by transformers' `generate`: runs wherever the model runs, with the policy's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from papo_fast.policy import Policy, inference
from papo_fast.processing import EncodedPrompt
from papo_fast.sequences import Completion, pad_left


class _Sampler(LogitsProcessor):
    """Applies temperature and bans, and keeps the log-prob of the token that was drawn.

    `generate` can return the scores of every step, which is (tokens x vocabulary) memory. The
    token drawn at one step is the input of the next call, so one step's log-probs are enough.
    """

    def __init__(self, banned_V: Tensor, temperature: float):
        self.banned_V = banned_V
        self.temperature = temperature
        self._last_BV: Tensor | None = None
        self._drawn: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids[:, -1])
        # the same order as token_stats: (logits + bias) / T
        scores = (scores.float() + self.banned_V) / self.temperature
        self._last_BV = scores.log_softmax(-1)
        return scores

    def _record(self, tokens_B: Tensor) -> None:
        if self._last_BV is not None:
            self._drawn.append(self._last_BV.gather(1, tokens_B[:, None])[:, 0])

    def logprobs_BT(self, sequences: Tensor) -> Tensor:
        self._record(sequences[:, -1])
        self._last_BV = None
        return torch.stack(self._drawn, dim=1)


class HFRollout:
    """`RolloutEngine` over `Policy`'s own model.

    Args:
        policy: its weights are the ones that sample.
        eos_token_ids, pad_token_id: from the prompt encoder.
        batch_size: sequences generated at a time.
        progress: called with the number of prompts done after every batch.
    """

    def __init__(
        self,
        policy: Policy,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        batch_size: int,
        progress: Callable[[int], None] | None = None,
    ):
        self.policy = policy
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.progress = progress

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> list[list[Completion]]:
        """Sample `n` responses per prompt at `temperature` (see `RolloutEngine`)."""
        per_call = max(1, self.batch_size // n)
        groups: list[list[Completion]] = []
        devices = [self.policy.device] if self.policy.device.type == "cuda" else []
        with inference(self.policy), self.policy.autocast(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), per_call):
                chunk = prompts[start : start + per_call]
                groups += self._generate(chunk, n, temperature, max_new_tokens)
                if self.progress is not None:
                    self.progress(len(chunk))
        return groups

    def load_weights(self, policy: Policy) -> None:
        """A copy of the policy's weights, where the sampler is not the policy itself."""
        if policy is not self.policy:
            self.policy.copy_weights_from(policy)

    def sleep(self) -> None:
        """There is no memory to leave to anybody."""

    def close(self) -> None:
        """Nothing was started."""

    def _generate(
        self, prompts: Sequence[EncodedPrompt], n: int, temperature: float, max_new_tokens: int
    ) -> list[list[Completion]]:
        model = self.policy.model
        model.model.rope_deltas = None  # left over from an earlier batch of other lengths
        inputs = pad_left(prompts, self.pad_token_id, self.policy.device)
        width = inputs["input_ids"].shape[1]
        sampler = _Sampler(self.policy.banned_V, temperature)
        sequences = model.generate(
            **inputs,
            generation_config=GenerationConfig(
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,  # the sampler applies it, so that log-probs see it too
                num_return_sequences=n,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.eos_token_ids,
                pad_token_id=self.pad_token_id,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )
        logprobs = sampler.logprobs_BT(sequences).tolist()
        tokens = sequences[:, width:].tolist()
        completions = [self._cut(t, lp) for t, lp in zip(tokens, logprobs, strict=True)]
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def _cut(self, tokens: list[int], logprobs: list[float]) -> Completion:
        end = next((i for i, t in enumerate(tokens) if t in self.eos_token_ids), None)
        length = len(tokens) if end is None else end + 1
        return Completion(tokens[:length], logprobs[:length], finished=end is not None)
