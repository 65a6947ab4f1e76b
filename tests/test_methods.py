"""`papo-fast presets`: every preset with where it comes from, and the values that it has."""

from __future__ import annotations

import math
import re

from papo_fast.cli import main
from papo_fast.methods import METHODS, values_of
from papo_fast.presets import PRESETS


def test_every_preset_has_a_method_and_is_listed(capsys):
    assert set(METHODS) == set(PRESETS)
    assert main(["presets"]) == 0
    said = capsys.readouterr().out
    blocks = dict(re.findall(r"^(\S+)  .*\n((?:  .*\n)+)", said, re.M))
    assert set(blocks) == set(PRESETS)
    assert "VPPO on DAPO" in blocks["vppo-7b"] and "arXiv 2510.09285" in blocks["vppo-7b"]
    assert "γ KL(π ‖ π_corrupted)" in blocks["papo-d"] and "γ" not in blocks["grpo"]
    # where paper and code disagree, which of them a preset is, and how to have the other
    assert "noise of standard deviation 2, as the paper says" in blocks["vepo-7b"]
    assert "--corruption.noise-std 6.93" in blocks["vepo-7b"]
    assert math.isclose(6.93, 2 * math.sqrt(PRESETS["vepo-7b"][1].rollout.group_size), abs_tol=0.01)
    assert "weight .5" in blocks["cgpo"] and "differs" not in blocks["grpo"]


def test_the_values_are_the_papers():
    assert values_of(PRESETS["papo-g-7b"][1]) == (
        "γ 0.02 · η₁ 0.05 · η₂ 0.05 · β 0.01 · clip 0.2/0.3 · G 5 · questions 384, 3 update(s) · "
        "lr 1e-06 · corruption patch 0.6 · terms sampled, corrupted stream stored"
    )
    assert "β" not in values_of(PRESETS["dapo"][1]) and "γ" not in values_of(PRESETS["dapo"][1])
    # arXiv 2604.01840, 2603.25077, 2606.03937, 2601.06801; doi 10.1145/3767308.3835969
    assert values_of(PRESETS["pgpo"][1]) == (
        "clip 0.2/0.28 · G 5 · questions 384, 3 update(s) · lr 1e-06 · corruption attention · "
        "dependency sampled-k3 · τ 0.4 · boost 2 · filter groups neither all right nor all wrong"
    )
    assert values_of(PRESETS["tor-g"][1]) == (
        "β 0.01 · clip 0.2/0.2 · G 12 · questions 512, 4 update(s) · lr 1e-06 · corruption "
        "attention · dependency sampled-k1 · shares 0.3 and 0.3 · nucleus 0.95"
    )
    assert values_of(PRESETS["cgpo"][1]) == (
        "β 0.04 · clip 0.2/0.2 · G 8 · questions 384, 3 update(s) · lr 1e-06 · corruption "
        "evidence filled with mean · dependency sampled-k3 · shares 0.3 and 0.3 · scale 0.1"
    )
    assert values_of(PRESETS["vepo-7b"][1]) == (
        "η₁ -0.001 · clip 0.2/0.2 · G 12 · questions 512, 2 update(s) · lr 1e-06 · corruption "
        "gaussian 2 · dependency exact · score D, a 0.7, top 0.2"
    )
    assert values_of(PRESETS["dvrp-g"][1]) == (
        "clip 0.2/0.3 · G 5 · questions 384, 3 update(s) · lr 1e-06 · λ₁, λ₂ 0.01, 0.01 · "
        "λ₃, λ₄ 0.05, 0.05 · corruption patch 0.6 and diffusion step 500 falling by 10 · "
        "terms sampled, corrupted streams stored"
    )
    assert "k 0.4 · least factor 0.9" in values_of(PRESETS["vppo-7b"][1])


def test_bases_are_those_of_the_papers():
    """No reference model but in GRPO with β, DAPO's filter with its clip alone, no dual clip in
    VEPO, whose vision tower is frozen."""
    of = {name: config for name, (_, config) in PRESETS.items()}
    for name in ("pgpo", "tor-d", "dvrp-d", "vppo-7b"):
        goal, rollout = of[name].objective, of[name].rollout
        assert (goal.clip_low, goal.clip_high, goal.kl_coef) == (0.2, 0.28, 0)
        assert rollout.dynamic_filter and METHODS[name].base == "DAPO"
    for name in ("tor-g", "cgpo", "vepo-7b", "dvrp-g"):
        assert not of[name].rollout.dynamic_filter and METHODS[name].base == "GRPO"
    assert of["vepo-7b"].objective.clip_dual is None and of["pgpo"].objective.clip_dual == 3
    assert not of["vepo-7b"].model.train_vision and of["pgpo"].model.train_vision
    assert of["vepo-7b"].objective.resolved().entropy_estimator == "exact"
    for name in ("pgpo", "tor-g", "cgpo", "vepo-7b", "dvrp-g"):
        assert of[name].objective.kl_prcp_coef == 0 and of[name].train.checkpoint_every


def test_presets_take_no_options(capsys):
    assert main(["presets", "tiny"]) == 2
    assert "presets takes no options" in capsys.readouterr().err
