"""Which files of a folder are read for what, by the names of their splits; several inputs with caps and shares."""

from __future__ import annotations

import pytest
from reading import lines, read, triple

from preference.data.inputs import Input, parse_inputs, take_wanted
from preference.data.report import DataError, DataReport
from preference.data.rows import load_rows
from preference.data.sources import find, find_sources
from preference.data.splits import name_of


@pytest.mark.parametrize(
    "path, kind, subset",
    [
        ("train.jsonl", "train", ""), ("data/train-00000-of-00002.parquet", "train", ""),
        ("train_1.jsonl", "train", ""),
        ("data/train_prefs-00000-of-00001.parquet", "train", "preferences"), ("train_gen.jsonl", "train", "gen"),
        ("test/a.jsonl", "test", ""), ("x/validation/b.csv", "validation", ""), ("med_dev.json", "validation", ""),
        ("val.jsonl.gz", "validation", ""), ("eval_rows.json", "test", ""), ("Test.JSONL", "test", ""),
        ("训练集.jsonl", "train", ""), ("医疗测试集.json", "test", ""), ("train_test.jsonl", "", ""),
        ("latest.jsonl", "", ""),
        ("training_rows.jsonl", "train", ""), ("contest.jsonl", "", ""), ("rows.jsonl", "", ""),
        ("dpo-train.jsonl", "train", "preferences"), ("data/train_en-00000-of-00001.parquet", "train", "en"),
    ],
)  # fmt: skip
def test_what_a_name_says(path, kind, subset):
    assert name_of(path) == (kind, subset)


def folder(tmp_path, *names: str):
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(lines(triple(i)))
    return str(tmp_path)


def names(paths) -> list[str]:
    return [path.rsplit("/", 1)[1] for path in paths]


HUB = ("data/train_prefs-00000-of-00002.jsonl", "data/train_prefs-00001-of-00002.jsonl",
       "data/test_prefs-00000-of-00001.jsonl", "data/train_gen-00000-of-00001.jsonl",
       "data/test_sft-00000-of-00001.jsonl")  # fmt: skip
FOLDERS = [  # names: read to train; beside them evaluates; read to evaluate
    (("a.jsonl", "b.jsonl"), ["a.jsonl", "b.jsonl"], [], ["a.jsonl", "b.jsonl"]),
    (("train.jsonl", "test.jsonl"), ["train.jsonl"], ["test.jsonl"], ["test.jsonl"]),
    (("train.jsonl", "test.jsonl", "val.jsonl"), ["train.jsonl"], ["val.jsonl"], ["val.jsonl"]),
    (("train/a.jsonl", "test/b.jsonl"), ["a.jsonl"], ["b.jsonl"], ["b.jsonl"]),
    (("train_a.jsonl", "train_b.jsonl", "test_a.jsonl"), ["train_a.jsonl", "train_b.jsonl"], ["test_a.jsonl"],
     ["test_a.jsonl"]),
    (("train.jsonl", "more.jsonl"), ["more.jsonl", "train.jsonl"], [], ["more.jsonl", "train.jsonl"]),
    (("sft_train.jsonl", "dpo_train.jsonl", "dpo_test.jsonl"), ["dpo_train.jsonl"], ["dpo_test.jsonl"],
     ["dpo_test.jsonl"]),
    (HUB, names(HUB[:2]), names(HUB[2:3]), names(HUB[2:3])),
]  # fmt: skip


@pytest.mark.parametrize("files, train, beside, evaluate", FOLDERS)
def test_splits_of_a_folder(tmp_path, files, train, beside, evaluate):
    path = folder(tmp_path, *files)
    chosen = find(path, "train")
    assert (names(chosen.read), names(chosen.evaluation)) == (train, beside)
    assert sorted(names(chosen.read + chosen.evaluation + chosen.left)) == sorted(
        name.rsplit("/")[-1] for name in files
    )
    assert names(find(path, "evaluate").read) == evaluate
    assert names(find_sources([path], "convert")) == train


@pytest.mark.parametrize(
    "files, said",
    [
        (("train.jsonl", "test.jsonl", "more.jsonl"), "more.jsonl names no split"),
        (("test.jsonl", "more.jsonl"), "more.jsonl names no split"),
        (("test.jsonl",), "it holds the split test alone"),
        (("train_en-00000-of-00001.jsonl", "train_zh-00000-of-00001.jsonl"), "several sets for one split"),
    ],
)
def test_what_names_do_not_tell_is_asked_for(tmp_path, files, said):
    with pytest.raises(DataError, match=f"ambiguous_split.*{said}.*with commas"):
        find(folder(tmp_path, *files), "train")


def test_the_report_says_what_is_not_read(tmp_path):
    rows, report = read(folder(tmp_path, *HUB))
    assert len(rows) == 2
    (warning,) = report.warnings
    assert all(name in warning for name in names(HUB[2:]))


def test_inputs_with_caps_and_shares(tmp_path):
    path = folder(tmp_path, "a.jsonl", "b/c.jsonl", "odd,name:5.jsonl")
    a, b, odd = f"{path}/a.jsonl", f"{path}/b", f"{path}/odd,name:5.jsonl"
    assert parse_inputs(f"{a}:5000, {b}/:0.3,hub:owner/name,{a}x:1.0") == [
        Input(a, cap=5000), Input(b + "/", share=0.3), Input("hub:owner/name"), Input(a + "x"),
    ]  # fmt: skip
    assert parse_inputs(odd) == [Input(odd)]
    for wrong in (f"{a}:0", f"{a}:1.5", f"{a}:-3", f"{a}:nan", "", ",", f"{a},{a}:3"):
        with pytest.raises(ValueError, match="stands a number of rows|no file|named twice"):
            parse_inputs(wrong)


def test_wanted_rows_are_exact_and_the_same_everywhere(tmp_path):
    for name, count in (("a", 50), ("b", 101)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*(triple(i) for i in range(count))))
    text = f"{tmp_path}/a.jsonl:20,{tmp_path}/b.jsonl:0.3"
    drawn = []
    for _ in range(2):
        report = DataReport()
        inputs = [(one, find_sources([one.path])) for one in parse_inputs(text)]
        rows = take_wanted(load_rows([one.path for one, _ in inputs], report), inputs, 7, report)
        assert [sum(row.file.endswith(f"{name}.jsonl") for row in rows) for name in "ab"] == [20, 30]
        assert report.rows_kept == 50 and report.dropped == {"not_sampled": 101}
        drawn.append([(row.file, row.line) for row in rows])
    assert drawn[0] == drawn[1] == sorted(drawn[0]) and len(set(drawn[0])) == 50
    assert Input("x", cap=60).wanted(50) == 50 and Input("x", share=0.001).wanted(50) == 1
