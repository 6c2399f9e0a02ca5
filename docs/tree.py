#!/usr/bin/env python3
"""Writes the tree in docs/architecture.md: a line a file, the first sentence of its docstring.

python docs/tree.py            after a file came, went or changed its first sentence; a test says when
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree: python docs/tree.py -->", "<!-- end of the tree -->"


def sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def tree(package: Path) -> str:
    """A heading for each folder of `package`, in the order of the way of the data, and a table of its files."""
    folders = [package, *sorted(p for p in package.rglob("*") if p.is_dir() and any(p.glob("*.py")))]
    parts = []
    for folder in folders:
        name = folder.relative_to(package.parent).as_posix()
        files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        parts.append(f"**{name}/** {sentence(folder / '__init__.py')}\n")
        if files:
            rows = [f"| `{path.name}` | {sentence(path).replace('|', '/')} |" for path in files]
            parts.append("\n".join(["| | |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def written(page: str) -> str:
    """`page` with its tree as the files are now."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{tree(ROOT / 'preference')}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    path = ROOT / "docs" / "architecture.md"
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
