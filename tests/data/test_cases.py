"""Small files of every schema and container that people use: each reads as the page beside them says, or is refused.

Run with -s for the table. The files plant "good" in the better answers and "bad" in the worse ones, so that any file
that is read the wrong way round shows it, in reading, in data_check=strict and through data/convert.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from preference.data.formats import Options
from preference.data.rows import DataError, DataReport, iter_rows
from preference.tokens import convert as script

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT.parent / "shared" / "cases"
FILES = sorted(path for folder in ("schema", "data") for path in (CASES / folder).glob("*"))

pytestmark = pytest.mark.skipif(not FILES, reason="../shared/cases is not there")
# with a fault in some of their rows, which data_check=strict stops at
FAULTY = {"u_ragged.csv", "u_numeric.csv"}


def _listed(heading: str) -> set[str]:
    """The names that the page lists behind `heading`, up to the next empty line."""
    text = (CASES / "README.md").read_text(encoding="utf-8") if FILES else ""
    found = re.search(re.escape(heading) + r"[^:]*:(.*?)\n\n", text, re.DOTALL)
    return set(re.sub(r"\([^)]*\)", "", found[1]).split()) if found else set()


READ, REFUSED = _listed("To be **read**"), _listed("To be **refused or emptied by name**")


def _expected(path: Path) -> str:
    if path.stem in READ:
        return "read"
    refused = any(re.fullmatch(name.replace("*", ".*"), path.stem) for name in REFUSED)
    return "refused" if refused else "either"


def _read(path: Path, data_check: str) -> tuple[list, DataReport, str]:
    report = DataReport()
    try:
        rows = list(iter_rows([path], report, Options(), data_check=data_check))
    except (DataError, ValueError) as error:
        return [], report, str(error)
    return rows, report, report.summary()


def _wrong(chosen: str | list, rejected: str | list) -> bool:
    if isinstance(chosen, list):  # whole conversations, of which the last turns are compared
        chosen, rejected = (str(side[-1]["content"]) for side in (chosen, rejected))
    return "bad" in chosen.split() or "good" in rejected.split()


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_case(path, tmp_path, capsys):
    expected = _expected(path)
    rows, report, said = _read(path, "drop")
    strict, _, strictly = _read(path, "strict")
    status = script.main([str(path), "--output", str(tmp_path / "o.jsonl")])
    output = tmp_path / "o.jsonl"
    written = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    capsys.readouterr()
    formats = "+".join(entry["format"] or "-" for entry in report.files.values())
    print(f"{path.name:44} {expected:8} {len(rows)} rows {len(strict)} strict {len(written)} converted  {formats}")
    assert not any(_wrong(row.chosen, row.rejected) for row in rows + strict)
    answers = [("response_chosen", "response_rejected"), ("chosen", "rejected")]
    for row in written:
        good, bad = next(names for names in answers if names[0] in row)
        assert not _wrong(row[good], row[bad])
    assert len(written) == len(rows) and (status == 0) == bool(rows)
    if expected == "read":
        assert rows and (strict or path.name in FAULTY), said + strictly
    elif expected == "refused":
        assert not rows and not strict
    if not rows:
        assert re.search(r"dropped +\d+ \w+, first at|: \w+: ", said), said


def test_the_page_lists_what_is_looked_for():
    assert len(READ) > 50 and len(REFUSED) > 10
