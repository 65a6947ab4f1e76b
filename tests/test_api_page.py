"""docs/api.md is what docs/make_api.py makes of the sources."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(make_api):
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), (
        "run: python docs/make_api.py"
    )


def test_the_page_has_what_users_call(make_api):
    text = make_api.page()
    for name in (
        "token_stats(",
        "class PAPOTrainer",
        "papo_loss(",
        "use_token_stats(",
        "objective(",
    ):
        assert name in text
    assert "#### `TokenBatch.lengths: Tensor`" in text  # a property is not called
    # an argument's explanation is there, and a field's
    assert "- `hidden`: (N, D) floating" in text
    assert (
        "- `corruption_ratio: float = 0.6`: Share of an image's patches that turns black." in text
    )
