"""Counts the work that the Triton kernels' backward has on some states, without a GPU.

    TRITON_INTERPRET=1 python bench/kernel_workloads.py smollm2-0.6-wide --write

The forward and the choice of words run as they would on a GPU, on interpreted kernels and all rows:
how long lists get, which rows they serve, and which words groups of the others want. Products and
kernels that only add up gradients decide nothing, and are counted instead of run. The two slowest
kernels of the forward are replaced by torch's operators, which make the same sums and lists. It
takes 10 minutes and 6 GB, and for synthetic states some 40. `bench/cost_model.py` makes times of
these counts.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from carry_states import CARRIED, carried
from states import synthetic
from ways import Case

from papo_kernels import record_certificates, token_stats

WORKLOADS = Path(__file__).parent / "results" / "h200" / "workloads.json"
# Name: the carried states that they are made of, and the vocabulary that these are extended to.
# Synthetic ones depend on the width; of the others only the logits matter, which it leaves alone.
STATES = {
    "smollm2-0.6-wide": ("smollm2-0.6", 152_064),
    "smollm2-0.6": ("smollm2-0.6", None),
    "synthetic-0.6": (None, 152_064),
}
ROWS, WIDTH = 16_384, 3584
HOW = (
    "Counted by bench/kernel_workloads.py on a CPU: the real host code and interpreted kernels on "
    "states made as those of gpu.json, with a CPU's random numbers instead of a GPU's. But "
    "for what `inferred` names, nothing was measured on a GPU or inferred from such a measurement; "
    "`kept` can be compared with gpu.json's."
)


class Counter:
    """What the parts of a backward are asked for, in place of the parts that add up gradients."""

    def __init__(self):
        self.found = {"gathered_entries": [], "column_entries": 0, "column_rows": 0, "groups": []}

    def install(self):
        from papo_kernels.triton import columns, forward, groups, lists, words

        def nothing(*args, **more):
            pass

        def add_states(entries, run, total, kept, at=None, more=None):
            rows = kept if at is None else kept[at]
            self.found["gathered_entries"].append(int(rows.sum()))

        def add_weight(entries, run, count, total):
            self.found |= {"entries": count, "weight_entries": int(entries.kept.sum())}
            words_of = [
                entries.words[a : a + n]
                for a, n in zip(entries.lists.starts.tolist(), entries.kept.tolist(), strict=True)
            ]
            self.found["weight_words"] = len(torch.cat(words_of).unique())
            lengths = entries.lists.counts
            self.found["listed"] = int(lengths.sum())
            self.found["rows_with_lists"] = int((lengths > 0).sum())

        def columns_add(run, entries, at, total):
            before = int(entries.kept[at].sum())
            real_columns(run, entries, at, total)
            after = int(entries.kept[at].sum())
            self.found |= {"column_rows": len(at), "column_entries": before - after}

        def add_words(made, counts, total):
            rows = map(len, made._at.split(made._rows))
            found = [{"words": n, "rows": r} for n, r in zip(counts, rows, strict=True) if n]
            self.found["groups"].append(found)
            real_words(made, counts, total)

        forward._take_sums, lists.Writer.write = take_sums, write
        real_columns, real_words = columns.add, groups.Groups._add_words
        columns.add, groups.Groups._add_words = columns_add, add_words
        columns.multiply = columns.multiply_add = columns.add_rows = nothing
        lists.Entries.add_states, lists.Entries.add_weight = add_states, add_weight
        groups.add_products = nothing
        words.GradientSum.add_states = words.GradientSum.add_weight = nothing


def take_sums(call, o, z, targets, order, first, part):
    """What `stats_kernel` makes, in place of `forward._take_sums`; logits have no bias here."""
    count = len(z) // 2
    for r in range(0, count, 32):
        at = slice(r, min(r + 32, count))
        full, aug = z[at], z[count + r : count + at.stop]
        target = targets[order[first + r : first + at.stop]][:, None]
        streams = []
        for x in (full, aug):
            peak = x.amax(1, keepdim=True)
            e = (x - peak).exp()
            total = e.sum(1), (e * (x - peak)).sum(1)
            streams.append((e, peak, total, x.gather(1, target)))
        (e, peak, total, logit), (e_aug, aug_peak, aug_total, aug_logit) = streams
        gap, centre = full - aug, logit - aug_logit
        x = gap - centre
        # exp(-x) of a word is the ratio of its two exponentials, once they are of the same peak.
        again = (aug_peak - peak + centre).exp()
        near = x.abs() < 0.25
        terms = (e * torch.where(near, torch.expm1(-x) + x, x - 1)).sum(1)
        terms += (torch.where(near, 0, e_aug) * again).sum(1)
        sums = (
            peak[:, 0], total[0] - 1, total[1], logit[:, 0],
            aug_peak[:, 0], aug_total[0] - 1, aug_total[1], aug_logit[:, 0],
            (e * x).sum(1), (e_aug * x).sum(1), terms, (e * gap.abs()).sum(1),
            (e_aug * gap.abs()).sum(1), centre[:, 0],
        )  # fmt: skip
        part[:, first + r : first + at.stop] = torch.stack(sums)


def write(writer, z, order, first):
    """What `list_kernel` makes, in place of `lists.Writer.write`."""
    from papo_kernels.triton import lists

    found, vocab, count = writer._lists, writer._operands.v, len(z) // 2
    bits = torch.arange(32, dtype=torch.int32)[None, None, :, None]
    marks = writer.marks[:count].view(count, -1, 1, writer._lanes)
    row, word = ((marks >> bits) & 1).flatten(1)[:, :vocab].nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=count)
    counts[counts > lists.most_words(vocab)] = 0
    chunk = first // len(writer.marks)
    starts = writer._taken[chunk] + counts.cumsum(0) - counts
    counts[starts + counts > len(found.words)] = 0
    writer._taken[chunk + 1] = writer._taken[chunk] + counts.sum()
    at = order[first : first + count]
    found.starts[at], found.counts[at] = starts.int(), counts.int()
    keep = counts[row] > 0
    row, word = row[keep], word[keep]
    places = slice(int(writer._taken[chunk]), int(writer._taken[chunk + 1]))
    found.words[places] = word.int()
    found.logits[:, places] = torch.stack([z[row, word], z[count + row, word]])


def counted(name):
    """{count: number} of the states called `name`."""
    source, vocab = STATES[name]
    if source is None:
        states = synthetic(ROWS, vocab, WIDTH, 0.6).map(lambda x: x.bfloat16())
    else:
        states = carried(CARRIED, source, ROWS, None, "cpu", vocab=vocab)
    print(states.describe(), flush=True)
    counter, case = Counter(), Case(states)
    counter.install()
    began = time.perf_counter()
    with record_certificates() as seen:
        stats = token_stats(
            case.hidden, case.weight, case.targets, aug_hidden=case.aug_hidden, backend="triton"
        )
        print(f"forward: {time.perf_counter() - began:.0f} s", flush=True)
        upstream = case.upstream("papo")
        torch.autograd.grad(
            [getattr(stats, o) for o in upstream], case.leaves, list(upstream.values())
        )
    print(f"and backward: {time.perf_counter() - began:.0f} s", flush=True)
    shape = {"N": len(states.targets), "D": WIDTH, "V": len(states.weight), "streams": 2}
    return shape | {"kept": float(seen.kept), "dense_rows": int(seen.dense_rows)} | counter.found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("states", choices=STATES)
    parser.add_argument("--write", action="store_true", help=f"into {WORKLOADS.name}")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("TRITON_INTERPRET=1 has to be set, so that kernels run without a GPU")
    if STATES[arguments.states][0] is not None and not CARRIED.exists():
        parser.error(f"there is no {CARRIED}; `python bench/carry_states.py` makes it")
    found = counted(arguments.states)
    print(json.dumps(found, indent=1))
    if arguments.write:
        content = json.loads(WORKLOADS.read_text()) if WORKLOADS.exists() else {"how": HOW}
        content.setdefault("states", {})[arguments.states] = found
        WORKLOADS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
