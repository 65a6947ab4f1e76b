"""The metrics log, the means over micro-batches and the collapse alarms."""

import json
import math
import random
from itertools import pairwise

import pytest
import torch

from papo_fast.errors import InputError
from papo_fast.run.alarms import CollapseMonitor, mismatch_alarm
from papo_fast.run.hack_alarms import HackMonitor, StandstillMonitor
from papo_fast.run.metrics import MetricsLog, read_json_lines, read_metrics

ROW = {
    "step": 1,
    "reward": 0.1 + 0.2,
    "alarms": ["γ too high: “0.04”"],
    "clip_fraction_low": 1e-300,
}


def test_log_gives_back_the_rows_it_was_given(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append(ROW)
        log.append({"step": 2})
    assert read_metrics(path) == ([ROW, {"step": 2}], None)


def test_every_row_can_be_read_while_the_log_is_open(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step})
        assert read_metrics(log.path)[0][-1] == {"step": step}
    log.close()


def test_values_without_a_json_number_become_null(tmp_path):
    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    row = {"a": math.nan, "b": math.inf, "c": [-math.inf, 1.0], "d": torch.tensor(0.5), "e": None}
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append(row)
    line = log.path.read_text()
    read = json.loads(line, parse_constant=no_constants)
    assert read == {"a": None, "b": None, "c": [None, 1.0], "d": 0.5, "e": None}


def test_log_of_another_run_is_not_continued_by_accident(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="already holds the metrics"):
        MetricsLog(path)
    assert path.read_text() == '{"step": 1}\n'
    with MetricsLog(path, resume=True) as log:
        log.append({"step": 2})
    assert [row["step"] for row in read_metrics(path)[0]] == [1, 2]


@pytest.mark.parametrize("cut", range(1, len('{"step": 3, "note": "γ"}'.encode())))
def test_torn_last_line_is_left_out_and_reported(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + '{"step": 3, "note": "γ"}'.encode()[:cut])
    rows, note = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert "line 3 was cut short" in note
    with MetricsLog(path, resume=True) as log:  # and resuming does not bury it in the middle
        log.append({"step": 4})
    assert path.read_bytes() == whole + b'{"step": 4}\n'


def test_resume_after_a_last_line_without_newline_keeps_that_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with MetricsLog(path, resume=True) as log:
        log.append({"step": 3})
    assert [row["step"] for row in read_metrics(path)[0]] == [1, 2, 3]


@pytest.mark.parametrize("damage", ['{"step": 2', "[2]", "null", "{'step': 2}"])
def test_damage_elsewhere_is_an_error_that_names_the_line(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match="line 2") as error:
        read_json_lines(path)
    assert damage in str(error.value)


def test_missing_log_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def healthy(rng: random.Random, steps: int, noise: float):
    """Reward saturates, KL grows up to twentyfold, entropies go down and up, all noisy."""
    first, last, pace = rng.uniform(0.05, 0.5), rng.uniform(0.1, 9), rng.uniform(5, 40)
    drift = 0.0
    for step in range(1, steps + 1):
        drift = 0.9 * drift + rng.gauss(0, noise / 4)
        up = 1 - math.exp(-step / pace)
        yield {
            "step": step,
            "reward": 0.42 + 0.35 * up + drift + rng.gauss(0, noise),
            "kl_prcp": (first + (last - first) * up) * rng.lognormvariate(0, 0.2),
            "clip_fraction_high": rng.choice((0.003, 0.006, rng.random() * 0.02)),
            "entropy": (0.8 - 0.5 * up) * rng.lognormvariate(0, 0.15),
            "aug_entropy": (0.6 + 0.5 * up) * rng.lognormvariate(0, 0.2),
            "kl_prcp_coef": 0.04,
        }


def alarms_of(rows) -> list[tuple[int, str]]:
    monitor = CollapseMonitor()
    return [(row["step"], alarm) for row in rows for alarm in monitor.update(row)]


@pytest.mark.parametrize("noise", [0.02, 0.06, 0.12])
def test_healthy_runs_set_off_no_alarm(noise):
    for seed in range(60):
        found = alarms_of(healthy(random.Random(seed), 150, noise))
        assert not found, (seed, found)


def collapsing(rng: random.Random, onset: int, pace: float, signs: set[str]):
    for row in healthy(rng, onset + 40, 0.06):
        late = max(0, row["step"] - onset) / pace
        if "perception KL" in signs:
            row["kl_prcp"] *= math.exp(min(late, 3))
            row["reward"] -= 0.5 * min(1, late / 2)
        if "tokens clipped" in signs:
            row["clip_fraction_high"] += 0.02 * late
        if "both entropies" in signs:
            row["entropy"] += 0.5 * late
            row["aug_entropy"] += 0.5 * late
        yield row


@pytest.mark.parametrize("sign", ["perception KL", "tokens clipped", "both entropies"])
@pytest.mark.parametrize("pace", [4, 10])
def test_each_collapse_sign_alone_sets_off_its_own_alarm(sign, pace):
    for seed in range(40):
        found = alarms_of(collapsing(random.Random(seed), 40, pace, {sign}))
        assert found, f"silent at seed {seed}"
        assert all(alarm.startswith(sign) for _, alarm in found)
        assert 40 < found[0][0] <= 40 + 2.5 * pace + 6, (seed, found[0])


def test_an_early_collapse_is_seen_once_the_warm_up_is_over():
    found = alarms_of(collapsing(random.Random(0), 8, 4, {"perception KL"}))
    assert 16 <= found[0][0] <= 20


def ramp(**changes):
    """Fifteen calm steps, then each named metric moves by `change` a step."""
    for step in range(1, 41):
        late = max(0, step - 15)
        row = {"reward": 0.7, "kl_prcp": 0.4, "entropy": 0.3, "aug_entropy": 0.3, "step": step}
        row |= {"clip_fraction_high": 0.002, "kl_prcp_coef": 0.04}
        yield row | {key: row[key] + change * late for key, change in changes.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_prcp": 0.2, "reward": 0.01},  # KL up, reward up: the method at work
        {"reward": -0.02},  # reward down alone
        {"kl_prcp": 0.2},
        {"entropy": 0.05},
        {"aug_entropy": 0.05},
        {"clip_fraction_high": 0.0004},  # up sevenfold, and still next to nothing
    ],
)
def test_one_half_of_a_sign_is_no_alarm(changes):
    assert alarms_of(ramp(**changes)) == []


def test_alarm_says_the_numbers_and_what_to_try():
    step, alarm = alarms_of(ramp(kl_prcp=0.2, reward=-0.02))[0]
    rows = list(ramp(kl_prcp=0.2, reward=-0.02))
    now = sum(row["kl_prcp"] for row in rows[step - 5 : step]) / 5
    assert f"rose from 0.4 to {now:.3g}" in alarm
    assert "objective.kl_prcp_coef (now 0.04)" in alarm
    assert "objective.aug_entropy_coef" in alarm and "objective.entropy_coef" in alarm


def test_alarms_do_not_repeat_at_every_step_and_advise_once():
    found = alarms_of(ramp(kl_prcp=0.2, reward=-0.02))
    steps = [step for step, _ in found]
    assert len(found) >= 2
    assert all(b - a > 10 for a, b in pairwise(steps))
    assert ["Try" in alarm for _, alarm in found] == [True] + [False] * (len(found) - 1)


def test_without_a_perception_term_the_advice_is_another():
    rows = [row | {"kl_prcp_coef": 0.0} for row in ramp(entropy=0.05, aug_entropy=0.05)]
    alarm = alarms_of(rows)[0][1]
    assert "kl_prcp_coef" not in alarm and "train.lr" in alarm


def test_rows_without_a_value_are_passed_over():
    rows = []
    for row in ramp(kl_prcp=0.2, reward=-0.02):
        rows += [
            row,
            {"step": row["step"]},
            {"step": row["step"], "kl_prcp": math.nan, "reward": 1},
        ]
    assert alarms_of(rows) == alarms_of(ramp(kl_prcp=0.2, reward=-0.02))


def test_a_single_spike_is_no_alarm():
    rows = list(ramp())
    rows[30] |= {"kl_prcp": 40.0, "reward": 0.0, "entropy": 9.0, "aug_entropy": 9.0}
    rows[30] |= {"clip_fraction_high": 0.5}
    assert alarms_of(rows) == []


def test_a_sampler_that_is_not_the_policy_is_named_and_rounding_is_not():
    assert mismatch_alarm({}) == mismatch_alarm({"sampler_mismatch": 0.05}) == []
    (alarm,) = mismatch_alarm({"sampler_mismatch": 0.7})
    assert "0.7 nats" in alarm and "--rollout.engine hf" in alarm


def hacked(steps=60, kl=21.0, aug_entropy=0.0, start=8):
    """What the perception KL of the larger presets did to the default job: reward and all else are
    as they should be, and the policy has learned what a black patch is."""
    for step in range(1, steps + 1):
        share = min(1.0, max(0, step - start) / 20)
        yield {
            "step": step,
            "reward": 0.4 + 0.005 * step,
            "kl_prcp": 0.8 + share * (kl - 0.8),
            "aug_entropy": 1.2 + share * (aug_entropy - 1.2),
            "kl_prcp_coef": 0.02,
        }


def said(monitor, rows):
    return [(row["step"], alarm) for row in rows for alarm in monitor.update(row)]


def test_a_hacked_perception_kl_is_seen_while_the_reward_rises():
    assert alarms_of(hacked()) == []
    found = said(HackMonitor(), hacked())
    certain = [(step, alarm) for step, alarm in found if "certain of something else" in alarm]
    beyond = [(step, alarm) for step, alarm in found if "more than 5" in alarm]
    assert 28 <= certain[0][0] <= 33  # the entropy is near 0 from step 28 on
    assert 12 <= beyond[0][0] <= 18  # the KL passes 5 nats in step 13
    assert "from 1.2 to" in certain[0][1]
    assert ["objective.kl_prcp_coef (now 0.02)" in alarm for _, alarm in found] == [
        True,
        *[False] * (len(found) - 1),
    ]


def test_one_half_of_the_hack_is_no_alarm():
    assert said(HackMonitor(), hacked(kl=3.5, aug_entropy=1.5)) == []  # it looks, and is unsure
    assert said(HackMonitor(), hacked(kl=0.9, aug_entropy=0.0)) == []  # it is sure, of the same
    rows = [{"step": i, "reward": 0.5, "kl_prcp": None} for i in range(40)]
    assert said(HackMonitor(), rows) == []


def test_a_kl_beyond_its_bound_needs_no_entropy():
    rows = [row | {"aug_entropy": None} for row in hacked()]
    found = said(HackMonitor(), rows)
    assert found and all("more than 5" in alarm for _, alarm in found)


def test_a_clipped_kl_that_every_token_has_reached_is_named():
    rows = list(hacked(kl=1.9, aug_entropy=1.2))
    assert said(HackMonitor(kl_clip=None), rows) == []
    (step, alarm), *_ = said(HackMonitor(kl_clip=2.0), rows)
    assert step >= 26 and "at most 2 that objective.kl_prcp_clip" in alarm


def test_a_hack_is_said_again_only_after_forty_steps():
    steps = [step for step, alarm in said(HackMonitor(), hacked(200)) if "more than 5" in alarm]
    assert len(steps) >= 4
    assert all(b - a == 40 for a, b in pairwise(steps))


def test_a_run_without_two_different_rewards_says_so_and_shows_a_response():
    monitor, long = StandstillMonitor(), "x" * 500
    row = {"groups_differ": 0.0, "reward": 0.1, "accuracy": 0.0, "truncated": 0.5}
    assert monitor.update(row, "a") == monitor.update(row, "b") == []
    (alarm,) = monitor.update(row, "what it [says]")
    assert "reward 0.1" in alarm and "learns nothing" in alarm and "'what it [says]'" in alarm
    assert [bool(monitor.update(row, long)) for _ in range(20)] == [False] * 19 + [True]
    assert monitor.update(row | {"groups_differ": 0.2}) == []
    solved = row | {"reward": 1.0, "accuracy": 1.0}
    (alarm,) = (a for _ in range(3) for a in monitor.update(solved, long))
    assert "solved" in alarm and len(alarm) < 500


def test_a_run_whose_responses_never_end_says_so():
    monitor = StandstillMonitor()
    row = {"groups_differ": 0.5, "truncated": 1.0}
    found = [a for _ in range(3) for a in monitor.update(row, "and on and on")]
    assert ["rollout.max_new_tokens" in alarm for alarm in found] == [True]
    # rows of a run that did not measure it
    assert [a for _ in range(5) for a in StandstillMonitor().update({"reward": 0.1})] == []
