"""table.md: what gpu.json says, as Markdown. Knows neither torch nor a GPU."""

# The names that `ways` gives them.
FLOOR = "six bare matmuls"
SHAPE = ("states", "N", "D", "V")
PROFILED = 12
# The section of other people's programs: what fails there is no failure of ours.
NOT_OURS = "peers"


def failed(content):
    """What was wrong, one line each: failed checks, and items of ours that did not run."""
    checks = [f"{c['what']}: {', '.join(c['failed'])}" for c in content["checks"] if c["failed"]]
    items = [
        f"{f['what']}: {f['error'].splitlines()[0]}"
        for f in content["failures"]
        if f["section"] != NOT_OURS
    ]
    return checks + items


def table(content):
    """All that was measured, the failed checks first."""
    machine = ", ".join(f"{k} {v}" for k, v in content["machine"].items())
    parts = [f"Measured on: {machine}", _checks(content), _times(content)]
    parts += [
        _ceilings(content),
        _profiles(content),
        _clocks(content),
        _winners(content["winners"]),
    ]
    out = [f"{x['what']}: {x['reason']}" for x in content["left_out"]]
    out += [f"{f['what']}: {f['error']}" for f in content["failures"] if f["section"] == NOT_OURS]
    parts.append(_list("Left out:", out))
    parts.append(
        "Sections: " + ", ".join(f"{s['name']} {s['seconds']:.0f} s" for s in content["sections"])
    )
    return "\n\n".join(part for part in parts if part)


def _list(title, items):
    return "\n".join([title, "", *(f"- {_line(x)}" for x in items)]) if items else ""


def _line(text):
    return " ".join(text.split())[:240]


def _checks(content):
    wrong = failed(content)
    right = sum(not c["failed"] for c in content["checks"])
    said = f"{right} of {len(content['checks'])} checks passed."
    return "\n\n".join(
        [said, *([_list("Failed:", [f"**{_line(x)}**" for x in wrong])] if wrong else [])]
    )


def _times(content):
    lines = [
        "| states | N | D | V | | ms | / six matmuls | TFLOP/s nominal | kept | dense rows "
        "| peak extra, MiB |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    floors = {
        tuple(r[k] for k in SHAPE): r["seconds"] for r in content["times"] if r["way"] == FLOOR
    }
    for r in content["times"]:
        floor = floors.get(tuple(r[k] for k in SHAPE))
        cells = [*(r[k] for k in SHAPE), r["way"], f"{1e3 * r['seconds']:.2f}"]
        cells.append(f"{r['seconds'] / floor:.2f}" if floor else "–")
        cells.append(f"{r['tflops']:.0f}")
        cells += [f"{r['kept']:.2%}", r["dense_rows"]] if r.get("rows") else ["–", "–"]
        cells.append(f"{r['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in r else "–")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        f"\n{s['name']}, N = {s['N']}, V = {s['V']}: entropy {s['entropy']:.2f} (corrupted "
        f"{s['aug_entropy']:.2f}), KL {s['kl_prcp']:.2g} nats"
        for s in content["states"]
    ]
    return "\n".join(lines) if content["times"] else ""


def _ceilings(content):
    return _list(
        "Ceilings:",
        [
            f"{c['what']}: "
            + (f"{c['tflops']:.0f} TFLOP/s" if "tflops" in c else f"{c['tbytes']:.2f} TB/s")
            for c in content["ceilings"]
        ],
    )


def _profiles(content):
    parts = []
    for p in content["profiles"]:
        whole = sum(k["ms"] for k in p["kernels"])
        lines = [
            f"{p['what']}: {p['wall_ms']:.2f} ms, kernels {whole:.2f} ms", "",
            "| kernel | count | ms | share |", "|---|---:|---:|---:|",
        ]  # fmt: skip
        for k in p["kernels"][:PROFILED]:
            name = k["name"][:80].replace("|", "\\|")
            lines.append(f"| `{name}` | {k['count']} | {k['ms']:.3f} | {k['share']:.1%} |")
        calls = ", ".join(f"{r['name']} {r['count']}" for r in p["host"][:8])
        parts.append("\n".join([*lines, *([f"\nHost: {calls}"] if calls else [])]))
    return "\n\n".join(parts)


def _clocks(content):
    return _list(
        "Clocks:", [f"{c['section']}, {c['when']}: {c['said']}" for c in content["clocks"]]
    )


def _winners(winners):
    """To paste into LAUNCHES of papo_kernels/triton/launch.py."""
    if not winners:
        return ""
    title = "Winners, for LAUNCHES in kernels/papo_kernels/triton/launch.py:"
    return "\n".join([title, "", "```python", *(w["line"] for w in winners), "```"])
