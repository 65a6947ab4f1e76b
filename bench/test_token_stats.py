"""`make bench`: statistics and gradients of two streams, forward and backward, beside the peers."""

import pytest
import states
from measure import size
from plan import FirstRoundMemory, rounds
from report import line
from ways import WAYS


def test_two_streams_forward_and_backward(benchmark, book, capsys, spec, name):
    way = WAYS[name]
    reason = "out of time" if book.out_of_time() else way.cannot()
    if not reason and spec.states.startswith("smollm2"):
        reason = states.missing()
    if not reason:
        book.open(spec)
        reason = way.cannot(book.case)
    if reason:
        book.skip(spec, name, reason)
        pytest.skip(reason)
    errors, kept = book.errors(way)
    if way.compiles:
        # Another number of rows is compiled for anew.
        way(book.case)
    memory = FirstRoundMemory()
    benchmark.pedantic(way, args=(book.case,), setup=memory, rounds=rounds(spec, name))
    gradients = 0 if way.upstream is None else size(book.case.leaves)
    record = book.add(
        spec, name, benchmark.stats.stats.data, memory.beyond(gradients), errors, kept
    )
    with capsys.disabled():
        print(f"\n  {spec} {line(record)}", end="")
