"""What the tests of rewards share."""

import resource

LIMIT = 1.0
"""Seconds of CPU time per answer."""


def cpu_seconds_of_ended_workers():
    """Does not depend on how busy the machine is, unlike the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def boxed(answer):
    return f"<think>Let me look.</think> The answer is \\boxed{{{answer}}}."


def is_right(scorer, reference, candidate):
    return scorer.score([boxed(candidate)], [reference])[0].accuracy == 1
