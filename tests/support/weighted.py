"""What token weights read, in float64, and objectives whose weights stand in a file."""

import torch

from papo_fast.config import ObjectiveConfig
from papo_fast.dependency import WeightBatch

LENGTHS = (5, 1, 7)


def seen(**replaced) -> WeightBatch:
    """Float64 vectors of three responses."""
    n, generator = sum(LENGTHS), torch.Generator().manual_seed(1)
    random = [torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(8)]
    values = {
        "logprobs": -3 * random[0],
        "old_logprobs": -3 * random[0],
        "advantages": random[1] - 0.5,
        "sequence_ids": torch.arange(3).repeat_interleave(torch.tensor(LENGTHS)),
        "entropy": random[2],
        "aug_logprobs": -3 * random[3],
        "aug_entropy": random[4],
        "kl_prcp": random[5],
        "dependency": random[5],
        "js_divergence": 0.5 * random[6],
        "nucleus_entropy": random[7],
    }
    return WeightBatch(**(values | replaced))


def weighted_by(tmp_path, body: str, name: str = "mine", **fields) -> ObjectiveConfig:
    file = tmp_path / "my_weights.py"
    file.write_text(body)
    return ObjectiveConfig(token_weights=f"{file}:{name}", **fields)
