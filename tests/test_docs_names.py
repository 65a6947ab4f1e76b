"""README.md and docs/: every link, file, name, setting and extra that they name exists."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from papo_fast.config import Config
from papo_fast.run.same_data import DATA
from support.doc_pages import PAGES, ROOT, extras_of_pyproject, name_of, prose


def anchors(page):
    """As GitHub makes them of headings."""
    found = []
    for title in re.findall(r"^#+ (.*)$", prose(page), re.M):
        slug = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return found


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of
)
def test_every_link_leads_somewhere(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert dead == []


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


WRITTEN = [p for p in PAGES if p.name not in ("api.md", "log.md")]
"""Without what is made from docstrings, and without the log, which tells of the past."""


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_file_that_is_named_exists(page):
    pattern = r"(?:tests|bench|docs|examples|kernels|papo_fast|constraints)/[\w./*-]*"
    named = {n for code in inline_code(page) for n in re.findall(rf"(?<![\w./]){pattern}", code)}
    assert [name for name in sorted(named) if not list(ROOT.glob(name.rstrip("/.")))] == []


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_python_name_exists(page):
    pattern = r"\b(papo_(?:fast|kernels)(?:\.[A-Za-z_]\w*)+)"
    named = {n for code in inline_code(page) for n in re.findall(pattern, code)}
    assert [name for name in sorted(named) if not defined(name)] == []


def defined(name):
    """Whether a dotted name is a module of ours or stands in one, found without importing it."""
    first, *parts = name.split(".")
    place = (ROOT / "kernels" / first) if first == "papo_kernels" else ROOT / first
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    file = place / "__init__.py"
    if parts and (place / f"{parts[0]}.py").is_file():
        file = place / f"{parts.pop(0)}.py"
    if not parts:
        return True
    body = ast.parse(file.read_text(encoding="utf-8")).body
    names = {x.name for x in body if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    for x in body:
        if isinstance(x, ast.Assign | ast.AnnAssign):
            targets = x.targets if isinstance(x, ast.Assign) else [x.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
        elif isinstance(x, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in x.names}
    return parts[0] in names


SECTIONS = {f.name: f.type for f in dataclasses.fields(Config)}


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_every_setting_exists(page):
    sections = [n for n in SECTIONS if dataclasses.is_dataclass(getattr(Config(), n))]
    pattern = rf"(?<![\w./])(?:--)?((?:{'|'.join(sections)})\.[a-z_-]+)(?![\w.(/])"
    unknown = []
    for code in inline_code(page):
        for name in re.findall(pattern, code):
            section, field = name.split(".")
            field = field.removeprefix("no-").replace("-", "_")
            # a file of every run is called like a setting
            if name != DATA and not hasattr(getattr(Config(), section), field):
                unknown.append(name)
    assert unknown == []


def test_every_extra_that_is_named_exists():
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "examples").glob("*")]
    texts = [page.read_text(encoding="utf-8") for page in pages]
    named = {
        n for t in texts for found in re.findall(r"'\.\[([a-z,-]+)\]'", t) for n in found.split(",")
    }
    assert named - extras_of_pyproject() == set()


def test_nothing_refers_to_documents_outside_the_repository():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout, so it is not known which files are the repository's")
    outside = re.compile(r"\b(?:DESIGN|GPU|FACTS|FAMILY|STYLE)(?:\.md| §)")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix not in (".py", ".md", ".toml", ".sh", ".cpp", ".h", ".sbatch", ".cff"):
            continue
        if path == Path(__file__) or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if outside.search(line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert found == []
