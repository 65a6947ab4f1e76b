"""The ranks of one test, forked from one process that has imported what all of them need.

    python fork_ranks.py FOLDER RANKS COMMAND...

COMMAND is a script or `-m MODULE`, and its arguments. What rank r prints goes to FOLDER/r.txt, and
the exit status of each to FOLDER/statuses. A rank alone takes seconds to import torch and
transformers; the tests start some fifty.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

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


def main(folder: str, ranks: str, *command: str) -> None:
    children = []
    for rank in range(int(ranks)):
        child = os.fork()
        if child == 0:
            in_child(rank, Path(folder, f"{rank}.txt"), list(command))
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    Path(folder, "statuses").write_text(" ".join(map(str, statuses)))


if __name__ == "__main__":
    main(*sys.argv[1:])
