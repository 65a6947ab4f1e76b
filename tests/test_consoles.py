"""Nobody has to read what a command says, and whatever is wrong with its options is one line."""

from __future__ import annotations

import errno
import io
import os
import pty
import subprocess
import sys

import pytest
from rich.console import Console

from papo_fast.cli import main
from papo_fast.consoles import make_console, outlive_readers, say
from support import TESTS

COMMANDS = ["", "train --help", "train tiny --help", "plan --help", "eval --help", "doctor"]


def call(words, *more, **streams):
    """Exit status of the command where the home folder cannot be written to; stderr."""
    environment = {**os.environ, "HOME": "/proc"}
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE", "MPLCONFIGDIR"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "papo_fast", *words.split(), *more]
    streams = {"stderr": subprocess.PIPE, **streams}
    done = subprocess.run(command, env=environment, text=True, **streams)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", COMMANDS)
def test_a_reader_that_has_gone_is_no_error_even_where_home_is_not_writable(words):
    no_error_without_a_reader(words, os.pipe())


@pytest.mark.parametrize("words", ["", "train tiny --help"])
def test_a_terminal_that_was_closed_is_no_error(words):
    no_error_without_a_reader(words, pty.openpty())


def no_error_without_a_reader(words, pair):
    ours, theirs = pair
    os.close(ours)
    try:
        status, errors = call(words, stdout=theirs)
    finally:
        os.close(theirs)
    assert status == 0, errors
    assert "Error" not in errors and "Traceback" not in errors


def test_a_benchmark_whose_reader_has_gone_is_no_error():
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, str(TESTS.parent / "bench" / "implementations.py"), "--help"]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert done.returncode == 0 and "BrokenPipe" not in done.stderr, done.stderr


@pytest.mark.parametrize("words", ["presets", "train tiny --help"])
def test_a_full_disk_is_said_and_is_the_status(words):
    with open("/dev/full", "w") as full:
        status, errors = call(words, stdout=full)
    assert status == 1
    assert errors.startswith("what is printed is lost from here on: ")
    assert "No space left" in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EPIPE])
def test_the_work_goes_on_when_printing_fails(capsys, error):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(error, os.strerror(error))

    console = Console(file=Broken())
    outlive_readers(console)
    console.print("this fails")  # and raises nothing
    assert ("is lost" in capsys.readouterr().err) == (error == errno.ENOSPC)


@pytest.mark.parametrize("words", COMMANDS[:-1])
def test_help_loads_no_library(words):
    command = [sys.executable, "-X", "importtime", "-m", "papo_fast", *words.split()]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    loaded = {line.rpartition("|")[2].strip() for line in said.splitlines()}
    assert "papo_fast.cli" in loaded and not loaded & {"torch", "transformers"}


def test_the_module_of_the_command_is_the_command():
    command = [sys.executable, "-m", "papo_fast.cli", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown command 'nonsense'" in done.stderr


def test_a_stdout_that_the_shell_closed_is_no_error():
    status, errors = call("train tiny --help", preexec_fn=lambda: os.close(1))
    assert status == 0 and not errors


def test_what_a_terminal_cannot_write_is_no_error(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    status, errors = call("presets", stdout=subprocess.PIPE)
    assert status == 0 and not errors
    half = "\ud83d".encode("utf-8", "surrogatepass")  # half an emoji, as bytes of an argument
    status, errors = call("train", "--config", os.fsdecode(half))
    assert status == 2 and errors.startswith("error: ") and "Traceback" not in errors


def test_an_error_that_nobody_reads_keeps_its_status():
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        assert call("train nothing", stdout=theirs, stderr=theirs)[0] == 2
    finally:
        os.close(theirs)


def test_brackets_are_printed_as_they_are(capsys):
    for name in ("[/x]", "[bold]", r"a\[b"):
        assert main(["train", "grpo", name]) == 2
        assert name in capsys.readouterr().err
    say(make_console(), "resuming runs/[/x] after [bold]")
    assert capsys.readouterr().out == "resuming runs/[/x] after [bold]\n"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (
            "--train.lr=1e-6x",
            "error: Error parsing --train.lr: could not convert string to float: '1e-6x'; "
            "Argument helptext: --train.lr FLOAT Learning rate of AdamW. (default: 1e-06); "
            "For full helptext, see papo-fast train grpo --help",
        ),
        (
            "--nonsense=3",
            "error: Unrecognized options: --nonsense=3; For full helptext, run papo-fast train "
            "grpo --help",
        ),
    ],
)
def test_a_refused_option_is_one_line_and_no_box(capsys, option, expected):
    assert main(["train", "grpo", option]) == 2
    assert capsys.readouterr().err == f"{expected}\n"


def test_help_is_printed_whole(capsys):
    assert main(["train", "grpo", "--help"]) == 0
    said = capsys.readouterr()
    assert "--train.lr FLOAT" in said.out and not said.err
