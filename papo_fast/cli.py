"""`papo-fast train | eval | presets | report | …`; options by tyro from the config."""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from papo_fast import __version__
from papo_fast.config import Config
from papo_fast.consoles import as_command, make_console, say
from papo_fast.errors import InputError

USAGE = """\
[bold]papo-fast[/bold]: perception-aware RL for vision-language models

  papo-fast train PRESET ...      train; PRESET is one of the names below
  papo-fast train --config FILE   train by a .yaml or .json file
  papo-fast eval RUN ...          mean@k accuracy of a finished run's model
  papo-fast eval --model DIR ...  mean@k accuracy of a checkpoint
  papo-fast presets               presets: methods, sources, values, equations
  papo-fast report RUN            table and picture of a run
  papo-fast serve PRESET ...      a vLLM server for runs with the same options
  papo-fast plan ...              memory per GPU and time, before anything runs
  papo-fast doctor                what is installed, what runs, what is missing

Every command explains its options with --help."""

_ABOUT = {  # of the commands that take a preset
    "train": "train by a preset, changed by options",
    "serve": "a vLLM server for runs with the same options",
}

T = TypeVar("T")


@dataclass
class EvalArguments:
    """Mean@k accuracy of a checkpoint; of a finished run's model: `papo-fast eval RUN --help`."""

    model: str
    """Checkpoint folder, or a name on the Hugging Face hub."""
    data: str
    """Questions: a .parquet or .jsonl file."""
    preset: str = "papo-g-3b"
    """Preset whose data and rollout settings are used; `tiny` for the built-in task."""
    samples: int = 8
    """k, samples per question."""
    limit: int = 0
    """Questions per kind; 0: all."""
    corrupted: bool = True
    """Also with corrupted images."""
    seed: int = 0
    """Seed of sampling and corruptions."""


@dataclass
class ReportArguments:
    """Table and picture of a run: `papo-fast report RUN`."""

    run: str
    """The run's folder, e.g. runs/tiny-seed0; it may stand first, without --run."""
    beside: tuple[str, ...] = ()
    """Folders of other runs, e.g. a baseline's, to show beside it."""


def run() -> NoReturn:
    """The `papo-fast` command, also as `python -m papo_fast`: `main` on the command's words."""
    leave(as_command(main))


def leave(status: int) -> NoReturn:
    """End this process with `status`; one of several goes without tearing the interpreter down.

    FSDP2's caches hold the mesh, so the groups' threads outlive `destroy_process_group`. One that
    asks for the GIL while the interpreter goes is unwound through C++ and takes the process with
    it ("terminate called without an active exception"), after all its work was done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()  # as multiprocessing ends its own processes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    console = make_console()
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
        force=True,
    )
    _quiet_libraries()
    _mend_torchvision()
    commands = {
        "train": _train,
        "eval": _eval,
        "presets": _presets,
        "report": _report,
        "serve": _serve,
        "plan": _plan,
        "doctor": _doctor,
    }
    if argv[:1] == ["--version"]:
        console.print(f"papo_fast {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        console.print(USAGE)
        console.print("\npresets: " + ", ".join(_preset_names()))
        return 0
    try:
        if argv[0] not in commands:
            raise InputError(f"unknown command {argv[0]!r}{_suggest(argv[0], commands)}")
        return commands[argv[0]](argv[1:], console)
    except InputError as error:
        say(make_console(stderr=True), Text.assemble(("error:", "red"), f" {error}"))
        return 2
    except KeyboardInterrupt:
        make_console(stderr=True).print("interrupted; what is written stays in the run's folder")
        return 130


def _train(argv: list[str], console: Console) -> int:
    config = _parse_config("train", argv, console)
    if config is not None:
        from papo_fast.launch import train

        train(config, console)
    return 0


def _serve(argv: list[str], console: Console) -> int:
    config = _parse_config("serve", argv, console)
    if config is not None:
        from papo_fast.launch import serve

        serve(config, console)
    return 0


def _parse_config(command: str, argv: list[str], console: Console) -> Config | None:
    """The preset that is named first, or the file of --config, or both, changed by the options;
    None where help was asked for."""
    from papo_fast.presets import PRESETS

    file, argv = _taken(argv, "--config")
    if not argv and file is None:
        raise InputError(
            f"{command} needs a preset or --config FILE; presets: " + ", ".join(PRESETS)
        )
    if argv and argv[0] in ("-h", "--help") and file is None:
        console.print(f"papo-fast {command} PRESET ...: {_ABOUT[command]}\n")
        for preset, (help_text, _) in PRESETS.items():
            console.print(f"  {preset:<14} {help_text}")
        console.print(f"\noptions of one: papo-fast {command} PRESET --help")
        return None
    name = argv.pop(0) if argv and (file is None or not argv[0].startswith("-")) else None
    about, default = _start(name, file)
    prog = f"papo-fast {command} {name or '--config ' + str(file)}"
    return _parse(type(default), argv, prog, default=default, about=about)


def _start(name: str | None, file: str | None) -> tuple[str, Config]:
    """What the options change, and what is said of it: a preset, and a file's settings upon it.

    Without a preset it is the one that the file names, or the defaults.
    """
    from papo_fast.config_file import read_settings, with_settings
    from papo_fast.presets import PRESETS

    settings = {} if file is None else read_settings(file)
    where = f"{file}: " if name is None else ""
    name = settings.get("preset") or None if name is None else name
    if name is not None and not (isinstance(name, str) and name in PRESETS):
        raise InputError(f"{where}unknown preset {name!r:.80}{_suggest(str(name), list(PRESETS))}")
    about, config = ("Settings of a file.", Config()) if name is None else PRESETS[name]
    settings = {key: value for key, value in settings.items() if key != "preset"}
    return about, config if file is None else with_settings(config, settings, file)


def _taken(argv: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option that stands anywhere, and the words without it."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        if word == option:
            value = next(words, "")
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    if value == "":
        raise InputError(f"{option} needs a value")
    return value, rest


def _parse(
    kind: type[T], argv: list[str], prog: str, *, default: T | None = None, about: str | None = None
) -> T | None:
    """What the options say, changing `default`; None where help was asked for, which is printed.

    Raises `InputError`, one line, for options that tyro would refuse by a box of many.
    """
    import tyro

    call = functools.partial(tyro.cli, kind, args=argv, prog=prog, description=about)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parsed: T | None = call() if default is None else call(default=default)
    except SystemExit as end:
        if end.code:
            raise InputError(_one_line(said.getvalue()) or f"see {prog} --help") from end
        parsed = None
    sys.stderr.write(said.getvalue())  # warnings
    return parsed


def _one_line(box: str) -> str:
    """What a box of tyro's says, which begins with a title; frame and colours are left out."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    parts = [""]
    for line in [line.strip("│╰╯ ") for line in lines][1:]:
        if line.strip("─-"):
            parts[-1] += f" {line}"
        else:  # a rule, which parts what is wrong from the help
            parts.append("")
    return "; ".join(part for p in parts if (part := " ".join(p.split()).rstrip(".")))


def _eval(argv: list[str], console: Console) -> int:
    if argv and not argv[0].startswith("-"):
        return _eval_run(argv[0], argv[1:], console)
    arguments = _parse(EvalArguments, argv, "papo-fast eval")
    if arguments is None:
        return 0
    _, preset = _start(arguments.preset, None)
    config = dataclasses.replace(
        preset,
        seed=arguments.seed,
        model=dataclasses.replace(preset.model, path=arguments.model),
        data=dataclasses.replace(preset.data, train=arguments.data, test=arguments.data),
        eval=dataclasses.replace(
            preset.eval,
            samples=arguments.samples,
            limit=arguments.limit,
            corrupted=arguments.corrupted,
        ),
        digits=dataclasses.replace(preset.digits, enabled=False),
    )
    return _evaluate(config, console)


def _evaluate(config: Config, console: Console) -> int:
    from papo_fast.launch import evaluate  # not for --help: it takes seconds

    evaluate(config, console)
    return 0


def _eval_run(run: str, argv: list[str], console: Console) -> int:
    from papo_fast.config_file import CONFIG, as_evaluated

    folder = Path(run)
    for name in (CONFIG, "model"):
        if not (folder / name).exists():
            raise InputError(
                f"{run} holds no {name}: expected the folder of a finished run, or --model DIR and "
                "--data FILE"
            )
    _, default = _start(None, str(folder / CONFIG))
    default = as_evaluated(default, str(folder / "model"))
    config = _parse(Config, argv, f"papo-fast eval {run}", default=default, about=_eval_run_help)
    return 0 if config is None else _evaluate(config, console)


_eval_run_help = "Mean@k of a run's model, as the run evaluated it; every setting may be changed."


def _report(argv: list[str], console: Console) -> int:
    # the run is the one thing this command is about: take it without a flag
    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    arguments = _parse(ReportArguments, argv, "papo-fast report")
    if arguments is None:
        return 0
    from papo_fast.report import print_run

    print_run(Path(arguments.run), console, [Path(other) for other in arguments.beside])
    return 0


def _plan(argv: list[str], console: Console) -> int:
    from papo_fast.planning.arguments import PlanArguments

    # these come first, whatever place they stand in: the other options change them
    name, argv = _taken(argv, "--preset")
    file, argv = _taken(argv, "--config")
    _, config = _start(name or ("papo-g-7b" if file is None else None), file)
    arguments = _parse(PlanArguments, argv, "papo-fast plan", default=PlanArguments(config))
    if arguments is not None:
        from papo_fast.planning.command import print_plan

        print_plan(arguments, console)
    return 0


def _presets(argv: list[str], console: Console) -> int:
    if _help_of_none("presets", argv, console):
        return 0
    from papo_fast.methods import print_presets

    print_presets(console)
    return 0


def _doctor(argv: list[str], console: Console) -> int:
    if _help_of_none("doctor", argv, console):
        return 0
    from papo_fast.doctor import print_report

    return print_report(console)


def _help_of_none(command: str, argv: list[str], console: Console) -> bool:
    """Whether help was asked for, which is printed: the command takes no options."""
    if argv and argv[0] not in ("-h", "--help"):
        raise InputError(f"{command} takes no options; got {' '.join(argv)}")
    if argv:
        console.print(f"papo-fast {command} takes no options; papo-fast --help says what it does")
    return bool(argv)


def _quiet_libraries() -> None:
    # their progress bars would break through ours; warnings and errors stay
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("httpx", "datasets", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _mend_torchvision() -> None:
    """Before anything imports transformers, which imports torchvision where it is installed."""
    from papo_fast.rollout.vllm_on_cpu import sitecustomize

    sitecustomize.install()


def _preset_names() -> list[str]:
    from papo_fast.presets import PRESETS

    return list(PRESETS)


def _suggest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    start = f": did you mean {close[0]!r}? Expected" if close else "; expected"
    return f"{start} one of {', '.join(known)}"


if __name__ == "__main__":
    run()
