"""The sizes that docs/kernels.md names are those of the sources."""

import re
from pathlib import Path

from papo_kernels.chunked_forward import TILE_ROWS
from papo_kernels.cpu import library
from papo_kernels.triton import launch

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


def constant(name, source):
    """The number that an enum of a C++ source gives to `name`."""
    text = (library.SOURCES / source).read_text(encoding="utf-8")
    (found,) = set(re.findall(rf"\b{name} = (\d+)", text))
    return int(found)


def named(pattern):
    """The numbers in the only place of the page that `pattern` matches."""
    (found,) = re.findall(pattern, PAGE)
    return tuple(map(int, (found,) if isinstance(found, str) else found))


def test_blocks_of_the_gradients_are_those_of_the_cpp():
    sizes = constant("COLUMNS", "gradients.cpp"), constant("PANEL", "gradients.cpp")
    assert named(r"per block of (\d+) columns and (\d+) features") == sizes


def test_sums_go_to_memory_as_often_as_in_the_cpp():
    assert named(r"go to memory every (\d+) features") == (constant("FEATURES", "vectors.h"),)


def test_tiles_have_the_rows_of_the_sources():
    assert named(r"Rows go in tiles \((\d+) on the CPU, (\d+) on a GPU\)") == (
        TILE_ROWS,
        launch.TILE,
    )
    assert named(r"lanes are the (\d+) rows of a tile \(both streams\)") == (2 * TILE_ROWS,)


def test_a_call_uses_the_cpp_from_as_many_logits_as_the_page_says():
    superscripts = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
    (power,) = re.findall(r"with at least 2([⁰¹²³⁴⁵⁶⁷⁸⁹]+) logits", PAGE)
    # the tests' own conftest lowers it, so the source is asked
    source = Path(library.__file__).read_text(encoding="utf-8")
    assert f"LEAST_LOGITS = 1 << {power.translate(superscripts)}\n" in source
