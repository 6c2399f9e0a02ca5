"""Files that are meant to do harm, or that a run itself wrote: nothing of them is read, and each is named once."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from reading import lines, places, read, triple, write

from preference.data.formats.base import Pair
from preference.data.formats.context import complete
from preference.data.rows import DataReport, load_rows
from preference.data.sources import find_sources


def warnings_of(folder: Path) -> tuple[list[str], list[str]]:
    report = DataReport()
    found = find_sources([folder], report=report)
    return [os.path.relpath(path, folder) for path in found], report.warnings


def run_folder(folder: Path) -> None:
    """What a run leaves in its output_dir, with pairs in it that would be read."""
    (folder / "checkpoint-8").mkdir(parents=True)
    for name in ("worst_pairs.json", "samples.json", "run.json"):
        write(folder, json.dumps([triple(1)]).encode(), name)
    write(folder, lines(triple(2)), "answers.jsonl")
    for name in ("trainer_state.json", "all_results.json", "checkpoint-8/trainer_state.json"):
        write(folder, b'{"epoch": 1}', name)


def test_an_output_folder_inside_the_training_folder_is_no_data(tmp_path):
    run_folder(tmp_path / "outputs" / "orpo")
    write(tmp_path, lines(triple(0)), "train.jsonl")
    found, (warning,) = warnings_of(tmp_path)
    assert found == ["train.jsonl"] and "1 files and folders that are not read, as a run" in warning
    assert "outputs/orpo" in warning


def test_rows_beside_a_run_are_read_and_the_run_is_not(tmp_path):
    """output_dir and train_file_dir are one folder."""
    run_folder(tmp_path)
    write(tmp_path, lines(triple(0)), "train.jsonl")
    found, (warning,) = warnings_of(tmp_path)
    assert found == ["train.jsonl"] and "7 files and folders" in warning


def test_a_report_of_the_converter_beside_its_rows_is_no_data(tmp_path):
    from preference.tokens.convert import main

    source = write(tmp_path, lines(triple(1), triple(2)), "in.jsonl")
    out = tmp_path / "mine"
    assert main([str(source), "--output", str(out / "train.jsonl"), "--report", str(out / "report.json")]) == 0
    rows, report = read(out, data_check="strict")
    assert len(rows) == 2 and any("report.json" in warning for warning in report.warnings)
    report.save(out / "data_report.json")
    assert len(read(out, data_check="strict")[0]) == 2


def test_a_model_beside_the_rows_is_no_data(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.json", "vocab.json"):
        write(tmp_path / "model", json.dumps([triple(1)]).encode(), name)
    write(tmp_path, lines(triple(0)), "config.json")  # a user's file of that name, with no model around it
    assert warnings_of(tmp_path)[0] == ["config.json"]


def test_what_a_folder_holds_besides_data_is_counted_and_named_once(tmp_path):
    for name in ("notes.txt", "README.md", "a.pdf", "b.log", ".hidden.jsonl"):
        write(tmp_path, b"x", name)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    write(tmp_path, lines(triple(0)), "train.jsonl")
    found, warnings = warnings_of(tmp_path)
    assert found == ["train.jsonl"] and len(warnings) == 3
    said = "\n".join(warnings)
    for part in ("4 files", "README.md, a.pdf, b.log, ...", "2 entries", "gone.jsonl, pipe.jsonl", "1 hidden"):
        assert part in said


def table(path: Path, columns: dict, **how) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, **how)
    return path


def test_a_table_that_unpacks_to_far_more_than_text_is_refused_before_it_is_unpacked(tmp_path):
    import pyarrow as pa

    pair = {"response_chosen": ["a"], "response_rejected": ["b"]}
    long = {"question": pa.array(["x" * (6 << 20)])} | pair
    path = table(tmp_path / "long.parquet", long, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    rows, report = read(path)
    assert not rows and report.dropped == {"unpacks_too_far": 1}
    same = {name: pa.array(["x"]).take(pa.array([0] * 300_000)) for name in ("question", *pair)}
    path = table(tmp_path / "many.parquet", same)
    assert path.stat().st_size < 30_000
    assert read(path)[1].dropped == {"unpacks_too_far": 1}
    text = os.urandom(9 << 20).hex()
    whole = {"question": [text, "q"], "response_chosen": ["a", "a"], "response_rejected": ["b", "b"]}
    rows, report = read(table(tmp_path / "row.parquet", whole))
    assert len(rows) == 1 and report.dropped == {"line_too_long": 1} and places(report, "line_too_long") == [1]


def test_rows_that_cannot_fit_are_not_held(tmp_path):
    """A few kilobytes of gzip that hold a hundred megabytes of rows."""
    import resource

    row = json.dumps(triple(1, question="x " * 4_000_000)).encode() + b"\n"
    path = write(tmp_path, gzip.compress(row * 12 + lines(triple(2))), "rows.jsonl.gz")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = DataReport()
    rows = load_rows([path], report, longest=200_000)
    assert [row.line for row in rows] == [13] and report.dropped == {"too_long": 12}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 90_000  # kilobytes; the rows have 96 MB


@pytest.mark.parametrize("text", ["\u200b", "\u200b \u200d\ufeff", "\u00ad\u00ad", "\u3164", "\u2066\u2069"])
def test_text_that_nobody_can_see_is_empty(tmp_path, text):
    rows = [triple(0, question=text), triple(1, response_chosen=text), triple(2, history=[["a", text]]), triple(3)]
    kept, report = read(write(tmp_path, lines(*rows)))
    assert [row.line for row in kept] == [4]
    assert report.dropped == {"empty_prompt": 1, "empty_answer": 1, "empty_turn": 1}
    kept, _ = read(write(tmp_path, lines(triple(0, question="\u200bvisible"))))
    assert len(kept) == 1


def test_what_stands_beside_a_row_without_a_question_is_left():
    """A format that is forced on a dialogue finds no question there; a text in `history` does not end the run."""
    pair = Pair(None, "good", "bad")
    complete(pair, {"history": "x", "context": "y"}, [("history", "history"), ("context", "context")])
    assert pair == Pair(None, "good", "bad")
