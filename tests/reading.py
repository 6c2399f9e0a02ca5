"""Rows written to a file and read back, with the counts checked."""

from __future__ import annotations

import json

from preference.data.rows import DataReport, iter_rows


def triple(i: int, **other) -> dict:
    return {"question": f"question {i}", "response_chosen": f"good {i}", "response_rejected": f"bad {i}"} | other


def lines(*rows) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def read(path, **options):
    """(rows, report) of `path`; checks that the counts add up."""
    report = DataReport()
    rows = list(iter_rows([path], report, **options))
    content = report.to_dict()
    assert content["rows_read"] == content["rows_kept"] + sum(content["dropped"].values())
    assert content["rows_kept"] == len(rows)
    for file in content["files"].values():
        assert file["rows_read"] == file["rows_kept"] + sum(file["dropped"].values())
    return rows, report


def places(report, reason) -> list[int]:
    return [place["line"] for place in report.examples.get(reason, [])]


def write(tmp_path, content: bytes, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path
