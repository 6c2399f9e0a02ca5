"""docs/reliability.md lists every attack with the tests that make it: each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path


def test_the_table_of_attacks_names_tests_that_there_are(root: Path) -> None:
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    table = page.partition("## Attacks, one by one")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    attacks = [row for row in rows[1:] if not row[0].startswith("**")]
    assert len(attacks) > 25
    for attack, promised, tests, _before in attacks:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
        assert promised and named and len(named) == tests.count("`") // 2, attack
        for file, name in named:
            tree = ast.parse((root / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}: {name}"


def test_commands_and_files_of_the_page_exist(root: Path) -> None:
    page = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\btests/[\w/]*[\w.]+", page))
    assert len(named) > 15 and not [name for name in named if not (root / name).exists()]
