"""Tables and picture of `train_step.py`'s results, and their section of docs/benchmarks.md.

    PYTHONPATH=.:kernels python bench/train_step_report.py [--results JSON]

writes docs/images/train_step.png and the section "One update" of docs/benchmarks.md.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from train_step_meter import PARTS
from train_step_trl import NAME as TRL
from train_step_ways import OFF_POLICY, OURS, PACKED, PADDED, PROMPTS_ONCE, UNSHARED

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "cpu" / "train_step.json"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- train step -->", "<!-- end train step -->"
TITLES = {
    "both": "PAPO, gradients in both streams",
    "official": "PAPO as the authors compute it",
    "grpo": "GRPO",
}
COLORS = {"vision": "#d95f4c", "language": "#3b6ea5", "lm_head": "#e0b040"}
LABELS = {"vision": "vision tower", "language": "language model", "lm_head": "lm_head"}


@dataclass(frozen=True)
class Target:
    """Seconds of `above` over those of `below`, both with those of sampling or without.

    Both are (objective, name) of a way: steps of the ladders have the same names.
    """

    name: str
    above: tuple[str, str]
    below: tuple[str, str]
    bound: dict
    at_least: bool = True
    sampling: bool = False


def _targets():
    ours = {objective: (objective, name) for objective, name in OURS.items()}
    padded = {objective: (objective, name) for objective, name in PADDED.items()}
    packed, once, unshared = (("both", name) for name in (PACKED, PROMPTS_ONCE, UNSHARED))
    sharing, three = {5: 2.5, 16: 4.0}, {5: 3.0, 16: 3.0}
    yield Target("both streams, packed / pictures and prompts once", packed, once, sharing)
    yield Target(f"{UNSHARED} / shared, one update per rollout", unshared, ours["both"], sharing)
    yield Target("both streams one by one, padded / papo_fast", padded["both"], ours["both"], {})
    yield Target(
        "authors' schedule / papo_fast, official", padded["official"], ours["official"], three
    )
    yield Target("TRL / papo_fast, GRPO", ("grpo", TRL), ours["grpo"], {})
    for title, objective, bound in (("both streams", "both", 1.7), ("official", "official", 1.15)):
        for label, suffix, sampling in (
            ("one update per rollout", "", False),
            ("several updates per rollout", OFF_POLICY, False),
            ("one update, with sampling", "", True),
        ):
            yield Target(
                f"PAPO / GRPO, {title}: {label}",
                (objective, OURS[objective] + suffix),
                ("grpo", OURS["grpo"] + suffix),
                {5: bound, 16: bound},
                at_least=False,
                sampling=sampling,
            )


TARGETS = tuple(_targets())


def group_sizes(content):
    return sorted({r["group_size"] for r in content["records"]})


def ratios(content):
    """[(target, G, ratio of seconds, ratio of FLOPs or None, bound or None, met or None)]"""
    rows = []
    for target in TARGETS:
        for g in group_sizes(content):
            above, below = (_record(content, g, *way) for way in (target.above, target.below))
            more = content["sampling_seconds"][str(g)] if target.sampling else 0.0
            ratio = (above["seconds"] + more) / (below["seconds"] + more)
            flops = sum(above["flops"].values()) / sum(below["flops"].values())
            flops = None if target.sampling else flops
            bound = target.bound.get(g)
            met = None if bound is None else (ratio >= bound) == target.at_least
            rows.append((target, g, ratio, flops, bound, met))
    return rows


def _record(content, group_size, objective, name):
    rows = of_objective(content, group_size, objective)
    return next(r for r in rows if r["way"] == name)


def of_objective(content, group_size, objective):
    found = content["records"]
    return [r for r in found if (r["group_size"], r["objective"]) == (group_size, objective)]


def ladder(content, group_size, objective):
    """Without the variants that are there for ratios only."""
    rows = of_objective(content, group_size, objective)
    return [r for r in rows if not r["way"].endswith(OFF_POLICY)]


def show(content, console):
    """Everything that was measured, and the ratios beside their targets."""
    image, text, response = content["image_text_response"]
    console.print(
        f"image : text : response = {image} : {text} : {response} tokens, micro-batches of "
        f"{content['micro_tokens']} tokens, {content['machine']['threads']} threads, best of "
        f"{content['rounds']} alternating rounds"
    )
    for name, key in (("this model", "shares"), ("Qwen2.5-VL-3B", "shares_of_3b")):
        parts = ", ".join(f"{LABELS[p]} {content[key][p]:.1%}" for p in PARTS)
        console.print(f"FLOPs of a sequence's forward pass in {name}: {parts}")
    for g in group_sizes(content):
        about = content["policies"][str(g)]
        table = Table(
            title=f"G = {g}: entropy {about['entropy']:.2f} nats, corrupted "
            f"{about['aug_entropy']:.2f}, perception KL {about['kl_prcp']:.2f}; sampling takes "
            f"{content['sampling_seconds'][str(g)]:.2f} s"
        )
        table.add_column("way")
        for name in ("seconds", "faster", "peak MB"):
            table.add_column(name, justify="right")
        table.add_column("tokens: vision language head", justify="right")
        table.add_column("GFLOP: vision language head", justify="right")
        for objective, title in TITLES.items():
            rows = of_objective(content, g, objective)
            table.add_section()
            table.add_row(f"[bold]{title}")
            for r in rows:
                table.add_row(
                    r["way"],
                    f"{r['seconds']:.2f}",
                    f"{rows[0]['seconds'] / r['seconds']:.2f}x",
                    f"{r['peak_bytes'] / 1e6:.0f}",
                    " ".join(f"{r['tokens'][p]:>7}" for p in PARTS),
                    " ".join(f"{r['flops'][p] / 1e9:>7.1f}" for p in PARTS),
                )
        console.print(table)
    table = Table(title="Targets")
    for name in ("ratio of seconds", "G", "measured", "FLOPs say", "target", ""):
        table.add_column(name)
    for target, g, ratio, flops, bound, met in ratios(content):
        sign = "" if bound is None else ("≥ " if target.at_least else "≤ ") + f"{bound:g}"
        verdict = {None: "", True: "[green]met", False: "[red]missed"}[met]
        said = "" if flops is None else f"{flops:.2f}"
        table.add_row(target.name, str(g), f"{ratio:.2f}", said, sign, verdict)
    console.print(table)


SECTION = """\
## One update

The responses of a prompt share its text and its picture. The two streams share everything but the
picture. papo_fast therefore runs each prompt and each picture once per group and stream, it puts
both streams into one packed pass, and it sends only response rows through the lm_head
([design.md](design.md#packed-groups)). The loss and the gradients are those of one sequence at a
time.

![Seconds per update](images/train_step.png)

{seconds}

A line that begins with + adds one change to the line before it. `papo_fast` adds to the last of
them that only response rows go through the lm_head, and that the backward pass there is sparse.

{ratios}

How this was measured: float32, {threads} CPU threads, a Qwen2.5-VL with random weights, and
image : text : response = {lengths} tokens. Rewards are not part of the time. Sampling is part of it
only in the lines that say so; those ratios are of whole steps, as the published ones are (+19 % and
+42 % for the authors' code). Memory is what the process held beyond weights, optimizer state and
data. Before they were timed, all ways of one objective gave the same loss, and the same gradients
to {same:.0e}. What the sparse backward leaves out moves the gradients by {sparse:.1e}. Shares of a
sequence's FLOPs, with those of the 3B model in brackets: {shares}.

```bash
PYTHONPATH=.:kernels python bench/train_step.py --size full --threads {threads}
PYTHONPATH=.:kernels python bench/train_step_report.py
```
"""


def page_section(content):
    """Markdown between the page's markers."""
    sizes = group_sizes(content)
    titles = [f"G = {g}" for g in sizes]
    rows = []
    for objective, title in TITLES.items():
        rows.append([f"**{title}**", *[""] * len(sizes)])
        for same in zip(*[ladder(content, g, objective) for g in sizes], strict=True):
            cells = [f"{r['seconds']:.2f} ({r['peak_bytes'] / 1e6:.0f})" for r in same]
            ours = same[0]["way"] in OURS.values()
            rows.append([same[0]["way"], *[f"**{c}**" if ours else c for c in cells]])
    seconds = _markdown(["seconds per update (peak MB)", *titles], rows)
    rows = {}
    for target, _, ratio, flops, _, _ in ratios(content):
        row = rows.setdefault(target.name, [target.name])
        row.append(f"{ratio:.2f}" + ("" if flops is None else f" ({flops:.2f})"))
    found = content["records"]
    return SECTION.format(
        seconds=seconds,
        ratios=_markdown(["ratio of seconds (of FLOPs)", *titles], rows.values()),
        threads=content["machine"]["threads"],
        lengths=" : ".join(map(str, content["image_text_response"])),
        shares=", ".join(
            f"{LABELS[p]} {content['shares'][p]:.0%} ({content['shares_of_3b'][p]:.0%})"
            for p in PARTS
        ),
        same=max(r["gradient_error"] for r in found),
        sparse=max(r["gradient_error_with_budget"] or 0.0 for r in found),
    )


def _markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(content, path):
    """Bars of seconds, divided by where the FLOPs go."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = group_sizes(content)
    figure, axes = plt.subplots(1, len(sizes), figsize=(13, 6.6), sharey=True, squeeze=False)
    for ax, g in zip(axes[0], sizes, strict=True):
        y, ticks, names = 0.0, [], []
        for objective, title in TITLES.items():
            rows = ladder(content, g, objective)
            ax.text(0, y, title, fontsize=10.5, fontweight="bold", va="center", color="#333333")
            y += 1
            for r in rows:
                total, left = sum(r["flops"].values()), 0.0
                ours = r["way"] in OURS.values()
                for part in PARTS:
                    width = r["seconds"] * r["flops"][part] / total
                    ax.barh(y, width, 0.78, left, color=COLORS[part], alpha=1 if ours else 0.62)
                    left += width
                speed = rows[0]["seconds"] / r["seconds"]
                note = f" {r['seconds']:.2f} s" + (f"  {speed:.1f}×" if r is not rows[0] else "")
                weight = "bold" if ours else "normal"
                ax.text(left, y, note, va="center", fontsize=9, fontweight=weight)
                ticks.append(y)
                names.append(r["way"])
                y += 1
            y += 0.5
        ax.set_title(f"G = {g} responses per prompt", fontsize=12)
        ax.set_xlabel("seconds per update, without sampling")
        ax.set_yticks(ticks, names, fontsize=9)
        for label in ax.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() in OURS.values() else "normal")
        ax.set_xlim(0, 1.22 * max(r["seconds"] for r in content["records"] if r["group_size"] == g))
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.grid(axis="x", alpha=0.25)
        ax.set_axisbelow(True)
    axes[0, 0].invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[p]) for p in PARTS]
    figure.legend(
        handles,
        [f"{LABELS[p]} (share of FLOPs)" for p in PARTS],
        loc="lower center",
        ncols=3,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=RESULT, help="JSON written by train_step.py"
    )
    args = parser.parse_args(arguments)
    if not args.results.is_file():
        parser.error(f"there is no {args.results}: run bench/train_step.py --size full first")
    content = json.loads(args.results.read_text())
    console = Console(width=max(128, Console().width))
    show(content, console)
    picture(content, ROOT / "docs" / "images" / "train_step.png")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        parser.error(f"{PAGE.name} has no section between {BEGIN} and {END}")
    PAGE.write_text(f"{before}{BEGIN}\n{page_section(content)}{END}{after}", encoding="utf-8")
    console.print(f"Written: docs/images/train_step.png and the section of docs/{PAGE.name}")


if __name__ == "__main__":
    main()
