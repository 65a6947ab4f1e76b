"""Compare two LaTeX answers by math-verify, in a process with a time and a memory limit.

`papo_fast.rewards.scorer` runs this file as a program. It imports nothing of the project, and
neither torch nor transformers, so that a worker starts in a second and weighs little. Protocol: one
JSON line `{"ready": true}` or `{"error": …}` after start, then for each request line
`[reference, candidate]` one line `{"right": bool}` or `{"error": …}`, or the end by `LIMIT_SIGNAL`.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

MEMORY_LIMIT = 4 << 30
"""Bytes of address space; an answer that asks for more is an error, not a full machine."""
LIMIT_SIGNAL = signal.SIGPROF
"""What ends a worker whose answer used up its time: its exit status tells the parent so."""


def compare(reference: str, candidate: str) -> bool:
    """Whether two answers, given without their \\boxed{}, are mathematically equal.

    Raises whatever math-verify raises; may run for ever.
    """
    from math_verify import parse, verify

    def parsed(answer: str) -> list:
        return parse(f"\\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=True)

    # No limits of math-verify's own: Python runs a signal's handler only once C code returns.
    return verify(parsed(reference), parsed(candidate), timeout_seconds=None, raise_on_error=True)


def main(timeout: float) -> None:
    """Answer requests from stdin until it closes, or one takes `timeout` seconds of CPU time.

    CPU time, so that what an answer scores does not depend on how busy the machine is.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    # Whatever a library prints goes to stderr: stdout carries the protocol only.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))

    def reply(message: dict) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        compare("\\frac{1}{2}", "0.5")  # loads the parser's tables, which would count as slowness
    except ImportError as error:
        reply({"error": str(error)})
        return
    reply({"ready": True})
    signal.signal(LIMIT_SIGNAL, signal.SIG_DFL)  # no handler: the kernel ends us, even in C code
    for line in sys.stdin:
        reference, candidate = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, timeout)
        try:
            message = {"right": compare(reference, candidate)}
        except Exception as error:  # reported to the parent, which counts it
            message = {"error": f"{type(error).__name__}: {error}"[:1000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(message)


if __name__ == "__main__":
    main(float(sys.argv[1]))
