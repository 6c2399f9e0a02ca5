"""Rows that are kept for a run: the same rows, in a file once they are many, and no memory for their text."""

from __future__ import annotations

import tracemalloc

import pytest

from preference.data import kept_rows
from preference.data.kept_rows import KeptRows
from preference.data.row import Row


def rows(count: int, size: int = 1) -> list[Row]:
    return [
        Row(f"q{i} é\n" * size, f"好{i}", f"r{i}", None if i % 3 else "s", (("u", "a"),) * (i % 2), file="f", line=i,
            extra={"pair_weight": i / 7, "score_chosen": i})
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("in_memory", [1 << 20, 64])  # never on the disk; there from the first row on
def test_rows_come_back_as_they_were(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(kept_rows, "IN_MEMORY", in_memory)
    given = rows(50)
    kept = KeptRows(given, tmp_path / "new")
    assert len(kept) == 50 and list(kept) == given and [row.extra for row in kept] == [row.extra for row in given]
    assert kept[7] == given[7] and kept[-1] == given[-1] and list(kept[3:30:9]) == given[3:30:9]
    taken = kept.take([4, 2, 40])
    assert list(taken) == [given[4], given[2], given[40]] and taken[1] == given[2] and len(taken[1:]) == 2
    assert list(taken.take([2, 0])) == [given[40], given[4]]
    with pytest.raises(IndexError):
        taken[3]
    assert not list((tmp_path / "new").iterdir())  # the file has no name that could stay behind


def test_memory_does_not_grow_with_the_text_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_rows, "IN_MEMORY", 1 << 16)
    text = "x" * 50_000
    tracemalloc.start()
    try:
        kept = KeptRows((Row(text + str(i), "a", "b", line=i) for i in range(200)), tmp_path)
        assert sum(len(row.question) for row in kept) > 10_000_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000  # the buffers and a row or two, of 10 MB
