"""What rows are read with: a folder of pictures, an encoder, and a table of seven rows."""

import numpy as np
import pytest
from PIL import Image

from papo_fast.data.encoder import PromptEncoder
from support.data_rows import CONFIG, ROWS, dataset, row
from support.family_checkpoints import write_processor_files


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    return PromptEncoder(
        write_processor_files(tmp_path_factory.mktemp("qwen2_5_vl"), "qwen2_5_vl"), CONFIG
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """ROWS pictures of different sizes, 0.png, 1.png, …"""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(ROWS):
        pixels = rng.integers(0, 256, (28, 28 * (number + 1), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{number}.png")
    return path


@pytest.fixture
def seven(folder, encoder):
    return dataset(folder, encoder, [row(n) for n in range(ROWS)])
