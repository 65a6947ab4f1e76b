"""Call the user's reward functions, in a process that may hang or crash without harm to the run.

`papo_fast.rewards.functions` starts it. Neither torch nor transformers is imported, unless the
user's file does. Protocol: a pickled list of functions, each pickled by dill or as the path, name
and text of a file; then for each request its length as a line of text and a pickled (number of the
call, number of the function, seconds, arguments, pictures): pickled ones, `HELD` for those of the
request before, or None for a function without. Replies are JSON lines as those of `answer_check`:
`{"call": …, "value": …, "seconds": …}`, or `"error"` in place of the value, or the end by
`LIMIT_SIGNAL`.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from papo_fast.child_process import end_with_parent
from papo_fast.user_function import function_of_source, one_line

MEMORY_LIMIT = 8 << 30
"""Bytes of address space of one worker, so that a function that asks for more is an error."""
LIMIT_SIGNAL = signal.SIGPROF
"""What ends a worker whose function used up its time."""
HELD = b"held"
LARGEST = 1e6
"""Size of a reward beyond which it counts as a mistake; sums of such rewards stay finite."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    end_with_parent(signal.SIGKILL)  # where that is killed, a function that sleeps has no limit
    # What a function prints goes to stderr, and it reads nothing: these two carry the protocol.
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        functions = [_load(entry) for entry in _read(requests) or ()]
    except (Exception, SystemExit) as error:
        reply({"error": one_line(error)})
        return
    reply({"ready": True})
    signal.signal(LIMIT_SIGNAL, signal.SIG_DFL)  # no handler: the kernel ends us, even in C code
    held, me = b"", os.getpid()
    while (request := _read(requests)) is not None:
        call, number, limit, arguments, pictures = request
        if pictures is not None:
            held = held if pictures == HELD else pictures
            # made anew for each call: a function may draw on them
            arguments["images"] = pickle.loads(held)
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, limit)
        message = _call(functions[number], arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if os.getpid() != me:  # a process that the function forked, and that came back from it too
            os._exit(0)
        reply({"call": call, **message, "seconds": time.process_time() - started})


def _read(stream: BinaryIO) -> Any:
    line = stream.readline()
    return pickle.loads(stream.read(int(line))) if line else None


def _load(entry: bytes | tuple[str, str, bytes]) -> Callable[..., Any]:
    if isinstance(entry, tuple):
        return function_of_source(*entry)
    import dill

    return dill.loads(entry)


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        value = function(**arguments)
        if isinstance(value, str | bytes):  # float() would read it
            raise TypeError(f"it returned {value!r:.100}, expected a number")
        number = float(value)
    except BaseException as error:  # also SystemExit; reported to the parent, which counts it
        return {"error": one_line(error)}
    if not abs(number) <= LARGEST:  # NaN is not, either
        return {"error": f"it returned {number}, expected a number within ±{LARGEST:g}"}
    return {"value": number}


if __name__ == "__main__":
    main()
