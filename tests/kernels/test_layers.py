"""The layers of `papo_kernels`: what the ways share lies below them, and none imports another."""

import ast
from pathlib import Path

import pytest

import papo_kernels

PACKAGE = Path(papo_kernels.__file__).parent
WAYS = ("eager", "cpu", "triton")
# Each of them may import those before it.
BELOW_THE_WAYS = (
    "precision", "reference", "rows", "certificate", "equations", "sizes", "chunked_forward",
    "dense_rows", "chunked_backward",
)  # fmt: skip


def imported(source):
    """Names of the modules of papo_kernels that `source` imports, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide from this test"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {n.removeprefix("papo_kernels.") for n in names if n.startswith("papo_kernels.")}


def first_parts(path):
    return {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_imports_another(way):
    modules = sorted((PACKAGE / way).glob("*.py"))
    assert modules
    for path in modules:
        others = first_parts(path) - {way, *BELOW_THE_WAYS}
        assert not others, f"{way}/{path.name} imports {sorted(others)}"


@pytest.mark.parametrize("position", range(len(BELOW_THE_WAYS)), ids=BELOW_THE_WAYS.__getitem__)
def test_what_the_ways_share_imports_none_of_them(position):
    allowed = set(BELOW_THE_WAYS[:position])
    found = first_parts(PACKAGE / f"{BELOW_THE_WAYS[position]}.py")
    assert found <= allowed, sorted(found - allowed)


def test_every_module_is_in_a_layer():
    above = {"__init__", "api", "op"}
    names = {path.stem for path in PACKAGE.glob("*.py")}
    assert names == above | set(BELOW_THE_WAYS)
    folders = {path.parent.name for path in PACKAGE.rglob("*.py")} - {PACKAGE.name}
    assert folders == set(WAYS)


def test_the_check_sees_every_form_of_import():
    source = (
        "import papo_kernels.cpu.tiles\n"
        "from papo_kernels import eager\n"
        "def f():\n    from papo_kernels.triton import launch\n"
    )
    assert {name.split(".")[0] for name in imported(source)} == {"cpu", "eager", "triton"}
