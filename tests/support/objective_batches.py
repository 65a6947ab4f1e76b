"""Batches of tokens for tests of the objective, in float64, and objectives with every term."""

import dataclasses

import torch

from papo_fast.config import ObjectiveConfig
from papo_fast.token_batch import Denominators, TokenBatch

LENGTHS = (3, 1, 7, 5)
FLOAT_FIELDS = (
    *("logprobs", "old_logprobs", "advantages", "entropy", "aug_logprobs", "aug_entropy"),
    *("kl_prcp", "kl_reverse", "ref_logprobs", "ref_kl", "rollout_weights"),
)
LEAVES = ("logprobs", "entropy", "aug_logprobs", "aug_entropy", "kl_prcp", "kl_reverse", "ref_kl")


def make_batch(lengths=LENGTHS, seed=0, **replaced) -> TokenBatch:
    """float64 vectors; no ratio is near a bound of a clip, where slopes would be undefined."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def uniform(low, high):
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    sign = torch.tensor([1.0, -1.0, -0.5, 2.0], dtype=torch.float64)[: len(lengths)][ids]
    # log-ratios that are inside the clip range, beyond either bound, or beyond the dual clip
    choices = torch.tensor([0.0, 0.11, -0.12, 0.6, -0.7, 1.9], dtype=torch.float64)
    log_ratio = choices[torch.randint(len(choices), (n,), generator=generator)]
    logprobs = uniform(-3.0, -0.1)
    values = {
        "logprobs": logprobs,
        "old_logprobs": logprobs - log_ratio,
        "advantages": sign,
        "sequence_ids": ids + 40,
        "entropy": uniform(0.1, 2.0),
        "aug_logprobs": uniform(-4.0, -0.1),
        "aug_entropy": uniform(0.1, 3.0),
        "kl_prcp": uniform(0.01, 1.0),
        "ref_logprobs": logprobs + uniform(-0.3, 0.3),
        "ref_kl": uniform(0.01, 0.2),
        "correct": torch.tensor([True, False, False, True])[: len(lengths)][ids],
        "rollout_weights": uniform(0.3, 2.0),
        "kl_reverse": uniform(0.01, 1.0),
    }
    return TokenBatch(**(values | replaced))


def part_of(batch: TokenBatch, part: slice) -> dict[str, torch.Tensor]:
    """The vectors of these tokens."""
    vectors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: x[part] for name, x in vectors.items() if x is not None}


def denominators(lengths=LENGTHS, max_new_tokens=9) -> Denominators:
    correct = torch.tensor([True, False, False, True])[: len(lengths)]
    return Denominators.from_lengths(
        torch.tensor(lengths, dtype=torch.int64), max_new_tokens, correct
    )


def everything(**replaced) -> ObjectiveConfig:
    """Every term switched on."""
    values = {
        "kl_coef": 0.3,
        "kl_prcp_coef": 0.2,
        "entropy_coef": 0.07,
        "aug_entropy_coef": 0.05,
        "sft_coef": 0.11,
    }
    if replaced.get("parity") != "official":
        values["aug"] = "trained"
    return ObjectiveConfig(**(values | replaced)).resolved()


EXACT = everything(kl_estimator="exact")
SAMPLED = everything(kl_prcp_estimator="sampled", entropy_estimator="sampled")
PAPER = everything(parity="paper")
REVERSE = everything(kl_prcp_direction="reverse")
