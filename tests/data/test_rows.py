"""Reading rows: every fault with file, line and reason; good rows kept; counts that add up."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from reading import lines, places, read, triple, write

from preference.data import json_records
from preference.data.formats import Options
from preference.data.rows import DataError, DataReport, iter_rows, load_rows

ROOT = Path(__file__).resolve().parents[2]


def test_triple_with_system_and_history(tmp_path):
    history = [["earlier question", "earlier answer"]]
    path = write(tmp_path, lines(triple(0, system="Be brief.", history=history), triple(1, system="", history=[])))
    rows, _ = read(path)
    assert rows[0].system == "Be brief." and rows[0].history == (("earlier question", "earlier answer"),)
    assert rows[1].system is None and rows[1].history == ()
    assert (rows[1].question, rows[1].chosen, rows[1].rejected) == ("question 1", "good 1", "bad 1")
    assert (rows[1].file, rows[1].line, rows[1].prompt) == (str(path), 2, None)


def test_prompts_that_are_kept_are_verbatim_and_answers_stripped(tmp_path):
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    path = write(tmp_path, lines({"prompt": prompt, "chosen": " good \n", "rejected": "\tbad"}))
    rows, _ = read(path, options=Options(rendered="keep"))
    assert rows[0].prompt == prompt
    assert (rows[0].question, rows[0].chosen, rows[0].rejected) == ("", "good", "bad")


def test_outer_white_space_is_stripped_on_both_sides_and_counted(tmp_path):
    row = {"question": " q\n", "response_chosen": "good", "response_rejected": " bad\u3000"}
    rows, report = read(write(tmp_path, lines(row)))
    assert (rows[0].question, rows[0].chosen, rows[0].rejected) == ("q", "good", "bad")
    assert report.notes["leading_space_in_rejected_only"] == 1


BAD = [
    ("missing_key", {"question": "q", "response_chosen": "a"}, "response_rejected"),
    ("missing_key", {"question": "q", "response_chosen": "a", "response_rejected": None}, "null"),
    ("wrong_type", triple(0, response_chosen=5), "chosen"),
    ("wrong_type", triple(0, question=["q"]), "question"),
    ("wrong_type", triple(0, system=1), "system"),
    ("wrong_type", triple(0, history="before"), "history"),
    ("wrong_type", triple(0, history=[["only one"]]), "history"),
    ("wrong_type", triple(0, history=[["a", 5]]), "history"),
    ("empty_turn", triple(0, history=[["a", " "]]), "history"),
    ("empty_answer", triple(0, response_chosen=" \n"), "chosen"),
    ("empty_answer", triple(0, response_rejected=""), "rejected"),
    ("empty_prompt", triple(0, question="  "), ""),
    ("identical_answers", triple(0, response_chosen="same", response_rejected=" same\n"), ""),
    ("nul_byte", triple(0, question="a\0b"), "question"),
]


@pytest.mark.parametrize("reason, row, detail", BAD, ids=[f"{bad[0]}-{i}" for i, bad in enumerate(BAD)])
def test_bad_row_is_dropped_with_place_and_reason_and_others_stay(tmp_path, reason, row, detail):
    path = write(tmp_path, lines(triple(1), row, triple(2)))
    rows, report = read(path)
    assert [kept.line for kept in rows] == [1, 3]
    assert report.dropped == {reason: 1}
    assert report.examples[reason][0]["file"] == str(path) and places(report, reason) == [2]
    assert detail in report.examples[reason][0]["detail"]
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {reason}") as error:
        list(iter_rows([path], DataReport(), data_check="strict"))
    assert (error.value.file, error.value.line, error.value.reason) == (str(path), 2, reason)


@pytest.mark.parametrize("reason, row, detail", BAD, ids=[f"{bad[0]}-{i}" for i, bad in enumerate(BAD)])
def test_a_file_of_one_bad_row_names_the_same_reason(tmp_path, reason, row, detail):
    with pytest.raises(DataError, match=reason):
        load_rows([write(tmp_path, lines(row))], DataReport())


RAW = [
    ("broken_json", b'{"question": "q", "response_chosen": \n'),
    ("broken_json", b"[" * 100_000 + b"\n"),
    ("broken_json", b'{"question": ' + b"9" * 5000 + b"}\n"),
    ("broken_json", b"plain text\n"),
    ("not_an_object", b'["question"]\n'),
    ("not_an_object", b"null\n"),
    ("invalid_utf8", b'{"question": "\xff\xfe", "response_chosen": "a", "response_rejected": "b"}\n'),
    ("nul_byte", b'{"question": "a\0"}\n'),
    ("nul_byte", b"\0\0\0\n"),
    ("invalid_unicode", b'{"question": "\\ud800", "response_chosen": "a", "response_rejected": "b"}\n'),
    ("line_too_long", b'{"question": "' + b"x" * 50_000_000 + b'"}\n'),
    ("duplicate_key", b'{"question": "a", "question": "b", "response_chosen": "c", "response_rejected": "d"}\n'),
    ("duplicate_key", b'{"question": "a", "response_chosen": {"x": [{"y": 1, "y": 2}]}}\n'),
]


@pytest.mark.parametrize("reason, raw", RAW, ids=[f"{bad[0]}-{i}" for i, bad in enumerate(RAW)])
def test_damaged_line_costs_itself_alone(tmp_path, reason, raw):
    rows, report = read(write(tmp_path, lines(triple(1)) + raw + lines(triple(2))))
    assert [row.line for row in rows] == [1, 3]
    assert report.dropped == {reason: 1} and places(report, reason) == [2]


# not in an array: open brackets that swallow the rest, NUL bytes that are no element, 50 MB once is enough
ELEMENTS = [bad for bad in RAW if not bad[1].startswith((b"[[", b"\0")) and bad[0] != "line_too_long"]


@pytest.mark.parametrize("reason, raw", ELEMENTS, ids=[f"{bad[0]}-{i}" for i, bad in enumerate(ELEMENTS)])
def test_damaged_element_of_an_array_costs_itself_alone(tmp_path, reason, raw):
    element = raw.removesuffix(b"\n")
    good = [json.dumps(triple(i)).encode() for i in range(4)]
    rows, report = read(write(tmp_path, b"[\n" + b",\n".join([*good[:2], element, *good[2:]]) + b"\n]", "rows.json"))
    assert [row.line for row in rows] == [2, 3, 5, 6]
    assert report.dropped == {reason: 1} and places(report, reason) == [4]


def test_bom_crlf_blank_lines_and_no_final_newline_lose_nothing(tmp_path):
    raw = b"\xef\xbb\xbf" + lines(triple(1), triple(2)).replace(b"\n", b"\r\n")
    raw += b"\r\n  \r\n\xef\xbb\xbf" + lines(triple(3)).rstrip()  # as files written one behind the other
    rows, report = read(write(tmp_path, raw))
    assert [row.line for row in rows] == [1, 2, 5] and not report.dropped
    rows, report = read(write(tmp_path, b"\xef\xbb\xbf" + json.dumps([triple(1)]).encode(), "rows.json"))
    assert len(rows) == 1 and not report.dropped


def test_unicode_line_separators_are_text(tmp_path):
    odd = "a\u2028b\u2029c\x85d\x0be\x1cf"
    rows, _ = read(write(tmp_path, lines(triple(1, question=odd), triple(2))))
    assert [row.question for row in rows] == [odd, "question 2"] and rows[1].line == 2


def test_git_lfs_pointer_and_empty_files_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    write(tmp_path, pointer, "a.jsonl.gz")
    write(tmp_path, b"", "b.jsonl")
    write(tmp_path, b"\xef\xbb\xbf\n \n", "c.jsonl")
    write(tmp_path, b"[]", "d.json")
    write(tmp_path, lines(triple(1)), "e.jsonl")
    rows, report = read(tmp_path)
    assert len(rows) == 1 and report.dropped == {"git_lfs_pointer": 1, "empty_file": 3}
    assert "git lfs pull" in report.examples["git_lfs_pointer"][0]["detail"]
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: git_lfs_pointer"):
        list(iter_rows([tmp_path], DataReport(), data_check="strict"))


@pytest.mark.parametrize("content", [b"", b"[]", b"\n", b"version https://git-lfs.github.com/spec/v1\n"])
def test_nothing_left_stops(tmp_path, content):
    with pytest.raises(DataError, match=r"no usable row in .*rows\.jsonl"):
        load_rows([write(tmp_path, content)], DataReport())


def test_empty_and_missing_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty_folder"):
        load_rows([tmp_path / "empty"], DataReport())
    with pytest.raises(DataError, match="not_found"):
        load_rows([tmp_path / "absent"], DataReport())


def test_folder_is_read_recursively_in_order(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    write(tmp_path / "deep" / "er", gzip.compress(lines(triple(1))), "a.jsonl.gz")
    write(tmp_path, json.dumps([triple(2)]).encode(), "b.json")
    write(tmp_path, b"# notes", "README.md")
    write(tmp_path / ".cache", lines(triple(3)), "hidden.jsonl")
    rows, _ = read(tmp_path)
    assert [row.question for row in rows] == ["question 2", "question 1"]


def test_links_are_followed_once_and_pipes_are_refused(tmp_path):
    import os

    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", lines(triple(1)), "a.jsonl")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    assert len(read(tmp_path / "data")[0]) == 1
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="unreadable_file"):
        load_rows([tmp_path / "pipe"], DataReport())


@pytest.mark.parametrize("indent", [None, 0, 2], ids=["one line", "flat", "indented"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_array_elements_have_true_line_numbers(tmp_path, indent, name):
    rows = [triple(i, system="a\n" * i) for i in range(4)]
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    numbers = [text[: text.index(f'"question {i}"')].rindex("{") for i in range(4)]
    kept, report = read(write(tmp_path, text.encode(), name))
    assert [row.line for row in kept] == [text.count("\n", 0, at) + 1 for at in numbers]
    assert [row.question for row in kept] == [f"question {i}" for i in range(4)] and not report.dropped


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_broken_array_loses_one_element_only(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(json_records, "CHUNK", chunk)
    text = json.dumps([triple(i) for i in range(6)], indent=indent)
    rows, report = read(write(tmp_path, text.replace('"good 2"', '"good 2').encode(), "rows.json"))
    assert [row.question for row in rows] == [f"question {i}" for i in (0, 1, 3, 4, 5)]
    line = text[: text.index('"question 2"')].count("\n") + (1 if indent is None else 0)
    assert report.dropped == {"broken_json": 1} and places(report, "broken_json") == [line]


@pytest.mark.parametrize("indent", [None, 2])
def test_element_without_its_end_does_not_take_the_next_with_it(tmp_path, indent):
    text = json.dumps([triple(i) for i in range(4)], indent=indent)
    at = text.index('"bad 1"') + 7
    text = text[:at] + text[text.index("{", at) :]  # the brace, the comma and the white space behind row 1 are gone
    rows, report = read(write(tmp_path, text.encode(), "rows.json"))
    assert [row.question for row in rows] == ["question 0", "question 2", "question 3"]
    assert report.dropped == {"broken_json": 1}


def test_broken_element_of_an_indented_array_with_changing_keys(tmp_path):
    text = json.dumps([dict(reversed(triple(i).items())) if i == 3 else triple(i) for i in range(6)], indent=2)
    for broken in (text.replace('"good 2"', '"good 2'), text.replace('"bad 2"\n  },', '"bad 2"')):
        kept, _ = read(write(tmp_path, broken.encode(), "rows.json"))
        assert [row.question for row in kept] == [f"question {i}" for i in (0, 1, 3, 4, 5)]


@pytest.mark.parametrize("indent", [None, 2])
def test_cut_array_keeps_all_that_is_whole(tmp_path, indent):
    text = json.dumps([triple(i) for i in range(4)], indent=indent)
    ends = [text.index(f'"bad {i}"') + 8 for i in range(4)]
    for cut in range(2, len(text)):
        rows, report = read(write(tmp_path, text[:cut].encode(), "rows.json"))
        whole = sum(text.index("}", end - 1) < cut for end in ends)
        assert [row.question for row in rows] == [f"question {i}" for i in range(whole)], text[:cut]
        assert report.dropped["broken_json"] == 1, text[:cut]


def test_objects_over_several_lines_without_an_array(tmp_path):
    text = "\n".join(json.dumps(triple(i), indent=1) for i in range(3))
    rows, report = read(write(tmp_path, text.encode(), "rows.json"))
    assert [row.line for row in rows] == [1, 6, 11] and not report.dropped


def test_objects_in_one_line_without_an_array(tmp_path):
    raw = lines(*(triple(i) for i in range(3))).replace(b"\n", b" ")
    rows, report = read(write(tmp_path, raw, "rows.json"))
    assert len(rows) == 3 and not report.dropped
    rows, report = read(write(tmp_path, lines(triple(1)).strip() + b" rest\n" + lines(triple(2), triple(3))))
    assert [row.line for row in rows] == [2, 3] and places(report, "broken_json") == [1]


@pytest.mark.parametrize("chunk", [16, 1 << 17])
def test_a_key_that_stands_twice_in_an_element_that_is_broken_besides(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_records, "CHUNK", chunk)
    twice = b'{"question": "q", "response_chosen": {"a": 1, "a": 2}, %s "response_rejected": "b"}'
    good = [json.dumps(triple(i)).encode() for i in range(3)]
    for rest, reason in ((b"", "duplicate_key"), (b'"x",', "broken_json"), (b'"x": 1e,', "broken_json")):
        raw = b"[" + b",\n".join([good[0], twice % rest, *good[1:]]) + b"]"
        rows, report = read(write(tmp_path, raw, "rows.json"))
        assert [row.line for row in rows] == [1, 3, 4] and places(report, reason) == [2]


def test_a_key_that_stands_twice_with_one_value_is_harmless(tmp_path):
    rows, report = read(write(tmp_path, lines(triple(1)).replace(b"{", b'{"question": "question 1", ')))
    assert len(rows) == 1 and not report.dropped


def test_first_line_broken_leaves_json_lines(tmp_path):
    rows, report = read(write(tmp_path, b'{"question": "q", \n' + lines(triple(1), triple(2)).replace(b", ", b",")))
    assert len(rows) == 2 and places(report, "broken_json") == [1]


def test_multi_byte_characters_across_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(json_records, "CHUNK", 5)
    rows, report = read(write(tmp_path, json.dumps([triple(1, question="发烧怎么办😀")], ensure_ascii=False).encode()))
    assert rows[0].question == "发烧怎么办😀" and not report.dropped


def test_damaged_gzip_keeps_what_comes_before(tmp_path):
    # Random text does not compress, so the cut falls behind whole rows.
    import random

    letters = random.Random(0)
    packed = gzip.compress(lines(*(triple(i, system="".join(letters.choices("abcdefgh", k=4000))) for i in range(200))))
    rows, report = read(write(tmp_path, packed[: len(packed) // 2], "rows.jsonl.gz"))
    assert 50 < len(rows) < 150 and report.dropped["broken_gzip"] == 1
    assert places(report, "broken_gzip")[0] > len(rows)


@pytest.mark.parametrize("count", [2000, 20])
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_damaged_gzip_loses_no_row_that_can_be_had(tmp_path, layout, count):
    """The file ends in the middle, or its last bytes, the checksum, are wrong."""
    import random
    import zlib

    letters = random.Random(0)
    rows = [triple(i, system="".join(letters.choices("abcdefgh", k=400))) for i in range(count)]
    text = lines(*rows) if layout == "lines" else json.dumps(rows).encode()
    packed = gzip.compress(text)
    for damaged in (packed[:-900], packed[: len(packed) // 2], packed[:-8] + b"x" * 8):
        had = zlib.decompressobj(wbits=-15).decompress(damaged[10:])  # behind the header of ten bytes
        whole = had.count(b"}\n" if layout == "lines" else b"},")
        kept, report = read(write(tmp_path, damaged, "rows.gz"))
        assert len(kept) in (whole, whole + 1) and report.dropped["broken_gzip"] == 1


def test_gzip_of_many_members_and_padding(tmp_path):
    packed = b"".join(gzip.compress(lines(triple(i))[at : at + 50]) for i in range(50) for at in (0, 50, 100))
    rows, report = read(write(tmp_path, packed + b"\0" * 512, "rows.jsonl.gz"))
    assert [row.line for row in rows] == [*range(1, 51)] and not report.dropped


@pytest.mark.parametrize("content", [b"x" * 257 + b"ustar", b"ARROW1\0\0", b"\xff\xff\xff\xff\x10", b"PK\x03\x04"])
def test_packed_and_binary_files_are_named(tmp_path, content):
    _, report = read(write(tmp_path, content, "rows.jsonl"))
    assert report.dropped == {"unknown_file": 1}
    assert next(iter(report.files.values()))["format"] == ""  # nothing was recognised


def test_gzip_is_known_by_its_bytes(tmp_path):
    assert len(read(write(tmp_path, gzip.compress(lines(triple(1))), "rows.json"))[0]) == 1
    assert len(read(write(tmp_path, lines(triple(1)), "rows.jsonl.gz"))[0]) == 1


def test_unknown_choices_are_errors(tmp_path):
    path = write(tmp_path, lines(triple(1)))
    for choice in ({"data_check": "lax"}, {"format": "none"}, {"axis": "left"}, {"pairs": "x"}, {"columns": "x=y"}):
        with pytest.raises(ValueError, match="^(data_check must|unknown format|axis must|pairs must|columns must)"):
            load_rows([path], DataReport(), **choice)


def test_importing_the_readers_is_light():
    code = "import preference.data.rows, sys; print({'torch', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_memory_stays_flat(tmp_path):
    """A file of 30 MB, as lines and as an array, is read in a few MB."""
    import tracemalloc

    row = json.dumps(triple(1, system="x" * 3000)).encode()
    for name, content in (("a.jsonl", (row + b"\n") * 10_000), ("a.json", b"[" + b",".join([row] * 10_000) + b"]")):
        path = write(tmp_path, content, name)
        del content
        tracemalloc.start()
        count = sum(1 for _ in iter_rows([path], DataReport()))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 10_000 and peak < 12 << 20, f"{name}: {peak >> 20} MB"
