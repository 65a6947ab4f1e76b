"""Where each preset comes from and what it maximises: `papo-fast presets`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from papo_fast.config import Config
from papo_fast.presets import PRESETS


@dataclass(frozen=True)
class Method:
    """Of one or several presets."""

    name: str
    source: str
    base: str
    """The algorithm that it changes."""
    equation: str
    """What is maximised; J is the clipped policy objective of the base."""


_PAPO = "arXiv 2507.06448 and its authors' code"
_PAPO_EQUATION = "J + γ KL(π ‖ π_corrupted) − η₁ H[π] − η₂ H[π_corrupted] − β KL(π ‖ π_ref)"
PAPO_G = Method("PAPO-G", _PAPO, "GRPO", _PAPO_EQUATION)
PAPO_D = Method("PAPO-D", _PAPO, "DAPO", _PAPO_EQUATION)
GRPO = Method("GRPO", "arXiv 2402.03300; values of PAPO's baseline", "GRPO", "J − β KL(π ‖ π_ref)")
DAPO = Method("DAPO", "arXiv 2503.14476; values of PAPO's baseline", "DAPO", "J")
VPPO = Method(
    "VPPO",
    "arXiv 2510.09285 and its authors' script for 7B",
    "DAPO",
    "J with A · mask(top k of KL(π ‖ π_corrupted)) · factor of the response, − η₁ H[π]",
)

METHODS: dict[str, Method] = {
    "tiny": PAPO_G,
    "tiny-grpo": GRPO,
    "papo-g-3b": PAPO_G,
    "papo-g-7b": PAPO_G,
    "papo-d": PAPO_D,
    "papo-g-noref": PAPO_G,
    "papo-qwen3-2b": PAPO_G,
    "grpo": GRPO,
    "dapo": DAPO,
    "vppo-7b": VPPO,
}
"""Preset → its method."""


def values_of(config: Config) -> str:
    """What a preset sets of its method's numbers, in one line."""
    goal, rollout, train = config.objective, config.rollout, config.train
    estimators = goal.resolved()
    pairs = {
        "γ": goal.kl_prcp_coef,
        "η₁": goal.entropy_coef,
        "η₂": goal.aug_entropy_coef,
        "β": goal.kl_coef,
        "clip": f"{goal.clip_low:g}/{goal.clip_high:g}",
        "G": rollout.group_size,
        "questions": f"{rollout.prompts}, {config.updates_per_rollout} update(s)",
        "lr": f"{train.lr:g}",
    }
    if goal.kl_prcp_coef or goal.aug_entropy_coef:
        pairs["corruption"] = f"{config.corruption.kind} {config.corruption.ratio:g}"
        pairs["terms"] = f"{estimators.kl_prcp_estimator}, corrupted stream {estimators.aug}"
    if goal.weight_names:
        pairs["corruption"] = f"{config.corruption.kind} {config.corruption.ratio:g}"
        pairs["dependency"] = goal.dependency
    if "vppo" in goal.weight_names:
        pairs["k"] = f"{goal.vppo_top_p:g}"
        pairs["least factor"] = f"{goal.vppo_scaling_min:g}"
    if rollout.dynamic_filter:
        pairs["filter"] = "groups neither all right nor all wrong"
    said = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in pairs.items()}
    return " · ".join(f"{name} {value}" for name, value in said.items() if value != "0")


def print_presets(console: Console) -> None:
    """Each preset with its source, base algorithm, equation and values."""
    for name, (about, config) in PRESETS.items():
        method = METHODS[name]
        console.print(f"[bold]{name}[/bold]  {escape(about)}", soft_wrap=True)
        for label, text in (
            ("method", f"{method.name} on {method.base}"),
            ("source", method.source),
            ("maximises", method.equation),
            ("values", values_of(config)),
        ):
            console.print(f"  {label:<10} {escape(text)}", soft_wrap=True)
    console.print(
        "\nEvery value: papo-fast train PRESET --help. What has been shown of each: "
        "docs/evidence.md",
        soft_wrap=True,
    )
