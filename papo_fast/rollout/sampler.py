"""Prompts to groups of scored responses, for training and for evaluation alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from papo_fast.data.encoder import PromptEncoder
from papo_fast.data.prompts import Prompt
from papo_fast.parallel import gather_in_order, share_of
from papo_fast.rewards.scorer import Scorer
from papo_fast.rollout.protocol import RolloutEngine
from papo_fast.samples import Group, Sample


class Sampler:
    """An engine, a decoder and a scorer in a row. Each rank does its share; all get everything."""

    def __init__(self, engine: RolloutEngine, encoder: PromptEncoder, scorer: Scorer):
        self.engine = engine
        self.encoder = encoder
        self.scorer = scorer
        scorer.prompt_end = encoder.prompt_end

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        advance: Callable[[int], None],
    ) -> list[Group]:
        """A group of `n` scored samples for each prompt.

        Args:
            seed: of this rank's draws; ranks should differ in it.
            advance: called with the number of this rank's prompts done since the last call.
        """
        mine = [prompts[i] for i in share_of(prompts)]
        drawn = self.engine.generate(
            [prompt.encoded for prompt in mine],
            n,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            advance=advance,
        )
        samples = [
            [Sample(completion, self.encoder.decode(completion.token_ids)) for completion in group]
            for group in drawn
        ]
        flat = [sample for group in samples for sample in group]
        asked = [prompt for prompt in mine for _ in range(n)]
        texts, answers = [s.text for s in flat], [prompt.answer for prompt in asked]
        for sample, score in zip(flat, self.scorer.score(texts, answers, asked), strict=True):
            sample.score = score
        everybodys = gather_in_order(samples, len(prompts))
        return [Group(p, group) for p, group in zip(prompts, everybodys, strict=True)]
