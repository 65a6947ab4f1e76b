"""The torch backend's C++ runs in every test, however small, and its fallback where one asks."""

import pytest

from papo_kernels.cpu import library


@pytest.fixture(autouse=True)
def cpp_for_small_calls(monkeypatch):
    monkeypatch.setattr(library, "LEAST_LOGITS", 0)


@pytest.fixture
def without_cpp(monkeypatch):
    """As on a machine without a compiler: torch's operators alone."""
    monkeypatch.setattr(library, "usable", lambda *_: False)
