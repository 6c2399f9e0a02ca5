"""The same rows out of JSON, JSON lines, CSV, Parquet, gzip, saved datasets and the hub; what each can break."""

from __future__ import annotations

import json

import pytest
from format_rows import (
    BAD,
    CHAT,
    CONTAINERS,
    GOOD,
    LISTS,
    MULTI,
    PAIR,
    ROWS,
    SHP,
    TRIPLE,
    USER,
    a,
    as_csv,
    as_parquet,
    u,
)
from reading import lines, read, write

from preference.data.rows import DataError, DataReport, load_rows
from preference.data.written_values import value_of

# a list in a CSV cell is text unless it holds messages, so what needs other lists has no CSV form
BOXED = [(name, row, box) for name, row in ROWS for box in CONTAINERS if name not in LISTS or "csv" not in box]


@pytest.mark.parametrize("name, row, container", BOXED, ids=[f"{box[0]}-{box[2]}-{i}" for i, box in enumerate(BOXED)])
def test_same_rows_out_of_every_container(tmp_path, name, row, container):
    rows, report = read(write(tmp_path, CONTAINERS[container]([row, row]), container))
    assert [(r.system, r.history, r.question, r.chosen, r.rejected) for r in rows] == [(None, (), USER, GOOD, BAD)] * 2
    assert next(iter(report.files.values()))["format"] == name


BOXED_MULTI = [(row, box) for row in MULTI for box in CONTAINERS if "output" not in row or "csv" not in box]


@pytest.mark.parametrize("row, container", BOXED_MULTI, ids=[f"{box}-{i}" for i, (_, box) in enumerate(BOXED_MULTI)])
def test_system_and_history_out_of_every_container(tmp_path, row, container):
    rows, _ = read(write(tmp_path, CONTAINERS[container]([row, row]), container))
    assert [(r.system, r.history, r.question.replace("\n", " "), r.chosen, r.rejected) for r in rows] == [
        ("Be kind.", (("Hello", "Hi."),), USER, GOOD, BAD)
    ] * 2


def test_csv_with_newlines_in_cells_has_true_line_numbers_and_loses_only_broken_rows(tmp_path):
    text = (
        'question,chosen,rejected\r\n"line 1\nline 2",a,b\r\n'  # line 2
        "too,few\r\n"  # line 4
        'q,"open quote,b\r\nq,a,b\r\n'  # line 5: swallows what follows until it is stepped back
        'q3,"with ""quotes"" and, comma",b\r\n'
    )
    rows, report = read(write(tmp_path, b"\xef\xbb\xbf" + text.encode(), "rows.csv"))
    assert [(row.line, row.question) for row in rows] == [(2, "line 1\nline 2"), (6, "q"), (7, "q3")]
    assert rows[-1].chosen == 'with "quotes" and, comma'
    assert sorted(place["line"] for place in report.examples["broken_csv"]) == [4, 5]


def test_too_long_line_of_a_csv_costs_itself_alone(tmp_path, monkeypatch):
    from preference.data import json_records

    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 1000)
    content = b"question,chosen,rejected\nq1,a,b\nq2,a," + b"x" * 2000 + b"\nq3,a,b\n"
    rows, report = read(write(tmp_path, content, "rows.csv"))
    assert [row.line for row in rows] == [2, 4] and report.dropped == {"line_too_long": 1}


def test_an_answer_that_looks_like_json_stays_text(tmp_path):
    row = {"question": USER, "chosen": '[["a", "b"], ["c", "d"]]', "rejected": '{"a": 1}'}
    rows, _ = read(write(tmp_path, as_csv([row]), "rows.csv"))
    assert (rows[0].chosen, rows[0].rejected) == (row["chosen"], row["rejected"])


def test_an_input_that_is_a_list_of_numbers_stays_text(tmp_path):
    row = {"instruction": "Sort this.", "input": "[3, 1, 2]", **PAIR}
    rows, _ = read(write(tmp_path, as_csv([row]), "rows.csv"))
    assert rows[0].question == "Sort this.\n[3, 1, 2]"
    rows, _ = read(write(tmp_path, as_csv([SHP | {"history": "[1, 2]"}]), "rows.csv"))
    assert rows[0].question == "[1, 2]"


@pytest.mark.parametrize("question, answers", [(USER, CHAT), ([u()], CHAT), ([u()], PAIR), (USER, PAIR)])
def test_named_columns_take_messages_too(tmp_path, question, answers):
    row = {"Q": question, "A": answers["chosen"], "B": answers["rejected"]}
    rows = load_rows([write(tmp_path, lines(row))], DataReport(), columns="question=Q,chosen=A,rejected=B")
    assert (rows[0].question, rows[0].chosen, rows[0].rejected) == (USER, GOOD, BAD)


def test_python_lists_in_csv_cells(tmp_path):
    row = {"question": USER, **PAIR, "history": str([["Hello", "it's me"]])}
    rows, _ = read(write(tmp_path, as_csv([row]), "rows.csv"))
    assert rows[0].history == (("Hello", "it's me"),)


def test_message_lists_as_pandas_writes_numpy_arrays(tmp_path):
    """Dataset.to_pandas().to_csv(): no comma between the objects, which may hold braces and quotes themselves."""
    chosen, rejected = [u(), a('It\'s {a}\n {b} "c"')], [u(), a(BAD)]
    both = {"chosen": chosen, "rejected": rejected}
    cells = {side: "[" + "\n ".join(map(repr, turns)) + "]" for side, turns in both.items()}
    rows, _ = read(write(tmp_path, as_csv([cells]), "rows.csv"))
    assert (rows[0].question, rows[0].chosen, rows[0].rejected) == (USER, chosen[1]["content"], BAD)
    rows, report = read(write(tmp_path, as_csv([cells, cells | {"chosen": cells["chosen"][:-3] + "]"}]), "rows.csv"))
    assert len(rows) == 1 and report.dropped == {"broken_csv": 1}
    ranked = "[{'answer': 'Rest and water.', 'rank': 1.0}\n {'answer': 'No idea.', 'rank': 2.0}]"
    nectar, _ = read(write(tmp_path, as_csv([{"prompt": USER, "answers": ranked}]), "rows.csv"))
    assert (nectar[0].question, nectar[0].chosen, nectar[0].rejected) == (USER, GOOD, BAD)
    assert "'chosen' cannot be parsed" in report.examples["broken_csv"][0]["detail"]


WRITTEN = {"json": json.dumps, "python": repr, "numpy": lambda turns: f"array({turns!r},\n      dtype=object)"}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("container", CONTAINERS)
def test_conversations_that_were_written_as_text(tmp_path, how, container):
    text = WRITTEN[how]
    rows = [
        {"chosen": text([u(), a(GOOD)]), "rejected": text([u(), a(BAD)])},
        {"question": USER, "response_chosen": text([a(GOOD)]), "response_rejected": text([a(BAD)])},
        {"prompt": text([u()]), "chosen": text([a(GOOD)]), "rejected": text(a(BAD))},
        {"history": text([["Hello", "it's me"]]), "question": USER, **PAIR},
    ]
    for number, row in enumerate(rows if how != "numpy" else rows[:2]):
        read_rows, report = read(write(tmp_path, CONTAINERS[container]([row, row]), f"{number}-{container}"))
        assert [(r.question, r.chosen, r.rejected) for r in read_rows] == [(USER, GOOD, BAD)] * 2, report.summary()


def test_answers_in_brackets_that_are_no_conversation_stay_text(tmp_path):
    row = {"prompt": USER, "chosen": '[{"name": "a"}]', "rejected": "[{'role': 'user', 'content': cut"}
    rows, _ = read(write(tmp_path, lines(row)))
    assert (rows[0].chosen, rows[0].rejected) == (row["chosen"], row["rejected"])


def test_damaged_parquet_is_a_fault(tmp_path):
    rows, report = read(write(tmp_path, as_parquet([TRIPLE])[:-9], "rows.parquet"))
    assert rows == [] and report.dropped == {"broken_parquet": 1}


def test_saved_dataset_folders(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list([TRIPLE, TRIPLE | {"question": "Second?"}, TRIPLE | {"question": "Third?"}])
    data.select([2, 0]).save_to_disk(tmp_path / "one")
    rows, _ = read(tmp_path / "one")
    assert [(row.question, row.line) for row in rows] == [("Third?", 1), (USER, 2)]
    assert len(read(tmp_path)[0]) == 2  # found in a folder, its side files are no data
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    rows, report = read(tmp_path / "two")
    assert len(rows) == 3 and "not read: test" in report.warnings[0]
    assert len(read(tmp_path / "two" / "test")[0]) == 3
    DatasetDict(a=data, b=data).save_to_disk(tmp_path / "three")
    with pytest.raises(DataError, match="ambiguous_split.*a.*b"):
        load_rows([tmp_path / "three"], DataReport())


def test_message_columns_of_older_datasets(tmp_path):
    row = {side: {"role": ["user", "assistant"], "content": [USER, text]} for side, text in PAIR.items()}
    rows, _ = read(write(tmp_path, lines(row)))
    assert (rows[0].question, rows[0].chosen, rows[0].rejected) == (USER, GOOD, BAD)


def test_hub_ids(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "none/there":
            raise FileNotFoundError("Dataset 'none/there' doesn't exist on the Hub")
        rows = datasets.Dataset.from_list([TRIPLE]).to_iterable_dataset()
        names = {"h4/uf": ("train_prefs", "train_gen", "test_prefs"), "x/y": ("one", "two")}.get(
            name, ("train", "test")
        )
        return rows if split else datasets.IterableDatasetDict(dict.fromkeys(names, rows))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hub:owner/name")[0][0].file == "hub:owner/name"
    assert len(read("hub:owner/name:config:test")[0]) == len(read("hub:owner/name::test")[0]) == 1
    assert asked == [("owner/name", None, None, True), ("owner/name", "config", "test", True),
                     ("owner/name", None, "test", True)]  # fmt: skip
    assert len(read("hub:h4/uf")[0]) == 1
    with pytest.raises(DataError, match="hub:x/y::one, hub:x/y::two"):
        load_rows(["hub:x/y"], DataReport())
    with pytest.raises(DataError, match="hub:none/there: hub_error.*doesn't exist"):
        load_rows(["hub:none/there"], DataReport())


@pytest.mark.parametrize(
    "begins, piece", [("", "'\\"), ("", "\\'"), ("'", "\\'"), ("'", '\\"'), ("'a'}", " "), ("", "[")]
)
def test_a_hostile_cell_takes_time_in_proportion_to_its_length(begins, piece):
    from time import process_time

    def seconds(count: int) -> float:
        cell = "[{'role': " + begins + piece * count + "}]"
        started = process_time()
        assert value_of("chosen", cell) == cell
        return process_time() - started

    assert seconds(400_000) < 20 * seconds(40_000) + 0.05  # it would be a hundred times as long, and minutes
