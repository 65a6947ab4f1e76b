"""Writes docs/api.md from the docstrings: python docs/make_api.py

Sources are read and not imported, so the page is the same whatever is installed.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
MODULES = (
    "papo_kernels.api",
    "papo_kernels.certificate",
    "papo_fast.launch",
    "papo_fast.objective",
    "papo_fast.estimators",
    "papo_fast.token_batch",
    "papo_fast.token_weights",
    "papo_fast.dependency",
    "papo_fast.view_terms",
    "papo_fast.rewards.shaping",
    "papo_fast.data.corruption",
    "papo_fast.rewards.scorer",
    "papo_fast.integrations.trl",
    "papo_fast.integrations.verl",
    "papo_fast.integrations.easyr1",
    "papo_fast.integrations.added_terms",
    "papo_fast.integrations.streams",
    "papo_fast.integrations.conversations",
    "papo_fast.integrations.processor",
)
HEAD = """\
# API

Made from the docstrings by `python docs/make_api.py`; do not edit. Settings of the trainer:
`papo-fast train PRESET --help`.
"""
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises):$")
_ENTRY = re.compile(r"    (\S[^:]*): (.*)")


def page() -> str:
    return HEAD + "".join(module(name) for name in MODULES)


def module(name: str) -> str:
    folder = ROOT / "kernels" if name.startswith("papo_kernels") else ROOT
    tree = ast.parse((folder / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    parts = [f"\n## `{name}`\n\n{_markdown(ast.get_docstring(tree) or '')}"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and _public(node):
            parts.append(f"\n### `{_signature(node)}`\n\n{_markdown(ast.get_docstring(node))}")
        elif isinstance(node, ast.ClassDef) and _public(node):
            parts.append(_class(node))
    return "".join(parts)


def _public(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return not node.name.startswith("_") and ast.get_docstring(node) is not None


def _class(node: ast.ClassDef) -> str:
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    parts = [f"\n### `class {node.name}{f'({bases})' if bases else ''}`\n\n"]
    parts.append(_markdown(ast.get_docstring(node)))
    fields = [_field(node.body, i) for i, x in enumerate(node.body) if isinstance(x, ast.AnnAssign)]
    if fields:
        parts.append("\n" + "".join(fields))
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and _public(method):
            text = _markdown(ast.get_docstring(method))
            parts.append(f"\n#### `{node.name}.{_signature(method)}`\n\n{text}")
    return "".join(parts)


def _field(body: list[ast.stmt], i: int) -> str:
    """`name: type = default`, and the docstring, `help` or nothing that says what it is."""
    node = body[i]
    assert isinstance(node, ast.AnnAssign)
    text, default = "", node.value
    after = body[i + 1] if i + 1 < len(body) else None
    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
        text = " ".join(inspect.cleandoc(after.value.value).split())
    if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
        given = {k.arg: k.value for k in default.keywords}
        if "metadata" in given:
            text = ast.literal_eval(given["metadata"])["help"]
        default = given.get("default")
    value = "" if default is None else f" = {ast.unparse(default)}"
    line = f"`{ast.unparse(node.target)}: {ast.unparse(node.annotation)}{value}`"
    return f"- {line}{': ' + text if text else ''}\n"


def _signature(node: ast.FunctionDef) -> str:
    if any(ast.unparse(d).endswith("property") for d in node.decorator_list):  # cached_property too
        return f"{node.name}: {ast.unparse(node.returns)}" if node.returns else node.name
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({arguments}){returns}"


def _markdown(docstring: str) -> str:
    """Google-style sections become lists; the rest stays as it is."""
    lines, section = [], False
    for line in docstring.splitlines():
        if _SECTION.match(line):
            lines += [f"**{line[:-1]}**", ""]
            section = True
        elif section and (entry := _ENTRY.match(line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            section = section and not line
            lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
