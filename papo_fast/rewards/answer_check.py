"""Compare two LaTeX answers by math-verify, in a process with a time and a memory limit.

`papo_fast.rewards.scorer` runs this file as a program. It imports nothing of the project, and
neither torch nor transformers, so that a worker starts in a second and weighs little. Protocol: one
JSON line `{"ready": true}` or `{"error": …}` after start, then for each request line
`[reference, candidate, seconds]` one line `{"right": bool, "seconds": …}` or
`{"error": …, "seconds": …}`, or the end by `LIMIT_SIGNAL`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import resource
import signal
import sys
import time
from fractions import Fraction
from typing import Any

MEMORY_LIMIT = 2 << 30
"""Bytes of address space of one worker; an answer that asks for more is an error, not a full
machine. A trainer has `reward.workers` of them."""
LIMIT_SIGNAL = signal.SIGPROF
"""What ends a worker whose answer used up its time: its exit status tells the parent so."""
MAX_LENGTH = 500
"""Characters of an answer that is given to the parser, whose time grows faster than they do."""
MAX_DEPTH = 12
"""Brackets, fractions and exponents inside each other that are given to the parser."""
MAX_DIGITS = 5000.0
"""Digits that an answer's numbers may have together once its powers are multiplied out."""
TOLERANCE = Fraction(1, 10**6)
"""How far two numbers may differ, relative to the larger, where one of them was rounded."""
SIGNIFICANT = 6
"""Digits that a rounded number must at least have."""

_TOKEN = re.compile(
    r"\\(?:d|t|c)?frac(?![A-Za-z])|\\d?binom(?![A-Za-z])|\\[A-Za-z]+|\\.|\d+\.?\d*|\.\d+|\*\*|.",
    re.S,
)
_DECIMAL = re.compile(r"\d+\.?\d*|\.\d+")
_CLOSE = {"{": "}", "(": ")", "[": "]"}
_NUMBER = re.compile(
    r"(?P<sign>-?)(?:(?P<plain>\d+(?:\.\d*)?|\.\d+)(?:\\times10\^\{(?P<power>-?\d{1,3})\})?"
    r"|\\frac\{(?P<over>-?\d+(?:\.\d+)?)\}\{(?P<under>\d+(?:\.\d+)?)\}"
    r"|(?P<a>\d+(?:\.\d+)?) ?/ ?(?P<b>\d+(?:\.\d+)?))"
)


def too_large(answer: str) -> bool:
    """Whether an answer is too long, too deep or too large a number for the parser.

    `9^{9^{9^{9}}}` has thirteen characters and more digits than the universe has atoms; sympy
    would begin to write them down.
    """
    if len(answer) > MAX_LENGTH:
        return True
    tokens = [t for t in _TOKEN.findall(answer) if not t.isspace()]
    try:
        digits, _ = _digits(tokens, 0, "", 0)
    except _TooLargeError:
        return True
    return digits > MAX_DIGITS


class _TooLargeError(Exception):
    pass


def _digits(tokens: list[str], at: int, close: str, depth: int) -> tuple[float, int]:
    """A bound of log10 of what stands up to `close`, and the position behind it.

    The bound adds the logarithms of all atoms, as if they were multiplied. A letter counts as 10.
    """
    if depth > MAX_DEPTH:
        raise _TooLargeError
    total = 0.0
    while at < len(tokens):
        if tokens[at] in "})]" and (tokens[at] == close or depth):
            return total, at + 1
        size, at = _power(tokens, at, depth)
        total += size
        if total > 1e12:
            raise _TooLargeError
    return total, at


def _power(tokens: list[str], at: int, depth: int) -> tuple[float, int]:
    """An atom with what is raised to its upper right."""
    if depth > MAX_DEPTH:
        raise _TooLargeError
    size, at = _atom(tokens, at, depth)
    while at < len(tokens):
        if tokens[at] in ("^", "**"):
            if at + 1 >= len(tokens):
                return size, at + 1
            step = at + 1
            while step < len(tokens) and tokens[step] in "+-":
                step += 1
            exponent, at = _power(tokens, step, depth + 1)
            if exponent > 7:
                raise _TooLargeError
            size = max(size, 0.3) * 10**exponent
        elif tokens[at] == "!":
            if size > 7:
                raise _TooLargeError
            size, at = 10**size * max(size, 1.0), at + 1
        else:
            break
        if size > MAX_DIGITS:
            raise _TooLargeError
    return size, at


def _atom(tokens: list[str], at: int, depth: int) -> tuple[float, int]:
    if at >= len(tokens):
        return 0.0, at
    token = tokens[at]
    if token in ("\\{", "\\("):
        return 0.0, at + 1
    if token in _CLOSE:
        return _digits(tokens, at + 1, _CLOSE[token], depth + 1)
    if token.endswith("binom"):
        size, at = _power(tokens, at + 1, depth + 1)
        if size > 5:
            raise _TooLargeError
        return 10**size * 0.31, at
    if _DECIMAL.fullmatch(token):
        mantissa = token.replace(".", "").strip("0")
        whole = float(token) if len(token) < 300 else math.inf
        size = math.log10(whole) if 0 < whole < math.inf else float(len(token))
        return (max(abs(size), 0.0) if mantissa else 0.0), at + 1
    return (0.7 if token.isalpha() or (token[0] == "\\" and token[1:].isalpha()) else 0.0), at + 1


def equal_numbers(reference: str, candidate: str) -> bool | None:
    """Whether two plain numbers are equal; None if one of the two is not plain.

    Integers and decimals must be the same number. Where one is a fraction that no decimal equals,
    the other may differ by `TOLERANCE`; a decimal may also be another one's rounding to
    `SIGNIFICANT` digits or more.
    """
    first, second = _NUMBER.fullmatch(reference), _NUMBER.fullmatch(candidate)
    if not first or not second or max(len(reference), len(candidate)) > 200:
        return None
    a, b = _value(first), _value(second)
    if a is None or b is None:
        return None
    if a == b:
        return True
    difference = abs(a - b) / max(abs(a), abs(b))
    if difference < Fraction(1, 10**14):
        return not (a.denominator == b.denominator == 1)  # what floats lose
    if difference > TOLERANCE:
        return False
    one, other = _significant(first, a), _significant(second, b)
    fewer, rounded = (a, one) if one < other else (b, other)
    return one != other and rounded >= SIGNIFICANT and fewer.denominator != 1


def _value(match: re.Match[str]) -> Fraction | None:
    try:
        if match["plain"]:
            value = Fraction(match["plain"]) * Fraction(10) ** int(match["power"] or 0)
        else:
            value = Fraction(match["over"] or match["a"]) / Fraction(match["under"] or match["b"])
    except ZeroDivisionError:
        return None
    return -value if match["sign"] else value


def _significant(match: re.Match[str], value: Fraction) -> float:
    """The digits of a decimal from its first that is not 0; infinity where they never end."""
    if match["plain"]:
        return len(match["plain"].replace(".", "").lstrip("0"))
    under, places = value.denominator, 0
    while under > 1:
        step = math.gcd(under, 10)
        if step == 1:
            return math.inf
        under, places = under // step, places + 1
    return len(str(abs(value.numerator) * 10**places // value.denominator))


def compare(reference: str, candidate: str) -> bool:
    """Whether two answers, given without their \\boxed{}, are mathematically equal.

    Raises whatever math-verify raises; may run for ever.
    """
    plain = equal_numbers(reference, candidate)
    if plain is not None:
        return plain
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    # Units are gone: math-verify's would take the t of 5t for one. And all of an answer is to be
    # read, not the first number in it.
    reading = LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
        )
    )

    def parsed(answer: str) -> list:
        return parse(f"\\boxed{{{answer}}}", [reading], parsing_timeout=None, raise_on_error=True)

    right, given = parsed(reference), parsed(candidate)
    # No limits of math-verify's own: Python runs a signal's handler only once C code returns.
    equal = verify(
        right, given, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True
    )
    # math-verify rounds to six decimals and takes what is below 1e-15 for 0.
    return equal and not (right and given and _differ(right[0], given[0]))


def _differ(right: Any, given: Any) -> bool:
    """Whether two numbers, or two tuples of them, differ by more than `TOLERANCE` of the larger."""
    from sympy import Expr, FiniteSet, Tuple

    if isinstance(right, (FiniteSet, Tuple)) and isinstance(given, (FiniteSet, Tuple)):
        ours, theirs = _numbers(right), _numbers(given)
        if ours is None or theirs is None or len(ours) != len(theirs):
            return False
        return any(_far(a, b) for a, b in zip(sorted(ours), sorted(theirs), strict=True))
    if not isinstance(right, Expr) or not isinstance(given, Expr):
        return False
    a, b = _number(right), _number(given)
    if a is None or b is None or not _far(a, b):
        return False
    # A percent sign is left out as often as not.
    return all(_far(a * x, b * y) for x, y in ((100, 1), (1, 100)))


def _numbers(container: Any) -> list[Any] | None:
    values = [_number(x) for x in container.args]
    return None if any(x is None for x in values) else values


def _number(expression: Any) -> Any:
    if not getattr(expression, "is_number", False):
        return None
    value = expression.doit().evalf(20)
    return value if (value.is_Float and value.is_finite) or value.is_Integer else None


def _far(a: Any, b: Any) -> bool:
    return bool(abs(a - b) > max(abs(a), abs(b)) * float(TOLERANCE) * 1.001)


def main() -> None:
    """Answer requests from stdin until it closes, or one takes its seconds of CPU time.

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
        compare("\\sqrt{2}", "2^{0.5}")  # loads the parser's tables, which would count as slowness
    except ImportError as error:
        reply({"error": str(error)})
        return
    reply({"ready": True})
    signal.signal(LIMIT_SIGNAL, signal.SIG_DFL)  # no handler: the kernel ends us, even in C code
    for line in sys.stdin:
        reference, candidate, limit = json.loads(line)
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            message = {"right": compare(reference, candidate)}
        except Exception as error:  # reported to the parent, which counts it
            message = {"error": f"{type(error).__name__}: {error}"[:1000]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply({**message, "seconds": time.process_time() - started})


if __name__ == "__main__":
    main()
