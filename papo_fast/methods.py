"""Where each preset comes from and what it maximises: `papo-fast presets`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from papo_fast.config import Config, CorruptionConfig
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
    differs: str = ""
    """Where paper and code disagree or something is missing: what the preset does, and how to have
    the other."""


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
PGPO = Method(
    "PGPO",
    "arXiv 2604.01840",
    "DAPO",
    "J with A · w, w by KL(π ‖ π_blind) of the token, of mean 1 in each response",
)
_TOR = "arXiv 2603.25077 and an unofficial implementation"
_TOR_EQUATION = (
    "J with A · (1 on tokens of high entropy, .5 on tokens of high |log π − log π_blind|)"
)
TOR_G = Method("ToR", _TOR, "GRPO", _TOR_EQUATION + " − β KL(π ‖ π_ref)")
TOR_D = Method("ToR", _TOR, "DAPO", _TOR_EQUATION)
CGPO = Method(
    "CGPO",
    "doi 10.1145/3767308.3835969 and its authors' code",
    "GRPO",
    "J with A · (factor of the response on tokens of high KL(π ‖ π_without evidence), 1 on tokens "
    "of high entropy) − β KL(π ‖ π_ref)",
    "boxes of evidence from the data, not from the response; their reward of weight .5 for "
    "consistent boxes is not there, since its formula is not known: name yours in reward.functions",
)
VEPO = Method(
    "VEPO",
    "arXiv 2606.03937 and its authors' code",
    "GRPO",
    "J over the top tokens by [1 − (1 − JSD)^a (1 − |ΔH|)^(1 − a)] H, − η₁ H[π]",
    "noise of standard deviation 2, as the paper says; the released code adds it once for each of "
    "12 responses, which --corruption.noise-std 6.93 does",
)
_DVRP = "arXiv 2601.06801 and an unofficial implementation"
_DVRP_EQUATION = "J + λ₁ KL(π ‖ π_masked) − λ₂ KL(π ‖ π_noised) − λ₃ H[π_masked] − λ₄ H[π_noised]"
DVRP_G = Method("DVRP", _DVRP, "GRPO", _DVRP_EQUATION)
DVRP_D = Method("DVRP", _DVRP, "DAPO", _DVRP_EQUATION)

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
    "pgpo": PGPO,
    "tor-g": TOR_G,
    "tor-d": TOR_D,
    "cgpo": CGPO,
    "vepo-7b": VEPO,
    "dvrp-g": DVRP_G,
    "dvrp-d": DVRP_D,
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
        pairs["corruption"] = _corruptions(config.corruption)
        pairs["terms"] = f"{estimators.kl_prcp_estimator}, corrupted stream {estimators.aug}"
    if goal.weight_names:
        pairs["corruption"] = _corruptions(config.corruption)
        pairs["dependency"] = goal.dependency
    if "vppo" in goal.weight_names:
        pairs["k"] = f"{goal.vppo_top_p:g}"
        pairs["least factor"] = f"{goal.vppo_scaling_min:g}"
    if "pgpo" in goal.weight_names:
        pairs["τ"], pairs["boost"] = goal.pgpo_threshold, goal.pgpo_boost
    if "tor" in goal.weight_names:
        pairs["shares"] = f"{goal.tor_entropy_share:g} and {goal.tor_perception_share:g}"
        pairs["nucleus"] = goal.tor_nucleus
    if "cgpo" in goal.weight_names:
        pairs["shares"] = f"{goal.cgpo_entropy_share:g} and {goal.cgpo_perception_share:g}"
        pairs["scale"] = goal.cgpo_scale
    if "vepo" in goal.weight_names:
        pairs["score"] = f"{goal.vepo_score}, a {goal.vepo_alpha:g}, top {goal.vepo_top_p:g}"
    if goal.has_dvrp_term:
        pairs["λ₁, λ₂"] = f"{goal.dvrp_sensitivity:g}, {goal.dvrp_robustness:g}"
        pairs["λ₃, λ₄"] = f"{goal.dvrp_masked_entropy:g}, {goal.dvrp_noised_entropy:g}"
        pairs["corruption"] = _corruptions(config.corruption)
        pairs["terms"] = f"sampled, corrupted streams {estimators.aug}"
    if rollout.dynamic_filter:
        pairs["filter"] = "groups neither all right nor all wrong"
    said = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in pairs.items()}
    return " · ".join(f"{name} {value}" for name, value in said.items() if value != "0")


def _corruptions(config: CorruptionConfig) -> str:
    """Each view's kind with its numbers."""
    numbers = {
        "patch": f" {config.ratio:g}",
        "official": f" {config.ratio:g}",
        "gaussian": f" {config.noise_std:g}",
        "diffusion": f" step {config.noise_step:g} falling by {config.noise_anneal:g}",
        "blur": f" {config.blur_sigma:g}",
        "evidence": f" filled with {config.box_fill}",
        "control": f" filled with {config.box_fill}",
    }
    return " and ".join(kind + numbers.get(kind, "") for kind in config.kinds)


def print_presets(console: Console) -> None:
    """Each preset with its source, base algorithm, equation and values."""
    for name, (about, config) in PRESETS.items():
        method = METHODS[name]
        console.print(f"[bold]{name}[/bold]  {escape(about)}", soft_wrap=True)
        for label, text in (
            (
                "method",
                method.name if method.name == method.base else f"{method.name} on {method.base}",
            ),
            ("source", method.source),
            ("maximises", method.equation),
            ("values", values_of(config)),
            *([("differs", method.differs)] if method.differs else []),
        ):
            console.print(f"  {label:<10} {escape(text)}", soft_wrap=True)
    console.print(
        "\nEvery value: papo-fast train PRESET --help. What has been shown of each: "
        "docs/evidence.md",
        soft_wrap=True,
    )
