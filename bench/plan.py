"""Which cases are measured, in which order, how often, and how results are kept."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import Exact, PeakMemory, machine
from states import load, take
from ways import DENSE, ESSENTIAL, FLOOR, OURS, WAYS, WHOLE, Case

RESULTS = Path(__file__).parent / "results" / "cpu"
# Rows on which errors are taken: float64 on all of them would cost more than the benchmark.
ERROR_ROWS = 256
MINUTES = {"quick": 6, "full": 21}


@dataclass(frozen=True)
class Spec:
    """Inputs of a case, by their names and sizes; vocab is of synthetic ones."""

    states: str
    rows: int
    width: int
    dtype: str
    vocab: int = 49_152

    def __str__(self):
        return f"{self.states}-N{self.rows}-D{self.width}-V{self.vocab}-{self.dtype}"

    def load(self):
        return load(
            self.states, self.rows, self.width, getattr(torch, self.dtype), vocab=self.vocab
        )


PEERS = [w for w in WAYS if w not in ESSENTIAL]


def make_plan(size_name):
    """[(Spec, name of a way)] in the order of what matters most, for an end before the last."""
    if size_name == "quick":
        low = [Spec("smollm2-0.6", 512, 576, d) for d in ("float32", "bfloat16")]
        # Two minutes of compiling for one row of the table.
        peers = [w for w in PEERS if w != "Liger JSD"]
        higher = [Spec(s, 512, 576, "float32") for s in ("smollm2-1.1", "smollm2-own")]
        fewer = [Spec("smollm2-0.6", n, 576, "float32") for n in (128, 256)]
        large = [Spec("synthetic-0.6", 128, 576, "float32", 152_064)]
    else:
        low = [
            Spec("smollm2-0.6", 2048, width, dtype)
            for width in (576, 3584)
            for dtype in ("float32", "bfloat16")
        ]
        peers = PEERS
        higher = [Spec("smollm2-own", 2048, 3584, "float32")]
        higher += [
            Spec(s, 2048, 576, d)
            for d in ("float32", "bfloat16")
            for s in ("smollm2-1.1", "smollm2-own")
        ]
        fewer = [Spec("smollm2-0.6", n, 576, "float32") for n in (256, 512, 1024)]
        large = [Spec("synthetic-0.6", 512, 576, "float32", 152_064)]
    plan = [(s, w) for s in low for w in ESSENTIAL]
    plan += [(s, w) for s in higher[:1] for w in (FLOOR, OURS)]
    plan += [(s, w) for s in low for w in peers]
    plan += [(s, w) for s in higher[1:] for w in (FLOOR, OURS)]
    plan += [(s, w) for s in fewer for w in (*ESSENTIAL, "TRL chunked, five")]
    plan += [(s, w) for s in large for w in ESSENTIAL]
    return [(s, w) for s, w in plan if s.dtype in WAYS[w].dtypes]


def rounds(spec, way):
    """Timed repetitions; fewer of what takes long, more of what is divided by another."""
    large = spec.rows * spec.width * spec.vocab > 1e11
    if way in (FLOOR, OURS):
        return 3
    if way in (WHOLE, DENSE):
        return 2 if large else 3
    return 1 if large else 2


class Book:
    """Cases at hand, and the results so far, written after each."""

    def __init__(self, size_name, path, minutes):
        self.path, self.deadline = Path(path), time.monotonic() + 60 * minutes
        self.spec = self.case = self.few = self.exact = None
        self.content = {
            "size": size_name,
            "machine": machine(),
            "error_rows": ERROR_ROWS,
            "ways": {n: {"computes": w.computes, "logits": w.logits} for n, w in WAYS.items()},
            "records": [],
            "not_run": [],
        }

    def out_of_time(self):
        return time.monotonic() > self.deadline

    def open(self, spec):
        """Makes `spec` the case at hand: its inputs, and float64 results of its first rows."""
        if spec == self.spec:
            return
        self.spec = self.case = self.few = self.exact = None
        states = spec.load()
        self.case, self.spec = Case(states), spec
        self.few = Case(take(states, min(ERROR_ROWS, spec.rows)))

    def errors(self, way):
        """Of the case's first rows: what `Exact.errors` says."""
        if way.upstream is None:
            return {}, None
        if self.exact is None:
            self.exact = Exact(self.few)
        return self.exact.errors(way)

    def skip(self, spec, name, reason):
        self.content["not_run"].append(asdict(spec) | {"way": name, "reason": reason})
        self.write()

    def add(self, spec, name, seconds, extra, errors, kept):
        """seconds: of each round; extra: peak bytes beyond inputs and gradients."""
        s = self.case.states
        record = asdict(spec) | {
            "entropy": s.entropy,
            "aug_entropy": s.aug_entropy,
            "kl_prcp": s.kl_prcp,
            "way": name,
            "seconds": min(seconds),
            "rounds": len(seconds),
            "slowest_seconds": max(seconds),
            "extra_bytes": extra,
            "errors": errors,
            "kept": kept,
        }
        self.content["records"].append(record)
        self.write()
        return record

    def write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


class FirstRoundMemory:
    """Peak memory of the first of several rounds, as the set-up of each round."""

    def __init__(self):
        self.probe, self.extra = PeakMemory(), None

    def __call__(self):
        if self.probe.before is None:
            self.probe.start()
        elif self.extra is None:
            self.extra = self.probe.read()

    def beyond(self, gradients):
        """Bytes beyond those many of gradients, which whoever asks for them has to hold."""
        if self.extra is None:
            self.extra = self.probe.read()
        return max(0, self.extra - gradients)
