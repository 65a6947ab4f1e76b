"""Times, memory, kept words and profiles of the Triton kernels; and of the peers."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import gpu_check
import kernel_oracle
import torch
from carry_states import carried
from gpu_profile import profile
from measure import Exact, PeakMemory, size
from states import synthetic, take
from ways import DENSE, FLOOR, OURS, WAYS, WHOLE, Case, Way, cce, six_matmuls

from papo_kernels import record_certificates, token_stats

# (D, V) in order of importance, and rows; the first of both are the main shape.
SHAPES = [(3584, 152_064), (2048, 151_936), (5120, 152_064), (8192, 152_064)]
ROWS = [16_384, 4096, 65_536]
MAIN_ROWS = ROWS[0]
MAIN_WIDTH, MAIN_VOCAB = SHAPES[0]
# Rows whose errors are taken at the main shape, and rows of the logits of bare matmuls.
ERROR_ROWS, CHUNK_ROWS = 128, 4096
# Rows of a chunk of Liger's loss: 311 MB of logits in bfloat16.
EAGER_CHUNK_ROWS = 1024
# What the interpreter gets instead.
TINY_ROWS, TINY_WIDTH, TINY_VOCAB = 64, 64, 1000
BANNED_WORDS = 16


@dataclass(frozen=True)
class Variant:
    """A use of `token_stats`: how many streams, what wants gradients, and its options.

    products: of N·V·D multiplications that the dense algorithm does; rates refer to them.
    """

    streams: int = 2
    frozen: bool = False
    banned: bool = False
    products: int = 6
    options: dict = field(default_factory=dict)

    def forward(self, case):
        two = self.streams == 2
        weight = case.weight.detach() if self.frozen else case.weight
        return token_stats(
            case.hidden, weight, case.targets, aug_hidden=case.aug_hidden if two else None,
            bias=banned_bias(case) if self.banned else None, backend="triton", **self.options,
        )  # fmt: skip

    def graph(self, case):
        """(outputs that get upstream gradients, operands that want gradients, the upstream)."""
        stats = self.forward(case)._asdict()
        upstream = {
            o: u for o, u in case.upstream("papo").items()
            if stats[o] is not None and stats[o].requires_grad
        }  # fmt: skip
        aug = self.streams == 2 and not self.options.get("aug_constant")
        leaves = [case.hidden, *([case.aug_hidden] if aug else [])]
        leaves += [] if self.frozen else [case.weight]
        return [stats[o] for o in upstream], leaves, list(upstream.values())

    def backward(self, graph):
        return torch.autograd.grad(*graph[:2], graph[2], retain_graph=True)

    def __call__(self, case):
        return torch.autograd.grad(*self.graph(case))


def banned_bias(case):
    """(V,) float32 bias that bans some words, as a trainer's does; made once for a case."""
    if not hasattr(case, "banned"):
        free = torch.ones(len(case.weight), dtype=torch.bool, device=case.weight.device)
        free[case.targets] = False
        case.banned = torch.zeros(len(case.weight), device=case.weight.device)
        case.banned[free.nonzero()[:BANNED_WORDS, 0]] = -torch.inf
    return case.banned


VARIANTS = {
    OURS: Variant(),
    f"{OURS}, banned words": Variant(banned=True),
    f"{OURS}, aug_constant": Variant(products=4, options={"aug_constant": True}),
    f"{OURS}, one stream": Variant(streams=1, products=3),
    f"{OURS}, frozen weight": Variant(frozen=True, products=4),
    DENSE: Variant(options={"grad_budget": 0.0}),
}


# ---- Sections


def made(run, name, function):
    """The states that `function()` makes; None where that fails."""
    return run.attempt(f"states: {name}", function, again=True)


def main_shape(run):
    """Errors, times and profiles of the main shape on synthetic states."""
    ceilings(run)
    states = made(run, "synthetic", lambda: _synthetic(run, *_main(run)))
    if states is None:
        return
    _errors(run, states)
    time_states(run, states, profiled=True)


def real_states(run):
    """The same on the carried states: SmolLM2's own words, and a tail of rare ones as well."""
    rows, width, vocab = _main(run)
    cut = (TINY_VOCAB // 2, TINY_WIDTH // 2) if run.interpreted else None
    if not Path(run.carried).exists():
        run.leave_out("real states", "no such file; bench/carry_states.py makes it")
        return
    named = {
        "smollm2-0.6": ("smollm2-0.6", None),
        "smollm2-0.6-wide": ("smollm2-0.6", vocab),
        "smollm2-1.1": ("smollm2-1.1", None),
    }
    if run.interpreted:  # with the words cut away, one is like the others
        named = {"smollm2-0.6-wide": named["smollm2-0.6-wide"]}
    found = []
    for name, (source, extended) in named.items():
        states = made(
            run,
            name,
            lambda s=source, e=extended: carried(
                run.carried, s, rows, width, run.device, vocab=e, cut=cut
            ),
        )
        if states is not None:
            found.append(Timed(run, states))
            found[-1].essentials(profiled=extended is not None or source == "smollm2-0.6")
    for timed in found:
        _errors(run, timed.states)
    for timed in found if not run.interpreted else []:  # it has had them in the section `main`
        timed.rest()


def other_shapes(run):
    order = [(n, *shape) for n in ROWS for shape in SHAPES][1:]
    # Fewer rows at the main width say most, then the other widths, then many rows.
    order.sort(key=lambda x: (x[0] > MAIN_ROWS, x[1] != MAIN_WIDTH))
    if run.interpreted:
        order = [(33, 40, 515)]
    for n, d, v in order:
        shown = f"N = {n}, D = {d}, V = {v}"
        if run.left <= 0:
            run.leave_out(shown, "out of time")
            continue
        states = made(run, shown, lambda n=n, d=d, v=v: _synthetic(run, n, d, v))
        if states is not None:
            time_states(run, states)


def peers(run):
    """Other implementations on the main shape, with the errors of what they compute."""
    found = {
        "CCE": Way(
            cce, "log-probs of both streams", upstream="log-probs", needs=("cut_cross_entropy",),
            settings={"impl": "cce"},
        )
    }  # fmt: skip
    # Those that torch.compile takes long for come last.
    for name in (WHOLE, "TRL chunked, five", "torch linear_cross_entropy", "Liger GRPO"):
        found[name] = WAYS[name]
    # As it ships, torch 2.11's compiler gives it up on a GPU.
    found["Liger GRPO, eager"] = replace(
        WAYS["Liger GRPO"], settings={"compiled": False, "chunk_size": EAGER_CHUNK_ROWS}
    )
    # A peer that is not there must not cost the time of the states.
    for name, way in list(found.items()):
        reason = way.cannot() or ("needs a GPU" if run.interpreted else "")
        if reason:
            run.leave_out(name, reason)
            del found[name]
    if not found:
        return
    states = made(run, "peers'", lambda: _synthetic(run, *_main(run)))
    if states is None:
        return
    exact = run.attempt("exact values for peers", lambda: Exact(_few(states)), again=True)
    # Whole logits of so many rows would not fit beside their own gradients.
    fewer = take(states, min(CHUNK_ROWS, len(states.targets)))
    for name, way in found.items():
        case = Case(fewer if name == WHOLE else states)
        run.attempt(
            f"{name}, N = {len(case.targets)}",
            lambda n=name, w=way, c=case: _time_peer(run, n, w, c, exact),
            optional=True,
        )


def _time_peer(run, name, way, case, exact):
    errors = exact.errors(way)[0] if exact else {}
    timed = run.seconds_of(lambda: way(case))
    note(run, case.states, name, timed, 6, extra_bytes=_extra(run, case, way), errors=errors)


# ---- What is measured


def ceilings(run):
    """What this GPU gives to a matmul of cuBLAS's choice and to a copy; and its clocks under it."""
    size = 512 if run.interpreted else 8192

    def matmul():
        a = torch.randn(size, size, device=run.device, dtype=torch.bfloat16)
        timed = run.seconds_of(lambda: torch.mm(a, a))
        rate = 2 * size**3 / timed["seconds"] / 1e12
        print(f"  matmul ceiling, {size}: {rate:.0f} TFLOP/s")
        run.add("ceilings", {"what": f"bfloat16 matmul {size}", "tflops": rate} | timed)
        for _ in range(0 if run.interpreted else 600):
            torch.mm(a, a)
        run.clocks("under load")

    def copy():
        x = torch.empty(2**22 if run.interpreted else 2**31, dtype=torch.uint8, device=run.device)
        y = torch.empty_like(x)
        timed = run.seconds_of(lambda: y.copy_(x))
        rate = 2 * len(x) / timed["seconds"] / 1e12
        print(f"  copy ceiling: {rate:.2f} TB/s")
        run.add("ceilings", {"what": "copy, read and written", "tbytes": rate} | timed)

    run.attempt("matmul ceiling", matmul)
    run.attempt("copy ceiling", copy)


@torch.no_grad()
def two_matmuls(case, rows=CHUNK_ROWS):
    """The forward's two products of N.V.D and nothing else."""
    w = case.states.weight
    z = w.new_empty(min(rows, len(case.targets)), len(w))
    for states in (case.states.hidden, case.states.aug_hidden):
        for x in states.split(len(z)):
            torch.mm(x, w.T, out=z[: len(x)])


class Timed:
    """The items of one set of states: those that say most, and the rest."""

    def __init__(self, run, states):
        self.run, self.states, self.case = run, states, Case(states)
        n, d = states.hidden.shape
        v = len(states.weight)
        self.shown = f"{states.name}, N = {n}, D = {d}, V = {v}"
        print(f"  {states.describe()}", flush=True)
        means = {k: getattr(states, k) for k in ("entropy", "aug_entropy", "kl_prcp")}
        record = {"name": states.name, "N": n, "D": d, "V": v} | means
        if record not in run.content["states"]:
            run.add("states", record)

    def essentials(self, profiled=False):
        case, ours = self.case, VARIANTS[OURS]
        self.alone("two bare matmuls", 2, lambda: two_matmuls(case))
        self.alone("forward, no_grad", 2, lambda: _no_grad(ours, case))
        self.alone("forward, with levels", 2, lambda: ours.forward(case))
        self.alone(FLOOR, 6, lambda: six_matmuls(case, CHUNK_ROWS))
        self.whole(OURS)
        self.item("backward alone", self._backward)
        if profiled:
            self.item("profile of the forward", self._profile_forward)
            self.item("profile of the backward", self._profile_backward)

    def rest(self):
        for name in list(VARIANTS)[1:]:
            self.whole(name)
        one = Variant(streams=1)
        self.alone("forward, one stream, no_grad", 1, lambda: _no_grad(one, self.case))

    def item(self, name, function):
        self.run.attempt(f"{self.shown}: {name}", function)

    def note(self, name, products, timed, **more):
        note(self.run, self.states, name, timed, products, **more)

    def alone(self, name, products, function):
        self.item(name, lambda: self.note(name, products, self.run.seconds_of(function)))

    def whole(self, name):
        self.item(name, lambda: self._whole(name, VARIANTS[name]))

    def _whole(self, name, variant):
        """Forward and backward: time, memory, and what the backward kept."""
        with record_certificates() as seen:
            variant(self.case)
        timed = self.run.seconds_of(lambda: variant(self.case), warm=False)
        found = {"kept": float(seen.kept), "rows": int(seen.rows)}
        found |= {"dense_rows": int(seen.dense_rows), "dropped": float(seen.largest_share)}
        extra = _extra(self.run, self.case, variant)
        self.note(name, variant.products, timed, extra_bytes=extra, **found)

    def _backward(self):
        variant = VARIANTS[OURS]
        graph = variant.graph(self.case)
        self.note("backward alone", 4, self.run.seconds_of(lambda: variant.backward(graph)))

    def _profile_forward(self):
        profile(
            self.run, f"{self.shown}: forward", lambda: VARIANTS[OURS].forward(self.case)
        )  # fmt: skip

    def _profile_backward(self):
        variant = VARIANTS[OURS]
        graph = variant.graph(self.case)
        profile(self.run, f"{self.shown}: backward", lambda: variant.backward(graph))


@torch.no_grad()
def _no_grad(variant, case):
    variant.forward(case)


def time_states(run, states, profiled=False):
    """All times of one set of states, in the order of their worth."""
    timed = Timed(run, states)
    timed.essentials(profiled)
    timed.rest()


def note(run, states, name, timed, products, **more):
    """Writes down and prints one way's time; the rate is that of the dense algorithm's products."""
    n, d = states.hidden.shape
    v = len(states.weight)
    tflops = products * 2.0 * n * v * d / timed["seconds"] / 1e12
    record = {"states": states.name, "N": n, "D": d, "V": v}
    record["dtype"] = gpu_check.shown(states.weight.dtype)
    run.add("times", record | {"way": name, "products": products, "tflops": tflops} | timed | more)
    said = f"  {name:32s} {1e3 * timed['seconds']:9.2f} ms  {tflops:7.1f} TFLOP/s nominal"
    if "extra_bytes" in more:
        said += f"  extra {more['extra_bytes'] / 2**20:.0f} MiB"
    if more.get("rows"):
        said += f"  kept {more['kept']:.2%}, dense rows {more['dense_rows']} of {more['rows']}"
    print(said, flush=True)


def _extra(run, case, function):
    """Bytes at the peak beside the gradients of all operands."""
    probe = PeakMemory(run.device)
    probe.start()
    # Kept until the peak is read: the gradients are part of it, and taken off again.
    results = function(case)
    peak = probe.read()
    grads = results[1] if len(results) == 2 and isinstance(results[0], dict) else results
    return peak - size(grads)


def _few(states):
    return Case(take(states, min(ERROR_ROWS, len(states.targets))))


def _errors(run, states):
    """Of few rows with the whole vocabulary, computed in float64 on the GPU itself."""
    few = take(states, min(ERROR_ROWS, len(states.targets)))
    case = kernel_oracle.Case(few.hidden, few.weight, few.targets, few.aug_hidden)
    n, d = few.hidden.shape
    run.check(
        f"{few.name}, N = {n}, D = {d}, V = {len(few.weight)}, bfloat16",
        lambda: gpu_check.errors_of(case, run.device, oracle_device=run.device),
    )


def _main(run):
    """(rows, width, vocabulary)."""
    if run.interpreted:
        return TINY_ROWS, TINY_WIDTH, TINY_VOCAB
    return MAIN_ROWS, MAIN_WIDTH, MAIN_VOCAB


def _synthetic(run, rows, width, vocab):
    states = synthetic(rows, vocab, width, 0.6, run.device)
    return states.map(lambda x: x.to(torch.bfloat16))
