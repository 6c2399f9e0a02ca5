"""The documentation site: built strictly, every page there, no link that leads nowhere, nothing fetched."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs import build_site as site

pytestmark = pytest.mark.skipif(
    not (find_spec("material") and find_spec("mkdocstrings")), reason="no mkdocs: pip install -r requirements-docs.txt"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    assert site.build(folder) == 0
    return folder


def test_every_page_is_there_and_links_lead_somewhere(built: Path) -> None:
    html = [built / page.relative_to(site.ROOT).with_suffix(".html") for page in site.pages()]
    html = [page.with_name("index.html") if page.name == "README.html" else page for page in html]
    assert len(html) > 15 and all(page.is_file() for page in html)
    for page in html:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img)[^>]* src=\"?(https?:)|<link[^>]* rel=\"?stylesheet[^>]*https?:", text)
        assert not loaded, page
        for link in re.findall(r'href="([^"#:]+)(?:#[^"]*)?"', text):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_api_page_says_what_the_functions_do(built: Path) -> None:
    text = (built / "docs" / "api.html").read_text(encoding="utf-8")
    for name in ("get_conv_template", "get_prompt", "get_response"):
        assert f"{name}" in text
    assert text.count("doc-heading") >= 4


def test_a_broken_link_fails(tmp_path: Path) -> None:
    """With a project of one page, built by the same settings."""
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "README.md").write_text("# One\n\n[x](nowhere.md)\n")
    settings = (site.ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings.replace("!ENV [DOCS_STAGE, docs]", "stage"))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", tmp_path / "mkdocs.yml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "nowhere.md" in done.stderr
