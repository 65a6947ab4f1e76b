"""The developer's desk: what commands run, what messages tell one to install, who imports whom."""

import ast
import inspect
import os
import re
import subprocess
import tomllib
import typing
from pathlib import Path

import pytest

import papo_kernels
from papo_fast import doctor
from support import TESTS

ROOT = TESTS.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


# --- tests ----------------------------------------------------------------------------------------

# In a test's own code and in programs that it holds as text.
IMPORT = re.compile(r"^\s*(?:from|import)\s+(tests\b|(?:\w+\.)*test_\w+)", re.M)


def test_no_test_imports_from_another_test():
    modules = {path: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py")}
    named = {path.stem for path in modules if path.stem.startswith("test_")} | {"tests"}
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, text in modules.items()
        for name in IMPORT.findall(text)
        if name.rpartition(".")[2] in named
    ]
    assert found == []


@pytest.mark.parametrize(
    "line", ["from test_data import x", "    import test_data", "from tests.support import x"]
)
def test_the_check_sees_such_an_import(line):
    assert IMPORT.search(f'CODE = """\n{line}\n"""')


def test_what_tests_share_is_in_support():
    # tests/kernels also has helpers of its own: it is run alone, with nothing but papo_kernels
    strangers = [
        path.name
        for path in TESTS.glob("*.py")
        if not path.stem.startswith("test_") and path.name != "conftest.py"
    ]
    assert strangers == []


# --- commands -------------------------------------------------------------------------------------


def ci_with(make, folder):
    """Exit status of .ci/run with a stand-in for make, and what that was asked for."""
    folder.mkdir()
    (folder / "make").write_text(f'#!/bin/sh\necho "$* CI=$CI" >> {folder}/asked\n{make}\n')
    (folder / "make").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "CI"}
    environment["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")], cwd=folder, env=environment, capture_output=True
    )
    return done.returncode, (folder / "asked").read_text().splitlines(), done.stdout


def test_ci_runs_lint_types_and_tests_and_fails_where_one_does(tmp_path):
    wanted = ["lint", "types", "test"]
    status, asked, output = ci_with('echo "$1 is done"', tmp_path / "all")
    assert (status, asked) == (0, [f"{target} CI=1" for target in wanted])
    assert output.endswith(b"test is done\n"), "the tests' last line is the last of all"
    for target in wanted:
        status, asked, _ = ci_with(f'test "$1" != {target}', tmp_path / target)
        assert status != 0
        assert asked[-1] == f"{target} CI=1", "nothing runs after a failure"


def test_make_help_names_every_target():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())
    known = {"setup", "train", "check", "lint", "types", "test", "test-all", "bench", "clean"}
    assert targets >= known
    told = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^make ([\w-]+) ", told, re.M)) == targets - {"help"}
    rules = set(re.findall(r"^([a-z-]+):", text, re.M))
    assert rules == targets, "each is phony"


def test_the_fast_tests_of_make_check_are_there():
    listed = re.search(r"^FAST .*?:= ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    fixed = re.sub(r"\$\(wildcard .*?\)", "", listed)
    paths = re.findall(r"tests/\S+\.py", fixed)
    assert len(paths) >= 4
    assert [path for path in paths if not (ROOT / path).is_file()] == []


# --- extras ---------------------------------------------------------------------------------------

EXTRAS = re.compile(r"(?:'\.|papo[-_]fast)\[([a-z0-9,-]+)\]")
NAMES_EXTRAS = (
    "papo_fast/**/*.py",
    "kernels/**/*.py",
    "bench/*",
    "examples/*",
    "tests/**/*.py",
    "docs/**/*.md",
    "*.md",
    "Makefile",
    "constraints/*",
)


def test_every_extra_that_is_named_exists():
    known = PROJECT["project"]["optional-dependencies"].keys()
    named = {
        (extra, str(path.relative_to(ROOT)))
        for pattern in NAMES_EXTRAS
        for path in ROOT.glob(pattern)
        if path.is_file() and path.name != "test_docs.py"  # it names one that must not exist
        for listed in EXTRAS.findall(path.read_text(encoding="utf-8"))
        for extra in listed.split(",")
    }
    assert {extra for extra, _ in named} >= {"dev", "lora", "liger", "trl", "vllm", "flash"}
    assert [where for where in sorted(named) if where[0] not in known] == []
    assert {extra for extra, _, _ in doctor.OPTIONAL} <= known


# --- types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["papo_fast", "papo_kernels"])
def test_the_types_are_shipped(package):
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]
    folder = ROOT / package if package == "papo_fast" else ROOT / "kernels" / package
    assert (folder / "py.typed").is_file()


def test_what_the_kernels_offer_has_types():
    # papo_fast's public modules are checked by mypy; inside papo_kernels tensors go untyped
    parameters = inspect.signature(papo_kernels.token_stats).parameters
    hints = typing.get_type_hints(papo_kernels.token_stats)
    assert hints.keys() == {*parameters, "return"}
    assert hints["return"] is papo_kernels.TokenStats
    fields = typing.get_type_hints(papo_kernels.TokenStats)
    assert tuple(fields) == papo_kernels.TokenStats._fields


def test_mypy_checks_every_module_of_the_api_page():
    page = ast.parse((ROOT / "docs" / "make_api.py").read_text(encoding="utf-8"))
    [documented] = [
        ast.literal_eval(node.value)
        for node in page.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "MODULES"
    ]
    checked = [path.removesuffix(".py") for path in PROJECT["tool"]["mypy"]["files"]]
    ours = [name.replace(".", "/") for name in documented if name.startswith("papo_fast.")]
    assert ours
    unchecked = [path for path in ours if not {path, str(Path(path).parent)} & set(checked)]
    assert unchecked == []
