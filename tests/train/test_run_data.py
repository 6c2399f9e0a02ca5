"""The sets of a run out of its flags: which split trains, which evaluates, how many rows of each input."""

from __future__ import annotations

import json

import pytest
from reading import lines, triple

from conversation import get_conv_template
from preference.arguments import parse_arguments
from preference.terminal.console import Terminal
from preference.train.run_data import load_data
from tiny import tiny_tokenizer


def sets(tmp_path, *words: str):
    """(training sources, evaluation sources, report) of a run with these flags."""
    arguments = parse_arguments([*words, "--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")])
    train, evaluation, _ = load_data(
        arguments, get_conv_template("qwen"), tiny_tokenizer(), save_report=True, terminal=Terminal()
    )
    report = json.loads((tmp_path / "data_report.json").read_text())
    return *([row["source"] for row in rows] if rows else [] for rows in (train, evaluation)), report


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for at, name in enumerate(("train", "test")):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines(*(triple(20 * at + i) for i in range(20))))
    return tmp_path / "data"


def test_the_training_split_trains_and_the_test_split_evaluates(tmp_path, folder):
    train, evaluation, report = sets(tmp_path, "--train_file_dir", str(folder))
    assert len(train) == len(evaluation) == 20
    assert all("train.jsonl" in source for source in train) and all("test.jsonl" in source for source in evaluation)
    assert "evaluates test.jsonl" in report["warnings"][0]
    _, evaluation, _ = sets(tmp_path, "--train_file_dir", str(folder), "--do_train", "false")
    assert all("test.jsonl" in source for source in evaluation)
    train, evaluation, _ = sets(tmp_path, "--train_file_dir", str(folder), "--do_eval", "false")
    assert len(train) == 20 and not evaluation
    words = ("--train_file_dir", str(folder), "--validation_file_dir", str(folder / "train.jsonl"))
    _, evaluation, report = sets(tmp_path, *words)
    assert all("train.jsonl" in source for source in evaluation)
    assert report["warnings"][0].endswith("read is train.jsonl; not read: test.jsonl")


def test_a_cap_and_a_share_of_two_inputs(tmp_path, folder):
    text = f"{folder}/train.jsonl:5,{folder}/test.jsonl:0.5"
    train, evaluation, report = sets(tmp_path, "--train_file_dir", text, "--do_eval", "false")
    assert [sum(name in source for source in train) for name in ("train.jsonl", "test.jsonl")] == [5, 10]
    assert report["dropped"] == {"not_sampled": 25} and not evaluation
    again, _, _ = sets(tmp_path, "--train_file_dir", text, "--do_eval", "false")
    assert again == train


def test_texts_of_another_encoding(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(*(triple(i, question=f"感冒{i}") for i in range(9))).decode().encode("gb18030"))
    train, evaluation, _ = sets(tmp_path, "--train_file_dir", str(path), "--encoding", "gb18030")
    assert len(train) + len(evaluation) == 9
