"""Our settings for those of other methods' code, and errors against what it returned."""

from papo_fast.config import ObjectiveConfig
from support.family import TOLERANCE

WORST: dict[str, tuple[float, str]] = {}
"""{method: (error, where)} of the test file that runs."""


def hold(method: str, case: dict, errors: dict[str, float]) -> None:
    """All within the tolerance; the worst of each method is printed when the file is done."""
    assert errors
    worst = max(errors, key=errors.get)
    where = f"{case['setting']} {case['batch']} {worst}"
    WORST[method] = max(WORST.get(method, (0.0, "")), (errors[worst], where))
    assert errors[worst] <= TOLERANCE, errors


def goal(clip=(0.2, 0.2), **fields) -> ObjectiveConfig:
    """Their policy loss, and whatever terms the fields turn on, sampled as in official parity."""
    of_theirs = {"parity": "official", "average_over": "global", "average": "token"}
    fields = of_theirs | {"kl_coef": 0.0, "kl_prcp_coef": 0.0} | fields
    low, high = clip
    return ObjectiveConfig(clip_low=low, clip_high=high, **fields).resolved()


def averages(mode: str) -> str:
    return {"token": "token", "seq": "sequence"}[mode]


def tie(out: dict, prefix: str = "") -> bool:
    return any(key.startswith(prefix) and "tie" in key for key in out)


def peer_goal(setting: dict, **fields) -> ObjectiveConfig:
    """Its settings; its entropies are averaged as its policy loss is, which is not the authors'."""
    actor, loss = setting.get("actor", {}), setting["loss"]
    return goal(
        (actor.get("clip_ratio_low", 0.2), actor.get("clip_ratio_high", 0.2)),
        parity="paper",
        average=averages(actor.get("loss_avg_mode", "token")),
        entropy_coef=loss.get("invariant_entropy_coef", 0.0),
        entropy_estimator={"sampled": "sampled", "full": "exact"}[
            loss.get("entropy_loss_type", "sampled")
        ],
        **fields,
    )
