"""Several processes on one machine, and groups that each of them can build alike."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image

from papo_fast.config import DataConfig
from papo_fast.data.prompts import Prompt
from papo_fast.rewards.scorer import Score
from papo_fast.samples import Completion, Group, Sample, all_samples
from support import SUPPORT, TESTS

DATA = DataConfig(prompt_suffix="", min_pixels=56 * 56, max_pixels=112 * 112)
FORK_RANKS = SUPPORT / "fork_ranks.py"


@functools.cache
def _forks() -> subprocess.Popen:
    """The process that all ranks of this one's tests are forked from. It ends with this one."""
    # for what workers share with the tests: they run as scripts, which pytest gives no path
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(FORK_RANKS)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def launch(ranks: int, command: list[str]) -> None:
    """Run a script, or `-m MODULE`, on so many ranks; fails with the output of the first that did.

    Without a limit of its own: the test's ends it, and then no process is left behind.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    forks = _forks()
    with tempfile.TemporaryDirectory() as folder:
        request = {"folder": folder, "ranks": ranks, "command": command}
        forks.stdin.write(json.dumps(request | {"environment": environment}) + "\n")
        forks.stdin.flush()
        group = int(forks.stdout.readline())
        try:
            status = forks.stdout.readline()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            forks.stdout.readline()  # its answer, so that the next launch does not take it
            raise
        assert status == "0\n", f"{FORK_RANKS.name} failed: its output says why"
        for rank, status in enumerate(Path(folder, "statuses").read_text().split()):
            assert status == "0", Path(folder, f"{rank}.txt").read_text()[-4000:]


def _picture(seed, size):
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def fixed_groups(encoder):
    """Six groups of three of 2, 1 and 0 pictures in turn, so that ranks differ in all there is."""
    g = torch.Generator().manual_seed(0)
    groups = []
    for i in range(6):
        images = [_picture(10 * i + j, (60 + 10 * j, 80)) for j in range((2, 1, 0)[i % 3])]
        encoded = encoder.encode("question " * (i + 1), images)
        pixels = encoded.pixel_values
        noise = None if pixels is None else torch.randn(pixels.shape, generator=g)
        samples = []
        for j in range(3):
            n = int(torch.randint(1, 12, (), generator=g))
            tokens = torch.randint(60, 120, (n,), generator=g).tolist()
            right = (3 * i + j) % 2
            score = Score(right, right, 1.0, False)
            samples.append(Sample(Completion(tokens, [-1.0] * n, True), score=score))
        groups.append(Group(Prompt(i, "", "", "", images, encoded), samples, noise))
    advantages = torch.randn(18, generator=g).tolist()
    for sample, advantage in zip(all_samples(groups), advantages, strict=True):
        sample.advantage = advantage
    return groups
