"""Tables of docs/ that scripts of that folder make: they are what the scripts would write now."""

from __future__ import annotations

import importlib

import pytest

from support import TESTS

DOCS = TESTS.parent / "docs"


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name; it is not run."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module


@pytest.mark.parametrize("page", ["hardware", "scaling", "kernels"])
def test_the_tables_of_a_page_are_what_its_script_makes(script, page):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    parts = script(f"make_{page}").parts()
    assert parts
    for name, made in parts.items():
        shown = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
        assert shown == made, f"run docs/make_{page}.py"


def test_rows_of_throughput_are_named_after_models(script):
    lines = script("make_scaling").throughput().splitlines()[2:]
    names = [name for model in ("3B", "7B", "32B") for name in (model, f"{model}, overlapped")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == names


def test_what_stands_between_two_markers_is_replaced_and_nothing_else(
    script, tmp_path, monkeypatch
):
    made_pages = script("made_pages")
    monkeypatch.setattr(made_pages, "DOCS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n<!-- y -->\n<!-- end of y -->\nc\n")
    rows = made_pages.table([("one", "", "1")], ("", "b", "c"), numbers=1)
    assert rows == "| | b | c |\n| --- | --- | ---: |\n| one | | 1 |\n"
    made_pages.write_between("page.md", {"x": rows, "y": "new\n"})
    assert page.read_text() == (
        f"a\n<!-- x -->\n{rows}<!-- end of x -->\nb\n<!-- y -->\nnew\n<!-- end of y -->\nc\n"
    )
    with pytest.raises(ValueError, match="not enough values"):
        made_pages.write_between("page.md", {"z": ""})
