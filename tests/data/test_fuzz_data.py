"""Thousands of damaged files: no crash that is not a DataError, no hang, counts that always add up."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import time
from dataclasses import replace

import pytest
from format_rows import CONTAINERS, LISTS, ROWS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reading import lines, triple

from preference.data.formats import FORMATS, Options
from preference.data.rows import DataError, DataReport, iter_rows

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
PIECES = [
    b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\r\n", b"\\", b"\0", b"\xff", b"\xef\xbb\xbf", b"null", b"1e999",
    b"\\ud800", b"\xe2\x80\xa8", b"\x1f\x8b", b'"question"', b"PAR1", b"    ", b"\t", b"'", b"}{", b"},{",
]  # fmt: skip


def read(path, options: Options, data_check: str = "drop") -> DataReport:
    """Read `path` to the end and check the counts; a DataError is an accepted end."""
    report = DataReport()
    rows = 0
    try:
        for row in iter_rows([path], report, options, data_check=data_check):
            rows += 1
            assert row.chosen and row.rejected and row.chosen != row.rejected and (row.question or row.prompt)
            assert row.line >= 1
        content = report.to_dict()
        assert rows == content["rows_kept"] == content["rows_read"] - sum(content["dropped"].values())
        assert set(content["examples"]) == set(content["dropped"])
        assert sum(file["rows_read"] for file in content["files"].values()) == content["rows_read"]
        json.dumps(content)
    except DataError as error:
        assert data_check == "strict" or str(error), error  # noqa: PT017  an error is one of two right outcomes
    report.summary().encode()
    return report


def mutated(content: bytes, seed: int) -> bytes:
    """One to four cuts, swaps, copies, bit flips or insertions of troublesome bytes."""
    chance = random.Random(seed)
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        to = min(len(data), at + chance.choice((1, 2, 8, 64)))
        kind = chance.randrange(6)
        if kind == 0:
            del data[at:to]
        elif kind == 1:
            data[at:at] = chance.choice(PIECES)
        elif kind == 2:
            data[at:to] = chance.choice(PIECES)
        elif kind == 3:
            data[at:at] = data[chance.randrange(len(data) + 1) :][: to - at + 8]
        elif kind == 4 and data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        else:
            del data[at:]
    return bytes(data)


def corpus() -> list[tuple[str, bytes]]:
    """Files of three good rows: every family in every container that can hold it."""
    files = []
    for name, row in ROWS:
        for container, make in CONTAINERS.items():
            if not (container.startswith("rows.csv") and name in LISTS):
                files.append((container, make([row] * 3)))
    return files


def test_thousands_of_mutated_files(tmp_path):
    files = corpus()
    count = 0
    for seed in range(12):
        for container, content in files:
            count += 1
            path = tmp_path / container
            path.write_bytes(mutated(content, seed * 100_003 + count))
            started = time.monotonic()
            read(path, Options(axis="better"), "strict" if count % 5 == 0 else "drop")
            assert time.monotonic() - started < 10
    assert count > 3000


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"columns"}))
def test_any_format_forced_on_any_row(tmp_path, name):
    """A named format meets rows of all the others, and rows whose values were replaced by odd ones."""
    odd = [
        None, 0, 1.5, True, "", " ", [], {}, [[]], [{}], [None], "[", ["a", 1], [["a"]], {"role": "user"},
        [{"role": 5}], [{"role": "user", "content": {}}], [{"role": "assistant", "content": [5]}],
        {"role": ["user"], "content": ["a"]},
        {"role": ["user"], "content": ["a", "b"]}, "\n\nHuman: a", 10**400, float("nan"),
    ]  # fmt: skip
    chance = random.Random(name)
    rows = []
    for _, row in ROWS:
        rows.append(row)
        for _ in range(12):
            changed = dict(row)
            for key in chance.sample(list(row), min(len(row), chance.randint(1, 2))):
                changed[key] = chance.choice(odd)
            rows.append(changed)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*rows))
    single = {"unpaired": True, "labels": {"1": "good", "0": "bad"}} if FORMATS[name].single else {}
    named = Options(format=name, **single)
    for options in (named, replace(named, pairs="all", min_score_gap=1, axis="safer", split_system=True)):
        assert read(path, options).rows_read >= len(rows)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(sorted({key for _, row in ROWS for key in row}))


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(st.lists(st.dictionaries(keys, json_values, max_size=8), max_size=4), st.sampled_from(sorted(CONTAINERS)[:4]))
def test_random_rows_with_known_keys(tmp_path, rows, container):
    try:
        content = json.dumps(rows).encode()
    except ValueError:
        return
    (tmp_path / container).write_bytes(gzip.compress(content) if container.endswith("gz") else content)
    read(tmp_path / container, Options())


@settings(max_examples=400, deadline=None, suppress_health_check=QUIET)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=4), max_size=40), st.sampled_from(["x.json", "x.csv"]))
def test_random_bytes(tmp_path, pieces, name):
    (tmp_path / name).write_bytes(b"".join(pieces))
    read(tmp_path / name, Options())


# A text without anything to be seen (a soft hyphen alone) is empty, and its row is dropped.
texts = st.text(min_size=1, max_size=30).filter(
    lambda text: "\0" not in text and any(sign.isprintable() and not sign.isspace() for sign in text)
)


@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=5), st.sampled_from(["lines", "array", "csv"]))
def test_any_good_text_comes_back_whole(tmp_path, rows, layout):
    """Whatever the text holds, a well-formed file gives it back, stripped, with no row lost."""
    wanted = [tuple(text.strip() for text in row) for row in rows if row[1].strip() != row[2].strip()]
    names = ("question", "response_chosen", "response_rejected")
    if layout == "csv":
        # Inside quotes a bare carriage return is text; the csv module writes it so.
        stream = io.StringIO()
        table = csv.writer(stream, quoting=csv.QUOTE_ALL)
        table.writerows([names, *rows])
        content = stream.getvalue().encode()
    else:
        dicts = [dict(zip(names, row, strict=True)) for row in rows]
        content = lines(*dicts) if layout == "lines" else json.dumps(dicts, ensure_ascii=False, indent=1).encode()
    path = tmp_path / f"rows.{'csv' if layout == 'csv' else 'json'}"
    path.write_bytes(content)
    report = DataReport()
    options = Options(rendered="keep")  # an answer that is but a stop text would have nothing left
    got = [(row.question, row.chosen, row.rejected) for row in iter_rows([path], report, options)]
    assert got == wanted and report.rows_read == len(rows)


@settings(max_examples=300, deadline=None, suppress_health_check=QUIET)
@given(st.integers(0, 10**9), st.sampled_from([None, 1]), st.integers(0, 9))
@example(1384, 1, 7)
def test_a_damaged_element_loses_nothing_in_front_of_it(tmp_path, seed, indent, which):
    rows = [triple(i) for i in range(10)]
    text = json.dumps(rows, indent=indent).encode()
    starts = [text.index(b'"question %d"' % i) for i in range(10)]
    element = text[starts[which] :]
    (tmp_path / "rows.json").write_bytes(text[: starts[which]] + mutated(element, seed))
    report = DataReport()
    got = [row.question for row in iter_rows([tmp_path / "rows.json"], report)]
    refused = "unread_columns" in report.dropped  # damage can make a key that holds a question: the file is asked about
    assert got[:which] == [f"question {i}" for i in range(which)] or (refused and not got)


@pytest.mark.parametrize(
    "content",
    [
        b"[" + b'{"a":' * 200_000,
        b"[" * 1_000_000,
        b'{"a": "' + b'\\"' * 1_000_000,
        b"[" + b'{"a": 1,, ' * 20_000,
        b'[{"question": "' + b"x" * 20_000_000,
        b"\n" * 2_000_000,
        b'"' * 500_000,
        b"{\n" * 30_000,
        b"[{}," * 30_000,
        b'"\n' * 30_001,
        b'"a""\n' * 30_001,
    ],
    ids=range(11),
)
@pytest.mark.parametrize("name", ["x.json", "x.csv"])
def test_hostile_files_do_not_hang(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    started = time.process_time()
    read(tmp_path / name, Options())
    assert time.process_time() - started < 20
