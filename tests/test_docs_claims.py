"""README.md and docs/: presets, limits and the version are those of the code."""

from __future__ import annotations

import re

import pytest

import papo_fast
from papo_fast.data import pictures
from papo_fast.presets import PRESETS
from papo_fast.rewards import answer_check
from papo_fast.setting_bounds import BOUNDS, URL_FORM
from support.doc_pages import PAGES, ROOT, table_rows


def test_the_readme_is_at_most_130_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_the_presets_are_the_tables():
    for name, _, gamma, eta, beta, clip, rollout in table_rows(
        ROOT / "docs" / "reproduce.md", "Settings"
    ):
        config = PRESETS[name.strip("`")][1]
        goal = config.objective
        shown = [float(x) for x in (gamma, eta, eta, beta, *clip.split("/"))]
        assert shown == [
            goal.kl_prcp_coef,
            goal.entropy_coef,
            goal.aug_entropy_coef,
            goal.kl_coef,
            goal.clip_low,
            goal.clip_high,
        ], name
        assert config.rollout.dynamic_filter == ("filter" in rollout)


def test_the_citation_has_the_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", text, re.M)[1].strip('"') == papo_fast.__version__
    assert "2507.06448" in text


LOW, HIGH = BOUNDS["rollout.temperature"]
LIMITS = {
    "the formats of pictures": f"of one of these formats: {', '.join(pictures.FORMATS)}.",
    "the pixels of a picture": f"at most {pictures.MAX_PIXELS:,} pixels.",
    "the temperatures": f"`rollout.temperature` and `eval.temperature` lie between {LOW:g} and "
    f"{HIGH:g}.",
    "the form of a server's URL": f"A server's URL has the form `{URL_FORM}`:",
    "the memory of a reward worker": f"each of which may take {answer_check.MEMORY_LIMIT >> 30} "
    "GiB at most (`--reward.workers`",
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_limit_is_said_once_and_as_the_code_has_it(what):
    words = " ".join(" ".join(page.read_text(encoding="utf-8") for page in PAGES).split())
    assert words.count(LIMITS[what]) == 1
    assert BOUNDS["eval.temperature"] == (LOW, HIGH)
