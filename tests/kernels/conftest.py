"""The torch backend's C++ and its search for words run in every test, however small the call."""

import pytest

from papo_kernels import op
from papo_kernels.cpu import library


@pytest.fixture(autouse=True)
def as_in_large_calls(monkeypatch):
    monkeypatch.setattr(library, "LEAST_LOGITS", 0)
    monkeypatch.setattr(op, "DENSE_WEIGHT", -1)  # even without features


@pytest.fixture
def without_cpp(monkeypatch):
    """As on a machine without a compiler: torch's operators alone."""
    monkeypatch.setattr(library, "usable", lambda *_: False)
