"""`papo-fast presets`: every preset with where it comes from, and the values that it has."""

from __future__ import annotations

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


def test_the_values_are_the_papers():
    assert values_of(PRESETS["papo-g-7b"][1]) == (
        "γ 0.02 · η₁ 0.05 · η₂ 0.05 · β 0.01 · clip 0.2/0.3 · G 5 · questions 384, 3 update(s) · "
        "lr 1e-06 · corruption patch 0.6 · terms sampled, corrupted stream stored"
    )
    assert "β" not in values_of(PRESETS["dapo"][1]) and "γ" not in values_of(PRESETS["dapo"][1])
    assert "k 0.4 · least factor 0.9" in values_of(PRESETS["vppo-7b"][1])


def test_presets_take_no_options(capsys):
    assert main(["presets", "tiny"]) == 2
    assert "presets takes no options" in capsys.readouterr().err
