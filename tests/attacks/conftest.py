"""What every attack runs under: a limit of time, no bars of progress, good model and data."""

from __future__ import annotations

import signal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from support.attacks import row
from support.family_checkpoints import write_checkpoint

SECONDS = 30
"""An attack that takes longer has not been refused: it hangs."""


@pytest.fixture(autouse=True)
def ends_in_time():
    def late(*_):
        raise TimeoutError(f"not refused within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True, scope="module")
def no_bars():
    """The command asks for none before it imports the libraries, which are here already.

    transformers also warns of what a wrong configuration says, beside our line.
    """
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a checkpoint, `model`, and two good rows, `good.parquet`."""
    folder = tmp_path_factory.mktemp("attacks")
    write_checkpoint(folder / "model", "qwen2_5_vl")
    pq.write_table(pa.Table.from_pylist([row(0), row(1)]), folder / "good.parquet")
    return folder
