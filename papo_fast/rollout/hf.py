"""Rollout by transformers' own model: runs wherever the model runs, with the policy's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from papo_fast.data.encoded import EncodedPrompt
from papo_fast.model.policy import Policy, inference
from papo_fast.rollout.reserved_cache import branch
from papo_fast.samples import Completion

# Finished responses leave the batch when at most this share of it is still being written: leaving
# copies the keys and values of the rest.
COMPACT_AT = 0.5


class HFRollout:
    """`RolloutEngine` over `Policy`'s own model.

    `generate` of transformers runs a prompt, its pictures included, once for every response, and
    finished responses until the last of the batch ends. Here a prompt runs once and its keys and
    values, and states of linear attention, are copied for its responses, and finished responses
    leave the batch.

    Args:
        policy: its weights are the ones that sample.
        eos_token_ids, pad_token_id: from the prompt encoder.
        batch_size: sequences generated at a time.
    """

    def __init__(
        self,
        policy: Policy,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        batch_size: int,
    ):
        self.policy = policy
        self.eos_token_ids = list(eos_token_ids)
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        n: int,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        advance: Callable[[int], None],
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
                advance(len(chunk))
        return groups

    def load_weights(self, policy: Policy) -> None:
        """A copy of the policy's weights, where the sampler is not the policy itself."""
        if policy is not self.policy:
            self.policy.copy_weights_from(policy)

    @staticmethod
    def prompt_passes(n: int) -> int:
        """Once: `_prefill` copies keys and values."""
        return 1

    def sleep(self) -> None:
        """There is no memory to leave to anybody."""

    def close(self) -> None:
        """Nothing was started."""

    def _generate(
        self, prompts: Sequence[EncodedPrompt], n: int, temperature: float, max_new_tokens: int
    ) -> list[list[Completion]]:
        model, device = self.policy.model, self.policy.device
        hidden_RD, cache, seen_RK, places_R = self._prefill(prompts, n, max_new_tokens)
        count = len(hidden_RD)
        # row r of the batch writes response written_R[r]
        written_R = torch.arange(count, device=device)
        tokens = torch.full((count, max_new_tokens), self.pad_token_id, device=device)
        logprobs = torch.zeros(count, max_new_tokens, device=device)
        writing = torch.ones(count, dtype=torch.bool, device=device)
        eos = torch.tensor(self.eos_token_ids, device=device)
        for t in range(max_new_tokens):
            # the same order as token_stats: (logits + bias) / T
            logits_RV = model.lm_head(hidden_RD).float() + self.policy.banned_V
            logprobs_RV = (logits_RV / temperature).log_softmax(-1)
            drawn_R1 = draw(logprobs_RV)
            tokens[written_R, t] = drawn_R1[:, 0]
            logprobs[written_R, t] = logprobs_RV.gather(1, drawn_R1)[:, 0]
            writing = writing & ~torch.isin(drawn_R1[:, 0], eos)
            left = int(writing.sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if left <= COMPACT_AT * len(written_R):
                keep = writing.nonzero()[:, 0]
                cache.reorder_cache(keep)
                written_R, drawn_R1, seen_RK = written_R[keep], drawn_R1[keep], seen_RK[keep]
                places_R, writing = places_R[keep], writing[keep]
            seen_RK = torch.cat([seen_RK, seen_RK.new_ones(len(written_R), 1)], dim=1)
            hidden_RD = model.model(
                input_ids=drawn_R1,
                attention_mask=seen_RK,
                position_ids=(places_R + t).expand(3, 1, -1).transpose(1, 2),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        pairs = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        completions = [self._cut(*pair) for pair in pairs]
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def _prefill(
        self, prompts: Sequence[EncodedPrompt], n: int, room: int
    ) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
        """Each prompt once, then what a response needs of it, `n` times in turn (R = B n rows).

        Args:
            room: the most tokens of a response.

        Returns:
            The (R, D) hidden states that predict the first token, the keys and values, the (R, K)
            mask of what is a prompt and no padding, and the (R,) position of the first token.
        """
        model, device = self.policy.model.model, self.policy.device
        inputs = pad_left(prompts, self.pad_token_id, device)
        positions = [self.policy.prompt_positions(p) for p in prompts]
        places_3BL = torch.zeros(3, *inputs["input_ids"].shape, dtype=torch.int64)
        for i, place in enumerate(positions):
            places_3BL[:, i, places_3BL.shape[2] - place.shape[1] :] = place
        first = torch.tensor([int(place.max()) + 1 for place in positions], device=device)
        cache = DynamicCache(config=self.policy.model.config.text_config)
        hidden_BD = model(
            **inputs, position_ids=places_3BL.to(device), past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        branch(cache, len(prompts), n, room)
        expanded = [x.repeat_interleave(n, dim=0) for x in (hidden_BD, inputs["attention_mask"])]
        return expanded[0], cache, expanded[1], first.repeat_interleave(n)

    def _cut(self, tokens: list[int], logprobs: list[float]) -> Completion:
        end = next((i for i, t in enumerate(tokens) if t in self.eos_token_ids), None)
        length = len(tokens) if end is None else end + 1
        return Completion(tokens[:length], logprobs[:length], finished=end is not None)


def draw(logprobs_RV: Tensor) -> Tensor:
    """(R, 1) int64 words drawn with these probabilities, from torch's generator of the device.

    By inversion, with one random number for a row. `torch.multinomial` draws one for each word,
    which takes longer than the layers of a small model.
    """
    sums_RV = logprobs_RV.exp().double().cumsum(-1)
    total_R1 = sums_RV[:, -1:]
    points_R1 = torch.rand_like(total_R1) * total_R1
    return torch.searchsorted(sums_RV, points_R1, right=True).clamp_(max=sums_RV.shape[1] - 1)


def pad_left(
    prompts: Sequence[EncodedPrompt], pad_token_id: int, device: torch.device
) -> dict[str, Tensor]:
    """Inputs of `generate`: B prompts padded on the left to one length, and their pictures."""
    width = max(len(p) for p in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    # Qwen2.5-VL computes wrong positions, silently, where this is missing
    token_types = torch.zeros_like(input_ids)
    for i, p in enumerate(prompts):
        start = width - len(p)
        input_ids[i, start:] = p.input_ids
        attention_mask[i, start:] = 1
        token_types[i, start:] = p.mm_token_type_ids
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": token_types,
    }
    pictures = [p for p in prompts if p.has_pictures]
    if pictures:
        inputs["pixel_values"] = torch.cat([p.pixel_values for p in pictures])
        inputs["image_grid_thw"] = torch.cat([p.image_grid_thw for p in pictures])
    return {name: value.to(device) for name, value in inputs.items()}
