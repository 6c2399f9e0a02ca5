"""Build the documentation site: python docs/build_site.py [FOLDER]   (pip install -r requirements-docs.txt)

Pages link to each other and to code across the whole project, so those that are reached from mkdocs.yml are staged in
the project's own layout, and mkdocs builds that, strictly.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def pages() -> list[Path]:
    """The pages of mkdocs.yml's nav."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    return [ROOT / name for name in re.findall(r"([\w./-]+\.md)$", nav, re.MULTILINE)]


def stage(folder: Path) -> list[Path]:
    """Copy the pages and all that they link to; returns what was copied, relative to the project."""
    waiting, done = pages(), []
    while waiting:
        path = waiting.pop()
        name = path.relative_to(ROOT)
        if name in done:
            continue
        done.append(name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
        if path.suffix == ".md":
            links = (match[1] for match in LINK.finditer(path.read_text(encoding="utf-8")))
            targets = [(path.parent / link).resolve() for link in links if "://" not in link]
            waiting += [target for target in targets if target.is_file() and target.is_relative_to(ROOT)]
    return done


def build(output: Path) -> int:
    """The exit status of mkdocs."""
    with tempfile.TemporaryDirectory() as stage_folder:
        stage(Path(stage_folder))
        environment = os.environ | {"DOCS_STAGE": stage_folder, "DOCS_SITE": str(output), "DOCS_ROOT": str(ROOT)}
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml")]
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site").resolve()))
