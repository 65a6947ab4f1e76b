"""README.md and docs/ as tests read them: blocks of code, commands, tables and prose."""

from __future__ import annotations

import re
import shlex
import tomllib
from dataclasses import dataclass

from support import TESTS

ROOT = TESTS.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    """Of its first line of code, from 0."""
    language: str
    text: str
    given: tuple[str, ...]
    """Names that the reader has already: functions of tests/support/doc_givens.py."""
    continues: bool
    """Goes on where the page's last Python block ended."""

    def __str__(self):
        return f"{self.page}:{self.line + 1}"


def blocks_of(page):
    lines, found, start = page.read_text(encoding="utf-8").splitlines(), [], None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        above, comments = start - 1, []
        while above >= 0 and lines[above].startswith("<!--"):
            comments.append(lines[above].removeprefix("<!--").removesuffix("-->").strip())
            above -= 1
        given = [c.removeprefix("given:") for c in comments if c.startswith("given:")]
        found.append(
            Block(
                name_of(page),
                start + 1,
                lines[start].strip().removeprefix("```"),
                "\n".join(lines[start + 1 : number]),
                tuple(word.strip() for text in given for word in text.split(",")),
                "continues" in comments,
            )
        )
        start = None
    assert start is None, f"{page.name}: the block of line {start + 1} has no end"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
BASH = [block for block in BLOCKS if block.language == "bash"]


def chains():
    """Python blocks that run in one process."""
    found = []
    for block in (b for b in BLOCKS if b.language == "python"):
        if block.continues:
            assert found and found[-1][0].page == block.page, f"{block} continues nothing"
            found[-1].append(block)
        else:
            found.append([block])
    return found


def commands_of(block):
    """Words of each command: lines joined at a backslash, split at `&&`, comments left out."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def prose(page):
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def table_rows(page, heading):
    """Cells of the rows of the first table below a heading."""
    text = page.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def extras_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])
