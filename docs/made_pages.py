"""What the scripts that make tables of these pages share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parent


def write_between(page: str, made: dict[str, str]) -> None:
    """Put text between the markers `<!-- NAME -->` and `<!-- end of NAME -->` of a page.

    Args:
        page: name of a file of this folder.
        made: the text, of whole lines, by NAME. The page must have each pair of markers once.
    """
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    for name, between in made.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- end of {name} -->")
        text = f"{before}<!-- {name} -->\n{between}<!-- end of {name} -->{after}"
    path.write_text(text, encoding="utf-8")


def table(rows: Iterable[Sequence[str]], columns: Sequence[str], numbers: int) -> str:
    """A table of Markdown, whose last `numbers` columns are aligned to the right."""
    under = ["---"] * (len(columns) - numbers) + ["---:"] * numbers
    lines = ("".join(f" {x} |" if x else " |" for x in cells) for cells in (columns, under, *rows))
    return "".join(f"|{line}\n" for line in lines)
