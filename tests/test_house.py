"""The house: imports point one way, from a stage of the data's way to those before it, and no two import each other."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Each may import itself and what stands before it; docs/architecture.md says what each is.
STAGES = (
    "errors", "screen", "terminal", "files", "integrity", "flags", "optimization", "losses", "launch", "templates",
    "data",
    "tokens", "arguments", "models", "engine", "train", "plan", "report",
    "serve",
)  # fmt: skip
KNOW_NOTHING_OF = {  # an exact stage knows tensors alone
    "losses": {"files", "launch", "data", "templates", "tokens", "arguments"},
    "engine": {"files", "arguments", "data", "templates", "tokens"},
}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of the project in a file, at its top or within a function."""
    return imports_in(path.read_text(encoding="utf-8"))


@functools.cache
def imports_in(text: str) -> list[tuple[int, str]]:
    return list(each_import(text))


def each_import(text: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "preference":
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "preference":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in SCRIPTS:
            yield node.lineno, f"script.{node.module}"


SCRIPTS = {"conversation", "orpo_train", "chat", "export_model"}


def faults(package: Path) -> list[str]:
    """Every import below `package` that points up, out to a script, or closes a circle."""
    modules = {".".join(path.relative_to(package.parent).with_suffix("").parts): path for path in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    found, graph = [], {name: set() for name in modules}
    for name, path in modules.items():
        stage = [*name.split("."), ""][1]
        for line, target in imports_of(path):
            where = f"{path.relative_to(package.parent)}:{line} imports {target}"
            wanted = target if target in modules else target.rpartition(".")[0]
            if wanted not in modules:
                found.append(f"{where}, which is not there or belongs to a script")
                continue
            graph[name].add(wanted)
            other = [*wanted.split("."), ""][1]
            if stage and other and other != stage:
                if STAGES.index(other) > STAGES.index(stage):
                    found.append(f"{where}: {stage} stands before {other}")
                elif other in KNOW_NOTHING_OF.get(stage, ()):
                    found.append(f"{where}: {stage} knows nothing of {other}")
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(graph)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Ways from a module back to itself, one for each place where a depth-first walk closes one."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name] - {name}):
                walk(other, [*way, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def test_imports_point_one_way(root: Path) -> None:
    assert faults(root / "preference") == []


@pytest.mark.parametrize(
    "file, line, said",
    [
        ("data/rows.py", "from preference.train.trainer import PairTrainer", "data stands before train"),
        ("engine/packing.py", "def f():\n    from preference.arguments import Arguments", "knows nothing of arguments"),
        ("errors.py", "import preference.files", "errors stands before files"),
        ("data/report.py", "from preference.data.rows import Row", "circle: "),
        ("serve/loading.py", "from conversation import TEMPLATES", "belongs to a script"),
    ],
)
def test_an_import_that_points_elsewhere_is_found(root: Path, tmp_path: Path, file: str, line: str, said: str) -> None:
    import shutil

    package = shutil.copytree(root / "preference", tmp_path / "preference")
    before = faults(package)
    (package / file).write_text((package / file).read_text("utf-8") + f"\n{line}\n", encoding="utf-8")
    assert any(said in fault for fault in set(faults(package)) - set(before))


def test_the_tree_in_the_documents_is_the_one_on_disk(root: Path) -> None:
    sys.path.insert(0, str(root / "docs"))
    from tree import written

    page = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == written(page), "run: python docs/tree.py"
    order = re.search(r"```\n(errors .*?) {2,}\(then", page)
    assert order and tuple(order[1].split()) == STAGES
