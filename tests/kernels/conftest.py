"""Large calls' ways run in every test, however small its call."""

import pytest
from kernel_oracle import FAST

from papo_kernels import op
from papo_kernels.cpu import library


@pytest.fixture(autouse=True)
def as_in_large_calls(monkeypatch):
    monkeypatch.setattr(library, "LEAST_LOGITS", 0)
    monkeypatch.setattr(op, "DENSE_WEIGHT", -1)  # even without features


@pytest.fixture(autouse=True)
def without_lists(monkeypatch, request):
    """Triton's rows go in groups but in tests of lists, which take an interpreter long."""
    if FAST == "triton" and request.module.__name__ != "test_lists":
        from papo_kernels.triton import lists

        monkeypatch.setattr(lists, "MOST_WORDS", 0)


@pytest.fixture
def without_cpp(monkeypatch):
    """As on a machine without a compiler: torch's operators alone."""
    monkeypatch.setattr(library, "usable", lambda *_: False)
