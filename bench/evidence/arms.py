"""The arms of the comparison as data: options of `papo-fast train tiny-grpo`, and what is tuned.

`tiny-grpo` is the default job without PAPO's terms. Every arm is that preset plus its words, so an
arm does not change when the preset `tiny` follows the evidence. An arm has four settings that are
tried on development questions; a setting is a few more words. The arms of PAPO try four γ. GRPO and
DAPO have no γ and try four learning rates instead, with as many runs: the learning rate of the
preset was chosen for runs with PAPO's terms, so the baselines get to choose theirs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from papo_fast.config import ObjectiveConfig

PRESET = "tiny-grpo"


@dataclass(frozen=True)
class Setting:
    name: str
    words: tuple[str, ...]


def _gammas(*values: float) -> tuple[Setting, ...]:
    return tuple(Setting(f"gamma-{g:g}", ("--objective.kl-prcp-coef", f"{g:g}")) for g in values)


GAMMAS = _gammas(0.005, 0.01, 0.02, 0.04)
"""Tried by every arm with a perception KL."""
BEYOND = _gammas(0.08, 0.16)
"""The sweep goes on with these, to the collapse. They are never chosen: they are beyond the budget
that every arm has."""
RATES = tuple(
    Setting(f"lr-{lr}", ("--train.lr", lr)) for lr in ("2.5e-4", "3.5e-4", "5e-4", "7e-4")
)
"""Tried by the baselines."""


@dataclass(frozen=True)
class Arm:
    name: str
    says: str
    """What it is, for the tables."""
    words: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = GAMMAS
    beyond: tuple[Setting, ...] = BEYOND
    needs: tuple[str, ...] = ()
    """Fields of `ObjectiveConfig` without which this version of the project cannot run it."""

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        known = {field.name for field in dataclasses.fields(ObjectiveConfig)}
        absent = [f"objective.{name}" for name in self.needs if name not in known]
        return f"this version has no {' and no '.join(absent)}" if absent else None

    def setting(self, name: str) -> Setting:
        return next(s for s in (*self.settings, *self.beyond) if s.name == name)


OFFICIAL = ("--objective.parity", "official")
PAPER = ("--objective.parity", "paper")
CONSTANT = ("--objective.aug", "frozen")
BOTH = ("--objective.aug", "trained")
REVERSE = ("--objective.kl-prcp-direction", "reverse")
CLIP = ("--objective.kl-prcp-clip", "2")
# η of the sampled entropies is the paper's, at which its 3B model did not collapse; exact ones at
# that weight stop the default job from learning (docs/log.md).
SAMPLED = ("--objective.entropy-coef", "0.03", "--objective.aug-entropy-coef", "0.03")
EXACT = ("--objective.entropy-coef", "0.001", "--objective.aug-entropy-coef", "0.001")

BASELINE = "grpo"
BASE_OF_ADDED = "dapo"
"""What the arms of the addendum change, and are compared with."""
DAPO = ("--objective.kl-coef", "0", "--objective.clip-high", "0.28")
_ADDED = (
    Arm(
        "vppo",
        "VPPO on DAPO: advantages stay on the .4 of each response that depend most, k3",
        (
            *DAPO, "--objective.token-weights", "vppo", "--objective.dependency", "sampled-k3",
            "--objective.vppo-top-p", "0.4", "--objective.vppo-scaling-min", "0.9",
            "--corruption.ratio", "0.5",
        ),
        settings=RATES,
        beyond=(),
        needs=("token_weights",),
    ),
    Arm(
        "pgpo",
        "PGPO on DAPO: advantage moves to tokens that depend on the picture, k3",
        (
            *DAPO, "--objective.token-weights", "pgpo", "--objective.dependency", "sampled-k3",
            "--corruption.kind", "attention",
        ),
        settings=RATES,
        beyond=(),
        needs=("token_weights",),
    ),
)  # fmt: skip
ADDED = tuple(arm.name for arm in _ADDED)
"""Arms of the addendum to the protocol. They are corrected among themselves, so that what the other
arms say does not change."""
_WITHOUT_ENTROPIES = (
    Arm("official", "the authors' code: sampled k3, q stored", OFFICIAL),
    Arm("paper", "the printed equations: sampled k3, gradient into q", PAPER),
    Arm(
        "reverse",
        "exact KL(q‖p), q constant",
        (*REVERSE, *CONSTANT),
        needs=("kl_prcp_direction", "aug"),
    ),
    Arm("forward", "exact KL(p‖q), q constant", CONSTANT, needs=("aug",)),
    Arm("both", "exact KL(p‖q), gradient into q", BOTH),
    Arm("both-clip", "the same, clipped at 2 nats", (*BOTH, *CLIP)),
)


def _with_entropies(arm: Arm) -> Arm:
    sampled = arm.name in ("official", "paper")
    return dataclasses.replace(
        arm,
        name=f"{arm.name}-entropy",
        says=f"{arm.says}; double entropy, {'sampled, η .03' if sampled else 'exact, η .001'}",
        words=(*arm.words, *(SAMPLED if sampled else EXACT)),
    )


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(BASELINE, "GRPO", settings=RATES, beyond=()),
        Arm(
            "dapo",
            "DAPO: no reference KL, clip-higher .28",
            DAPO,
            settings=RATES,
            beyond=(),
        ),
        *(a for arm in _WITHOUT_ENTROPIES for a in (arm, _with_entropies(arm))),
        *_ADDED,
    )
}

PAIRS: tuple[tuple[str, str], ...] = (
    *(("reverse", "official"), ("forward", "official"), ("paper", "official")),
    *(("reverse", "forward"), ("both", "forward"), ("both-clip", "forward")),
    *((f"{arm.name}-entropy", arm.name) for arm in _WITHOUT_ENTROPIES),
)
"""Forms that the report compares with one another: an arm, and the one it is compared with."""
