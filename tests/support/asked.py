"""Questions to a scorer whose reward functions are the user's own."""

from dataclasses import dataclass, field

from papo_fast.reward_settings import RewardConfig
from papo_fast.rewards.scorer import Scorer

RIGHT = "<think>two</think>\\boxed{2}"
WRONG = "\\boxed{3}"


@dataclass
class Asked:
    problem: str = "How many?"
    images: list = field(default_factory=list)
    columns: dict = field(default_factory=dict)


def scores_of(functions, responses, questions=None, answers=None, **settings):
    config = RewardConfig(functions=tuple(functions), workers=1, **settings)
    with Scorer(config) as scorer:
        found = scorer.score(responses, answers or ["2"] * len(responses), questions)
        return found, scorer, scorer.alarms()
