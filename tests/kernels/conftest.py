"""The torch backend's C++ runs in every test, however small, and its fallback where one asks."""

import pytest

from papo_kernels import cpu_kernels


@pytest.fixture(autouse=True)
def cpp_for_small_calls(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "LEAST_LOGITS", 0)


@pytest.fixture
def without_cpp(monkeypatch):
    """As on a machine without a compiler: torch's operators alone."""
    monkeypatch.setattr(cpu_kernels, "usable", lambda *_: False)
