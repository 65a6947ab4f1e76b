"""Settings every test runs under: no network, one thread, the same random numbers each time."""

from __future__ import annotations

import os
import tempfile

import hypothesis
import pytest

# Where torch is a CPU build, torchvision has to be mended before a test imports transformers.
from papo_fast.rollout.vllm_on_cpu import sitecustomize  # noqa: F401

# Set before transformers or datasets is imported anywhere; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
_datasets_cache = tempfile.TemporaryDirectory(prefix="papo_fast_tests_")
os.environ["HF_DATASETS_CACHE"] = _datasets_cache.name


# Without limits of time: a busy machine is no failure. Fresh examples at a developer's desk; the
# same ones each time where a red test must mean a change.
_patient = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("desk", _patient)
hypothesis.settings.register_profile("fixed", _patient, derandomize=True)
hypothesis.settings.load_profile("fixed" if os.environ.get("CI") else "desk")


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A tiny checkpoint of each family, by its name."""
    from support.family_checkpoints import FAMILIES, write_checkpoint

    folder = tmp_path_factory.mktemp("families")
    return {family: write_checkpoint(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Writes the tiny checkpoint of a family of the plain path when its name is first asked for."""
    from support.plain_checkpoints import write_plain_checkpoint

    folder = tmp_path_factory.mktemp("plain")
    made = {}

    def of(name):
        if name not in made:
            made[name] = write_plain_checkpoint(folder / name, name)
        return made[name]

    return of


@pytest.fixture
def qwen25(tmp_path):
    """A folder with all of a tiny Qwen2.5-VL but its weights."""
    from support.family_checkpoints import write_processor_files

    return write_processor_files(tmp_path, "qwen2_5_vl")


@pytest.fixture
def questions(tmp_path):
    """A file of twelve rows: one image, two images, text only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from support.small_runs import png

    rows = [
        {
            "problem": ["What?", "<image> or <image>?", "No picture."][i % 3],
            "answer": str(i),
            "images": [png(i), png(i + 50, (90, 60))][: (1, 2, 0)[i % 3]],
        }
        for i in range(12)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


@pytest.fixture(scope="module")
def cpu_time_alone_is_limited():
    """On a busy machine a second of CPU time can take longer than the clock's own limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("papo_fast.rewards.scorer.WALL_FACTOR", 600.0)
        yield


@pytest.fixture(scope="module")
def scorer(cpu_time_alone_is_limited):
    from papo_fast.config import RewardConfig
    from papo_fast.rewards.scorer import Scorer
    from support.scoring import LIMIT

    with Scorer(RewardConfig(timeout=LIMIT, workers=2)) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def sizes():
    """Sizes of the published models that plans are tested with, by name."""
    from papo_fast.config import ModelConfig
    from papo_fast.planning.sizes import ModelSizes
    from support.planned import CONFIGS, PUBLISHED

    return {
        name: ModelSizes.of(ModelConfig(path=str(CONFIGS / f"{name}.json"))) for name in PUBLISHED
    }


@pytest.fixture(scope="module")
def worst_errors():
    """Prints the worst error of each method of `data/family.json` when the file is done."""
    from support.family_errors import WORST

    WORST.clear()
    yield
    for method, (worst, where) in sorted(WORST.items()):
        print(f"\n{method:20s} worst relative error {worst:.1e} ({where})", end="")
