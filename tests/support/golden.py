"""What the authors' functions returned, and our configuration of each case.

`data/official_papo.json` holds 12 configurations, each with (B, L) inputs in float32.
`data/official_options.json` holds what their `update_policy` (MikeWangWZHL/PAPO, commit fb63bf4)
did with options and responses that the first file lacks: the loss of `micro` responses at a time,
added up over the batch, and its gradient. `discount` is the annealed share of γ.
"""

import json

import torch

from papo_fast.config import ObjectiveConfig
from support import TESTS

GOLDEN = json.loads((TESTS / "data" / "official_papo.json").read_text())
OPTIONS = json.loads((TESTS / "data" / "official_options.json").read_text())
PENALTY = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "abs": "abs"}
AVERAGE = {"token": "token", "seq": "sequence"}
TOLERANCE = 1e-5


def official_config(config: dict) -> ObjectiveConfig:
    return ObjectiveConfig(
        parity="official",
        clip_low=config["clip_low"],
        clip_high=config["clip_high"],
        clip_dual=config["clip_dual"],
        kl_coef=config["kl_coef"],
        kl_penalty=PENALTY[config["kl_penalty"]],
        kl_prcp_coef=config["kl_prcp_coef"],
        kl_prcp_penalty=PENALTY[config["kl_prcp_penalty"]],
        kl_prcp_top_p=config.get("top_p"),
        kl_prcp_clip=config.get("kl_prcp_clip"),
        entropy_coef=config["ori_entropy_coef"],
        aug_entropy_coef=config["aug_entropy_coef"],
        aug="trained" if config.get("aug_grad") else None,  # None: the parity's own, no gradient
        average=AVERAGE[config["avg"]],
        sft_coef=config.get("sft_coef", 0.0),
    ).resolved()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Worst element's error, relative to that element; zeros must be zeros."""
    exact = ours == theirs
    return torch.where(exact, 0.0, (ours - theirs).abs() / theirs.abs()).max().item()
