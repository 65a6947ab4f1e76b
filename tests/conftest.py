"""Settings every test runs under: no network, one thread, the same random numbers each time."""

from __future__ import annotations

import os
import tempfile

import hypothesis
import pytest

import papo_fast  # noqa: F401  mends torchvision before a test imports transformers

# Set before transformers or datasets is imported anywhere; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
_datasets_cache = tempfile.TemporaryDirectory(prefix="papo_fast_tests_")
os.environ["HF_DATASETS_CACHE"] = _datasets_cache.name


# Fresh examples at a developer's desk; the same ones each time where a red test must mean a change.
hypothesis.settings.register_profile("fixed", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("fixed")


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)
