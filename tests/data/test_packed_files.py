"""Packed files, archives, other encodings, odd layouts of JSON and CSV; what can be no data is named."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile

import pytest
from reading import lines, places, read, triple, write

from preference.data.formats import Options

ROWS = [triple(i, question=f"问题{i}：感冒怎么办？") for i in range(4)]


def zstd(content: bytes) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def zipped(**members: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/") + ".jsonl", content)
    return sink.getvalue()


def tarred(mode: str, **members: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name.replace("__", "/") + ".jsonl")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return sink.getvalue()


def parquet() -> bytes:
    from format_rows import as_parquet

    return as_parquet(ROWS)


PACKED = {
    "rows.jsonl.bz2": bz2.compress(lines(*ROWS)),
    "rows.jsonl.xz": lzma.compress(lines(*ROWS)),
    "rows.jsonl.zst": zstd(lines(*ROWS)),
    "rows.json.xz": lzma.compress(json.dumps(ROWS).encode()),
    "named-wrongly.json": bz2.compress(lines(*ROWS)),
    "rows.zip": zipped(rows=lines(*ROWS)),
    "twice.zip": zipped(rows=gzip.compress(lines(*ROWS))),
    "rows.tar": tarred("w", rows=lines(*ROWS)),
    "rows.tar.gz": tarred("w:gz", rows=lines(*ROWS)),
    "rows.tar.xz": tarred("w:xz", rows=lines(*ROWS)),
    "rows.parquet.gz": gzip.compress(parquet()),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_files_are_read_by_name_and_out_of_a_folder(tmp_path, name):
    path = write(tmp_path, PACKED[name], name)
    rows, _ = read(path)
    assert [row.question for row in rows] == [row["question"] for row in ROWS]
    assert [row.line for row in rows] == ([1] * 4 if ".json." in name and "jsonl" not in name else [1, 2, 3, 4])
    if name != "named-wrongly.json":
        assert [row.question for row in read(tmp_path)[0]] == [row["question"] for row in ROWS]


@pytest.mark.parametrize("name", [name for name in PACKED if "parquet" not in name])
def test_damage_is_a_fault_and_never_a_crash(tmp_path, name):
    content = PACKED[name]
    end = 900 if name == "rows.tar" else len(content) // 2  # a small tar is padding for the most part
    _, report = read(write(tmp_path, content[:end], name))
    assert set(report.dropped) & {"broken_archive", "broken_gzip", "broken_json", "unknown_file"}


def test_archives_have_splits_and_stay_closed_beside_plain_data(tmp_path):
    both = zipped(data__train=lines(*ROWS[:3]), data__test=lines(ROWS[3]))
    rows, report = read(write(tmp_path, both, "set.zip"))
    assert len(rows) == 3 and rows[0].file.endswith("set.zip!/data/train.jsonl")
    assert "not read: test.jsonl" in report.warnings[0]
    write(tmp_path, lines(ROWS[0]), "plain.jsonl")
    assert [row.file for row in read(tmp_path)[0]] == [str(tmp_path / "plain.jsonl")]


ENCODINGS = ("gb18030", "gbk", "utf-16-le", "utf-16-be", "big5")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("layout", ["lines", "array", "csv"])
def test_other_encodings_are_named_and_read_when_named(tmp_path, encoding, layout):
    texts = [{"question": f"醫生，我咳嗽了{i}天" if encoding == "big5" else f"医生，我咳嗽了{i}天，怎么办？",
              "response_chosen": "多休息，多喝水。", "response_rejected": "不知道。"} for i in range(20)]  # fmt: skip
    if layout == "csv":
        content = "\n".join([",".join(texts[0]), *(",".join(row.values()) for row in texts)])
    else:
        content = lines(*texts).decode() if layout == "lines" else json.dumps(texts, ensure_ascii=False, indent=1)
    path = write(tmp_path, content.encode(encoding), "rows.csv" if layout == "csv" else "rows.json")
    _, report = read(path)
    said = {"gbk": "gb18030"}.get(encoding, encoding)
    assert report.dropped == {"other_encoding": 1}
    assert f"--encoding {said}" in report.examples["other_encoding"][0]["detail"]
    rows, report = read(path, options=Options(encoding=said))
    assert [row.question for row in rows] == [row["question"] for row in texts] and not report.dropped


def test_a_byte_order_mark_says_the_encoding(tmp_path):
    for encoding in ("utf-16", "utf-8-sig"):
        rows, _ = read(write(tmp_path, lines(*ROWS).decode().encode(encoding)))
        assert len(rows) == 4
    rows, _ = read(write(tmp_path, lines(*ROWS).decode().encode("utf-8-sig")), options=Options(encoding="gb18030"))
    assert rows[0].question == ROWS[0]["question"]


def test_bad_bytes_of_another_encoding_cost_their_row(tmp_path):
    content = lines(*ROWS).decode().encode("gb18030").split(b"\n")
    content[1] = content[1].replace("感".encode("gb18030"), b"\xff\xff")
    rows, report = read(write(tmp_path, b"\n".join(content)), options=Options(encoding="gb18030"))
    assert len(rows) == 3 and places(report, "invalid_utf8") == [2]
    with pytest.raises(ValueError, match="no encoding of text"):
        Options(encoding="gb9")


def test_utf_8_with_a_few_bad_bytes_and_western_text_are_not_taken_for_chinese(tmp_path):
    content = lines(*ROWS).replace("感".encode(), b"\xb8\xd0", 1)
    rows, report = read(write(tmp_path, content))
    assert len(rows) == 3 and report.dropped == {"invalid_utf8": 1}
    latin = (
        lines(*[triple(i, question="Où est l'hôpital, s'il vous plaît ?") for i in range(9)]).decode().encode("cp1252")
    )
    _, report = read(write(tmp_path, latin))
    assert report.dropped == {"invalid_utf8": 9}


def test_what_is_no_data_is_named(tmp_path):
    base = tmp_path / "x.db"
    with sqlite3.connect(base) as connection:
        connection.execute("create table t (a)")
    office = io.BytesIO()
    with zipfile.ZipFile(office, "w") as archive:
        archive.writestr("[Content_Types].xml", "<x/>")
    for content, word in (
        (base.read_bytes(), "SQLite"), (office.getvalue(), "Excel"), (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Excel"),
        (b"\x80\x04\x95", "pickle"), (b"%PDF-1.7", "PDF"),
    ):  # fmt: skip
        _, report = read(write(tmp_path, content, "rows.json"))
        assert report.dropped == {"unknown_file": 1} and word in report.examples["unknown_file"][0]["detail"]


# -- layouts of JSON and CSV

TABLES = {
    "columns": lambda rows: {key: {str(i): row[key] for i, row in enumerate(rows)} for key in rows[0]},
    "index": lambda rows: {str(i): row for i, row in enumerate(rows)},
    "split": lambda rows: {"columns": list(rows[0]), "index": [0, 1], "data": [list(row.values()) for row in rows]},
    "table": lambda rows: {"schema": {"fields": [{"name": "index"}]}, "data": [{"index": 0} | row for row in rows]},
    "lists": lambda rows: {key: [row[key] for row in rows] for key in rows[0]},
    "data": lambda rows: {"version": "1.0", "license": "mit", "info": {"a": [1]}, "data": rows, "n": 4},
    "train": lambda rows: {"train": rows},
}


@pytest.mark.parametrize("shape", TABLES)
@pytest.mark.parametrize("indent", [None, 1])
def test_tables_and_rows_in_one_object(tmp_path, shape, indent):
    content = json.dumps(TABLES[shape](ROWS), ensure_ascii=False, indent=indent).encode()
    for name in ("rows.json", "rows.jsonl"):
        rows, report = read(write(tmp_path, content, name), data_check="strict")
        assert [row.question for row in rows] == [row["question"] for row in ROWS] and not report.dropped


def test_rows_in_an_object_have_true_lines_and_need_no_memory(tmp_path):
    many = [triple(i, system="x" * 500) for i in range(2000)]
    text = '{"version": 1,\n"data": [\n' + ",\n".join(json.dumps(row) for row in many) + '],\n"other": [{"a": 1}]}'
    rows, report = read(write(tmp_path, text.encode(), "rows.json"))
    assert [row.line for row in rows] == [*range(3, 2003)] and report.dropped == {"other_list": 1}


def test_json_lines_of_lists_and_objects_are_not_taken_for_tables(tmp_path):
    ranked = [{"response": ["good answer", "bad answer"], "scores": [9, 1], "prompt": f"q{i}"} for i in range(3)]
    assert len(read(write(tmp_path, lines(*ranked)))[0]) == 3
    chats = [
        {"data": [{"role": "user", "content": "q"}], "question": f"q{i}", "chosen": "a", "rejected": "b"}
        for i in (1, 2)
    ]
    assert len(read(write(tmp_path, lines(*chats)))[0]) == 2


def test_commas_that_json_does_not_allow(tmp_path):
    each = [json.dumps(row)[:-1] + ",}" for row in ROWS]
    texts = {
        "behind": ",\n".join(map(json.dumps, ROWS)) + ",\n",
        "inside": "\n".join(each),
        "array": "[\n" + ",\n".join(each) + ",\n]",
        "one line": "[" + ",".join(each) + ",]",
        "list": "\n".join(json.dumps(row | {"history": [["a", "b"]]}).replace('"b"]]', '"b",],]') for row in ROWS),
    }
    for text in texts.values():
        rows, report = read(write(tmp_path, text.encode(), "rows.json"), data_check="strict")
        assert [row.question for row in rows] == [row["question"] for row in ROWS] and not report.dropped
    text = json.dumps(triple(1, question="a,} b,]"))[:-1] + ",}"
    assert read(write(tmp_path, text.encode()))[0][0].question == "a,} b,]"
    _, report = read(write(tmp_path, ("[" + '{"a": 1,, ' * 3000).encode()))
    assert report.rows_kept == 0


def test_rows_that_were_encoded_twice(tmp_path):
    content = "\n".join(json.dumps(json.dumps(row)) for row in ROWS)
    assert len(read(write(tmp_path, content.encode()))[0]) == 4
    array = json.dumps([json.dumps(row) for row in ROWS])
    assert len(read(write(tmp_path, array.encode(), "rows.json"))[0]) == 4


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_a_line_that_says_the_separator(tmp_path, delimiter):
    table = "\n".join([f"sep={delimiter}", delimiter.join(("question", "chosen", "rejected")), delimiter.join("QAB")])
    for name in ("rows.csv", "rows.txt"):
        rows, _ = read(write(tmp_path, table.encode(), name))
        assert [(row.question, row.chosen, row.rejected) for row in rows] == [("Q", "A", "B")]
