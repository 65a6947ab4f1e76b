"""Tables, plots and the section of docs/benchmarks.md from the JSON that `make bench` writes.

python bench/report.py bench/results/cpu/full.json            # the tables
python bench/report.py bench/results/cpu/full.json --write    # and the plots, and the page
"""

import argparse
import json
from pathlib import Path

from ways import DENSE, FLOOR, OURS, OUTPUTS, WHOLE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = ROOT / "docs" / "images"
START, END = "<!-- kernels -->", "<!-- end of kernels -->"
KEYS = ("states", "rows", "width", "dtype", "vocab")


def cases(content):
    """{(states, rows, width, dtype, vocab): {way: record}} in the order they were measured."""
    found = {}
    for r in content["records"]:
        found.setdefault(tuple(r[k] for k in KEYS), {})[r["way"]] = r
    return found


def number(x, pattern, missing="–"):
    return missing if x is None else format(x, pattern)


def _errors(record):
    e = record["errors"]
    statistics = max((e[o] for o in OUTPUTS if o in e), default=None)
    gradients = [number(e.get(g), ".0e") for g in ("dH", "dH_aug", "dW")]
    return number(statistics, ".0e"), ", ".join(gradients)


def line(record):
    """One result on one line, as it comes in."""
    statistics, gradients = _errors(record)
    return (
        f"{record['way']}: {record['seconds']:.3f} s, extra {record['extra_bytes'] / 2**20:.0f} MiB"
        f", errors {statistics}; {gradients}"
    )


def table(records):
    """A Markdown table of the ways of one case, fastest first among those that do the work."""
    floor, whole = records.get(FLOOR), records.get(WHOLE)

    def ratio(record, to):
        return number(None if to is None else record["seconds"] / to["seconds"], ".2f")

    head = (
        "", "time, s", "/ six matmuls", "/ whole logits", "peak extra, MiB", "/ whole logits",
        "error: statistics", "dH, dH_aug, dW", "columns kept",
    )  # fmt: skip
    rows = [head, ("---",) + ("---:",) * 8]
    for record in sorted(records.values(), key=lambda r: (r["way"] != FLOOR, r["seconds"])):
        share = None
        if whole and whole["extra_bytes"]:
            share = record["extra_bytes"] / whole["extra_bytes"]
        statistics, gradients = _errors(record)
        ours = record["way"].startswith(OURS)
        rows.append(
            (
                f"**{record['way']}**" if ours else record["way"],
                f"{record['seconds']:.3f}",
                ratio(record, floor),
                ratio(record, whole),
                "–" if record["way"] == FLOOR else f"{record['extra_bytes'] / 2**20:.0f}",
                "–" if record["way"] == FLOOR else number(share, ".1%"),
                statistics,
                gradients if record["errors"] else "–",
                number(record["kept"], ".1%"),
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return "\n".join(
        "| " + " | ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)) + " |" for r in rows
    )


def title(records):
    r = next(iter(records.values()))
    return (
        f"{r['states']}, {r['dtype']}, N = {r['rows']}, D = {r['width']}, V = {r['vocab']}; "
        f"entropy {r['entropy']:.2f} (corrupted {r['aug_entropy']:.2f}), KL {r['kl_prcp']:.2g} nats"
    )


def about(content):
    m = content["machine"]
    return (
        f"{m.get('gpu') or m['processor']}, {m['threads']} thread{'s' * (m['threads'] != 1)}, "
        f"torch {m['torch']}; least of 1 to 3 rounds, warm; errors on the first "
        f"{content['error_rows']} rows against float64 (statistics: largest, relative to "
        "max(1, |value|); gradients: relative norm)"
    )


def what_each_computes(content):
    used = {r["way"] for r in content["records"]}
    found = ["| | computes | logits rounded to |", "|---|---|---|"]
    found += [
        f"| {n} | {w['computes']} | {w['logits']} |"
        for n, w in content["ways"].items()
        if n in used
    ]
    reasons = {}
    for r in content["not_run"]:
        if r["way"] not in used or r["reason"] == "out of time":
            where = f"{r['states']} N={r['rows']} D={r['width']} {r['dtype']}"
            reasons.setdefault((r["way"], r["reason"]), []).append(where)
    for (way, reason), where in reasons.items():
        more = f" and {len(where) - 2} more" if len(where) > 2 else ""
        found.append(f"| {way} | **not run**: {reason} ({'; '.join(where[:2])}{more}) | |")
    return "\n".join(found)


def tables(content):
    parts = [about(content), what_each_computes(content)]
    parts += [f"{title(r)}\n\n{table(r)}" for r in cases(content).values()]
    return "\n\n".join(parts)


# Plots


def plots(content):
    """Writes the plots that the results suffice for; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    IMAGES.mkdir(parents=True, exist_ok=True)
    found = cases(content)
    return [p for p in (_against_rows(found, plt), _against_entropy(found, plt)) if p]


COLOURS = {
    FLOOR: "0.6", OURS: "tab:blue", DENSE: "tab:cyan", WHOLE: "tab:red",
    "TRL chunked, five": "tab:orange",
}  # fmt: skip


def _against_rows(found, plt):
    """Time and peak extra memory of whole runs against N."""
    points = {}
    for (states, rows, width, dtype, _), records in found.items():
        if (states, width, dtype) == ("smollm2-0.6", 576, "float32"):
            for way in COLOURS:
                if way in records:
                    points.setdefault(way, []).append((rows, records[way]))
    if max((len(p) for p in points.values()), default=0) < 2:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for way, series in points.items():
        series.sort(key=lambda x: x[0])
        rows = [n for n, _ in series]
        left.plot(rows, [r["seconds"] for _, r in series], "o-", color=COLOURS[way], label=way)
        if way != FLOOR:
            extra = [r["extra_bytes"] / 2**20 for _, r in series]
            right.plot(rows, extra, "o-", color=COLOURS[way], label=way)
    left.set(xlabel="response tokens N", ylabel="seconds", xlim=0, ylim=0)
    right.set(xlabel="response tokens N", ylabel="peak extra memory, MiB", xlim=0, yscale="log")
    left.legend(frameon=False)
    figure.suptitle("Both streams, forward and backward: SmolLM2 at 0.6 nats, float32, D = 576")
    return _save(figure, "kernels_rows.png", plt)


def _against_entropy(found, plt):
    """Time over that of the six matmuls against the policy's entropy."""
    largest = max((k[1] for k in found), default=0)
    series = {}
    for (states, rows, width, dtype, _), records in found.items():
        if states.startswith("smollm2") and rows == largest and {FLOOR, OURS} <= records.keys():
            ours, floor = records[OURS], records[FLOOR]
            point = (ours["entropy"], ours["seconds"] / floor["seconds"], ours["kept"])
            series.setdefault((width, dtype), []).append(point)
    series = {k: sorted(v) for k, v in series.items() if len(v) > 1}
    if not series:
        return None
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for (width, dtype), points in series.items():
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], "o-", label=f"D = {width}, {dtype}"
        )
    axes.axhline(1, color="0.6", lw=1)
    axes.annotate("the six matmuls alone", (0.98, 1), xycoords=("axes fraction", "data"),
                  ha="right", va="top", color="0.4")  # fmt: skip
    axes.set(xlabel="mean entropy, nats", ylabel="time / six bare matmuls", ylim=0)
    axes.legend(frameon=False)
    axes.set_title(f"Cost against entropy, N = {largest}")
    return _save(figure, "kernels_entropy.png", plt)


def _save(figure, name, plt):
    path = IMAGES / name
    figure.savefig(path, dpi=140, metadata={"Software": None})
    plt.close(figure)
    return path


# The page


def section(content, images):
    """The page's text between the markers: the case that says most, and the plots."""
    found = cases(content)
    chosen = [k for k in found if OURS in found[k] and WHOLE in found[k]]
    largest = max(k[1] for k in chosen)
    chosen = [k for k in chosen if k[1] == largest and k[0].startswith("smollm2")]
    parts = [
        "## Kernels",
        "The task is the statistics and the gradients of both streams, forward and backward. The "
        "inputs are hidden states of SmolLM2-135M-Instruct, so that the probabilities are those of "
        f"a real language model. Measured on: {about(content)}. `make bench "
        f"SIZE={content['size']}` made these tables, and this command prints all cases, with what "
        "each way computes:",
        f"```bash\npython bench/report.py bench/results/cpu/{content['size']}.json\n```",
    ]
    timed = {way for k in chosen for way in found[k]} - {FLOOR}
    parts += [
        "The ways do not all do the same work:\n\n"
        + "\n".join(f"- {n}: {w['computes']}" for n, w in content["ways"].items() if n in timed)
    ]
    parts += [f"{title(found[k])}\n\n{table(found[k])}" for k in chosen]
    parts += [f"![{p.stem.replace('_', ' ')}](images/{p.name})" for p in images]
    return "\n\n".join(parts)


def into_page(text, page):
    """`page` with what stands between the two markers replaced by `text`."""
    if START not in page or END not in page:
        raise ValueError(f"{PAGE.name} lacks the markers {START} and {END}")
    before, rest = page.split(START, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{START}\n{text}\n{END}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("--write", action="store_true", help=f"also the plots, and {PAGE.name}")
    args = parser.parse_args()
    content = json.loads(args.json.read_text())
    print(tables(content))
    if args.write:
        images = plots(content)
        PAGE.write_text(into_page(section(content, images), PAGE.read_text()))
        print("\nWritten:", ", ".join(p.name for p in images), PAGE.name)


if __name__ == "__main__":
    main()
