"""docs/evidence.md and its pictures, from the results that are there.

The page's words are written by hand. What stands between `<!-- NAME -->` and `<!-- end NAME -->` is
written here, anew each time, and says how many seeds there are and what is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from bench.evidence.arms import ADDED, ARMS, BASE_OF_ADDED, BASELINE, PAIRS
from bench.evidence.choice import chosen_settings
from bench.evidence.figures import draw_differences, draw_gammas
from bench.evidence.outcomes import (
    OUTCOMES,
    by_seed,
    differences,
    honesty,
    pair_differences,
    results_of_test,
)
from bench.evidence.protocol import (
    DEVELOPMENT_SEEDS,
    HONEST,
    ROOT,
    SWEEP_SEEDS,
    TASKS,
    TEST_SEEDS,
    TUNED_ON,
    Cell,
    arms_of,
    mean,
)
from bench.evidence.runner import result_of
from bench.evidence.statistics import Difference
from papo_fast.errors import InputError

PAGE = ROOT / "docs" / "evidence.md"
IMAGES = ROOT / "docs" / "images"
NOT_YET = "The arms are compared when all of them have all seeds."


def write_report(results: Path, page: Path = PAGE, images: Path = IMAGES) -> str:
    """Write tables and pictures; what to tell the user."""
    chosen = chosen_settings(results)
    text, drawn = page.read_text(encoding="utf-8"), []
    tuned = development_results(results)
    content = development_table(tuned, chosen)
    if any(runs for settings in tuned.values() for runs in settings.values()):
        drawn.append(draw_gammas(tuned, images / "evidence_gamma.png"))
        content += _picture("accuracy, honesty check and KL against γ", drawn[-1])
    text = replaced(text, "development", content)
    for task in TASKS:
        found = results_of_test(results, task, chosen)
        text = replaced(text, f"{task} seeds", seeds_said(task, found, chosen))
        if not is_complete(task, found):
            found = {}  # nobody looks before all is there
        content = outcome_table(task, found, chosen)
        if found:
            drawn.append(draw_differences(task, found, images / f"evidence_{task}.png"))
            content += _picture(f"differences to GRPO on {task}", drawn[-1])
        text = replaced(text, f"{task} outcomes", content)
        text = replaced(text, f"{task} looking", looking_table(found))
        text = replaced(text, f"{task} pairs", pairs_table(task, found))
        text = replaced(text, f"{task} added", added_table(task, found))
    page.write_text(text, encoding="utf-8")
    return "\n".join(str(path) for path in (page, *drawn))


def _picture(says: str, path: Path) -> str:
    return f"\n\n![{says}]({path.parent.name}/{path.name})"


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the two marks of `name`."""
    pattern = re.compile(
        rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end {re.escape(name)} -->)", re.S
    )
    if not pattern.search(text):
        raise InputError(f"the page has no place `<!-- {name} -->` … `<!-- end {name} -->`")
    return pattern.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text)


def is_complete(task: str, found: dict[str, dict[int, dict]]) -> bool:
    """Whether all arms have all seeds, save those of the addendum: then they are compared."""
    main = [name for name in arms_of(task) if name not in ADDED]
    return all(len(found.get(name, ())) == len(TEST_SEEDS) for name in main)


def seeds_said(task: str, found: dict[str, dict[int, dict]], chosen: dict[str, str]) -> str:
    """How much of the test is there."""
    lines, arms = [], arms_of(task)
    complete = [name for name in arms if len(found.get(name, ())) == len(TEST_SEEDS)]
    done = sum(map(len, found.values()))
    lines.append(
        f"{done} of {len(arms) * len(TEST_SEEDS)} test runs are there; {len(complete)} of "
        f"{len(arms)} arms have all {len(TEST_SEEDS)} seeds."
    )
    for name in arms:
        if name in complete:
            continue
        why = ARMS[name].missing() or ("" if name in chosen else "it has no setting yet")
        n = len(found.get(name, ()))
        lines.append(f"- `{name}`: {n} of {len(TEST_SEEDS)} seeds" + (f" ({why})" if why else ""))
    commits = {run["git_commit"][:10] for runs in found.values() for run in runs.values()}
    seeds: dict[str, set[int]] = {}
    for runs in found.values():
        for seed, run in runs.items():
            kind = f"{run['machine']['cpu']} with {run['machine']['capability']}"
            seeds.setdefault(kind, set()).add(seed)
    if done:
        kinds = (f"{kind} (seeds {_listed(of)})" for kind, of in sorted(seeds.items()))
        lines.append(f"\nCommits: {', '.join(sorted(commits))}. Processors: {', '.join(kinds)}.")
    return "\n".join(lines)


def _listed(seeds: set[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))


def outcome_table(task: str, found: dict[str, dict[int, dict]], chosen: dict[str, str]) -> str:
    """All arms: GRPO's shares, and of the others the paired differences to it, in points."""
    if BASELINE not in found:
        return NOT_YET
    outcomes = OUTCOMES[task]
    against = {key: differences(outcome, found) for key, outcome in outcomes.items()}
    head = ["arm", "setting", "seeds", *(o.says for o in outcomes.values()), "collapsed", "min"]
    rows = []
    for name, runs in found.items():
        cells = [
            _percent(mean(list(by_seed(outcome, runs).values())))
            if name == BASELINE
            else _difference(against[key][name])
            for key, outcome in outcomes.items()
        ]
        collapsed = sum(run["collapsed"] for run in runs.values())
        minutes = mean([run["seconds"]["all"] for run in runs.values()]) / 60
        facts = [
            f"`{name}`",
            chosen[name],
            str(len(runs)),
            *cells,
            str(collapsed),
            f"{minutes:.1f}",
        ]
        rows.append(facts)
    return (
        table(head, rows)
        + "\n\nFirst row: per cent. Other rows: points more or fewer than GRPO's on the same seeds,"
        " with the 95 % interval, and p after Holm's correction over the arms."
    )


def pairs_table(task: str, found: dict[str, dict[int, dict]]) -> str:
    """Which form of the KL is better: paired differences between two of them, in points."""
    if not found:
        return NOT_YET
    outcomes = OUTCOMES[task]
    against = {key: pair_differences(x, found) for key, x in outcomes.items()}
    rows = [
        [f"`{arm}` − `{base}`", str(len(found[arm].keys() & found[base].keys()))]
        + [_difference(against[key].get((arm, base))) for key in outcomes]
        for arm, base in PAIRS
        if arm in found and base in found
    ]
    return table(["pair", "seeds", *(o.says for o in outcomes.values())], rows)


def added_table(task: str, found: dict[str, dict[int, dict]]) -> str:
    """The arms of the addendum: their paired differences to the arm that they change."""
    added = {name: runs for name, runs in found.items() if name in (*ADDED, BASE_OF_ADDED)}
    if BASE_OF_ADDED not in added or len(added) == 1:
        return "No test run of the addendum yet."
    outcomes = OUTCOMES[task]
    against = {key: differences(x, added, BASE_OF_ADDED) for key, x in outcomes.items()}
    rows = [
        [f"`{name}`", str(len(runs)), *(_difference(against[key][name]) for key in outcomes)]
        for name, runs in added.items()
        if name != BASE_OF_ADDED
    ]
    return table(["arm", "seeds", *(o.says for o in outcomes.values())], rows)


def looking_table(found: dict[str, dict[int, dict]]) -> str:
    """Does a policy look, or does it detect black patches?"""
    if not found:
        return NOT_YET
    grpo = {seed: honesty(run) for seed, run in found.get(BASELINE, {}).items()}
    rows = []
    for name, runs in found.items():
        after = [run["measures"]["after"] for run in runs.values()]
        dishonest = [
            seed for seed, run in runs.items()
            if seed in grpo and honesty(run) < grpo[seed] - HONEST
        ]  # fmt: skip
        ruler = {key: mean([m["ruler"][key] for m in after]) for key in after[0]["ruler"]}
        rows.append(
            [
                f"`{name}`",
                _percent(mean([honesty(run) for run in runs.values()])),
                f"{len(dishonest)} of {len(runs)}",
                _percent(_mean([m["corrupted"]["given"] for m in after])),
                _percent(_mean([m["swapped"]["given"] for m in after])),
                _percent(_mean([m["swapped"]["read"] for m in after])),
                *(
                    f"{ruler[k]:.2f}"
                    for k in ("kl_prcp", "kl_first_token", "entropy", "aug_entropy")
                ),
                f"{sum(bool(run['alarms']) for run in runs.values())} of {len(runs)}",
            ]
        )
    before = [run["measures"]["before"] for run in next(iter(found.values())).values()]
    ruler = {key: mean([m["ruler"][key] for m in before]) for key in before[0]["ruler"]}
    first = next(iter(found.values())).values()
    rows.insert(
        0,
        [
            "warm start",
            _percent(mean([honesty(run, "before") for run in first])),
            "–",
            _percent(_mean([m["corrupted"]["given"] for m in before])),
            _percent(_mean([m["swapped"]["given"] for m in before])),
            _percent(_mean([m["swapped"]["read"] for m in before])),
            *(f"{ruler[k]:.2f}" for k in ("kl_prcp", "kl_first_token", "entropy", "aug_entropy")),
            "–",
        ],
    )
    head = [
        "arm",
        "honesty check, %",
        f"seeds {100 * HONEST:.0f} points below GRPO",
        "all given in the text, corrupted, %",
        "the same, swapped, %",
        "swapped picture read right, %",
        "KL, nats",
        "KL of the first token",
        "entropy",
        "corrupted entropy",
        "seeds with alarms",
    ]
    return table(head, rows)


def development_results(results: Path) -> dict[str, dict[str, list[dict]]]:
    """Arm → setting → results of the development seeds, of those that are there."""
    found: dict[str, dict[str, list[dict]]] = {}
    for name, arm in ARMS.items():
        for stage, settings, seeds in (
            ("development", arm.settings, DEVELOPMENT_SEEDS),
            ("sweep", arm.beyond, SWEEP_SEEDS),
        ):
            for setting in settings:
                runs = [result_of(Cell(stage, TUNED_ON, arm, setting, s), results) for s in seeds]
                found.setdefault(name, {})[setting.name] = [run for run in runs if run is not None]
    return found


def development_table(tuned: dict[str, dict[str, list[dict]]], chosen: dict[str, str]) -> str:
    vision = OUTCOMES[TUNED_ON]["vision"]
    rows = []
    for name, settings in tuned.items():
        for setting, runs in settings.items():
            if not runs:
                continue
            kls = [run["kl_prcp_largest"] for run in runs if run["kl_prcp_largest"] is not None]
            collapsed = sum(run["collapsed"] for run in runs)
            rows.append(
                [
                    f"`{name}`",
                    f"**{setting}**" if chosen.get(name) == setting else setting,
                    str(len(runs)),
                    _percent(mean([vision.of(run) for run in runs])),
                    _percent(mean([honesty(run) for run in runs])),
                    f"{max(kls):.2f}" if kls else "–",
                    f"{collapsed} of {len(runs)}",
                ]
            )
    if not rows:
        return "No development run yet."
    head = ["arm", "setting", "seeds", vision.says + ", %", "honesty check, %", "largest KL, nats",
            "collapsed"]  # fmt: skip
    missing = sum(
        (len(SWEEP_SEEDS) if setting in [s.name for s in ARMS[name].beyond] else
         len(DEVELOPMENT_SEEDS)) - len(runs)
        for name, settings in tuned.items() for setting, runs in settings.items()
    )  # fmt: skip
    return table(head, rows) + f"\n\nChosen settings are bold. {missing} runs are missing."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _difference(found: Difference | None) -> str:
    if found is None:
        return "–"
    text = f"{100 * found.mean:+.1f}"
    if math.isnan(found.low):
        return f"{text} (one seed)"
    return f"{text} [{100 * found.low:+.1f}, {100 * found.high:+.1f}] p {found.adjusted:.2g}"
