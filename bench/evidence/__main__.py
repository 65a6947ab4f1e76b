"""`python -m bench.evidence protocol | run | choose | report | status`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench.evidence.arms import ARMS
from bench.evidence.choice import choose, chosen_settings
from bench.evidence.protocol import RESULTS, STAGES, TASKS, Cell, cells, seeds_outside
from bench.evidence.runner import SCRATCH, Plan, result_of, work, work_in_processes
from papo_fast.consoles import as_command
from papo_fast.errors import InputError


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("protocol", help="print the fixed protocol")
    for name, what in (("run", "make the runs that are not done"), ("status", "count them")):
        of = commands.add_parser(name, help=what)
        of.add_argument("--stage", choices=STAGES, default="test")
        of.add_argument("--tasks", nargs="+", choices=TASKS, default=())
        of.add_argument("--arms", nargs="+", choices=ARMS, default=(), metavar="ARM")
        of.add_argument("--seeds", nargs="+", type=int, default=(), metavar="N")
        of.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
        of.add_argument("--worker-of", type=int, default=0, help=argparse.SUPPRESS)
    commands.add_parser("choose", help="fix each arm's setting from its development runs")
    commands.add_parser("report", help="write docs/evidence.md and its pictures")
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = command_line().parse_args(argv)
    try:
        return COMMANDS[arguments.command](arguments, argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished runs stay", file=sys.stderr)
        return 130


def asked(arguments: argparse.Namespace) -> Plan:
    """The runs that the command line asks for."""
    seeds = tuple(arguments.seeds)
    if outside := seeds_outside(arguments.stage, seeds):
        raise InputError(
            f"seeds {outside} are not of the stage {arguments.stage}: see the command protocol"
        )
    chosen = chosen_settings(RESULTS) if arguments.stage == "test" else {}
    wanted = (arguments.stage, tuple(arguments.tasks), tuple(arguments.arms), seeds)
    left = [x for x in cells(*wanted, chosen) if x.stage != "sweep" or not collapsed_below(x)]
    found = Plan.of(left)
    without = [name for name in arguments.arms or ARMS if name not in chosen]
    lines = [f"skipped: arm {name} has no setting yet: see the command choose" for name in without]
    return Plan(found.cells, (*found.impossible, *lines * (arguments.stage == "test")))


def collapsed_below(cell: Cell) -> bool:
    """Whether the arm collapsed at its last setting of the development already."""
    below = Cell("development", cell.task, cell.arm, cell.arm.settings[-1], cell.seed)
    return bool((result_of(below, RESULTS) or {}).get("collapsed"))


def _run(arguments: argparse.Namespace, argv: list[str]) -> int:
    # two processes on two cores: more threads than one each would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("HF_HUB", "HF_DATASETS"):
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    plan, jobs = asked(arguments), arguments.jobs
    if not arguments.worker_of:
        for line in plan.impossible:
            print(line, flush=True)
        if all(result_of(cell, RESULTS) is not None for cell in plan.cells):
            print(f"all of {len(plan.cells)} runs are done")
            return 0
        if jobs > 1:
            return work_in_processes(argv[1:], jobs)
    from papo_fast.rollout.vllm_on_cpu import sitecustomize

    sitecustomize.install()  # before transformers is imported, as the command line does
    from bench.evidence.one_run import configure, train
    from papo_fast.config import RewardConfig
    from papo_fast.rewards.scorer import Scorer

    with Scorer(RewardConfig()) as scorer:

        def one(cell):
            return train(cell, configure(cell, SCRATCH), SCRATCH, scorer)

        failed = work(
            plan, RESULTS, SCRATCH, one, lambda line: print(line, flush=True),
            arguments.worker_of or 1,
        )  # fmt: skip
    return 1 if failed else 0


def _status(arguments: argparse.Namespace, argv: list[str]) -> int:
    plan = asked(arguments)
    for line in plan.impossible:
        print(line)
    done = [cell for cell in plan.cells if result_of(cell, RESULTS) is not None]
    print(f"{len(done)} of {len(plan.cells)} runs are done")
    for cell in plan.cells:
        if cell not in done:
            print(f"missing: {cell}")
    return 0


def _choose(arguments: argparse.Namespace, argv: list[str]) -> int:
    print(choose(RESULTS))
    return 0


def _protocol(arguments: argparse.Namespace, argv: list[str]) -> int:
    print(Path(__file__).with_name("PROTOCOL.md").read_text(), end="")
    return 0


def _report(arguments: argparse.Namespace, argv: list[str]) -> int:
    from bench.evidence.report import write_report

    print(write_report(RESULTS))
    return 0


COMMANDS = {
    "run": _run,
    "status": _status,
    "choose": _choose,
    "protocol": _protocol,
    "report": _report,
}

if __name__ == "__main__":
    sys.exit(as_command(main))
