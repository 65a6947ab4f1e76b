"""Starts the ranks of tests, forked from one process that has imported what all of them need.

    python fork_ranks.py

It reads one launch a line from its stdin, as JSON: {"folder", "ranks", "command", "environment"}.
The command is a script or `-m MODULE`, and its arguments. It answers with two lines: the process
group of the launch, and, once all ranks have ended, its exit status. What rank r prints goes to
FOLDER/r.txt, and the exit status of each to FOLDER/statuses. A process alone takes seconds to
import torch and transformers; the tests make some twenty launches of some fifty ranks.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from own_locks import own_progress_locks

# What the workers and the trainer import. Nothing of it may start threads: a fork has none of them.
import papo_fast.launch  # noqa: F401


def run(command: list[str]) -> None:
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


def in_child(rank: int, output: Path, command: list[str]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    own_progress_locks()
    status = 0
    try:
        run(command)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launch(folder: str, ranks: int, command: list[str], environment: dict[str, str]) -> None:
    """In a process and a group of its own, so that nothing of it is left for the next launch."""
    os.setsid()
    print(os.getpid(), flush=True)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ |= environment
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            in_child(rank, Path(folder, f"{rank}.txt"), command)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    Path(folder, "statuses").write_text(" ".join(map(str, statuses)))


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                launch(**json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what a rank started and left behind
        print(status, flush=True)


if __name__ == "__main__":
    main()
