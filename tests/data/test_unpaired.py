"""Rows of one answer and a label: read for loss=kto whatever their columns are called, refused for every other loss."""

from __future__ import annotations

import json

import pytest
from format_rows import BAD, GOOD, USER, a, g, h, u
from reading import lines, read, write

from preference.data.formats import Options, choose
from preference.data.kept_rows import KeptRows
from preference.data.report import DataReport
from preference.data.rows import DataError
from preference.data.singles import alike
from preference.templates.families import get_conv_template
from preference.tokens import convert as script
from preference.tokens.datasets import build_dataset
from preference.tokens.showing import describe_pair
from tiny import tiny_tokenizer

SINGLE = Options(unpaired=True)
# rows with a {} for the answer and a [] for the label -> (good, bad) labels
SHAPES = {
    "trl": lambda text, label: {"prompt": USER, "completion": text, "label": label},
    "trl messages": lambda text, label: {"prompt": [u()], "completion": [a(text)], "label": label},
    "llamafactory": lambda text, label: {"conversations": [h(USER), g(text)], "kto_tag": label},
    "ms-swift": lambda text, label: {"messages": [u(), a(text)], "label": label},
    "alpaca": lambda text, label: {"instruction": USER, "input": "", "output": text, "kto_tag": label},
    "log": lambda text, label: {"user_message": USER, "assistant_response": text, "feedback": label, "model": "m"},
    "ours": lambda text, label: {"system": "Be kind.", "history": [["Hi.", "Hello."]], "question": USER,
                                 "response": text, "label": label},
    "chinese": lambda text, label: {"问题": USER, "回答": text, "标签": label},
    "halos": lambda text, label: {"prompt": [u()], "output": [a(text)], "label": label, "type": "binary_feedback"},
}  # fmt: skip
LABELS = {
    "flags": (True, False), "0/1": (1, 0), "1/-1": (1, -1), "text": ("1", "0"), "good/bad": ("good", "bad"),
    "thumbs": ("thumbs_up", "thumbs_down"), "Thumbs Up": ("Thumbs Up", "Thumbs Down"), "emoji": ("👍", "👎"),
    "desirable": ("desirable", "undesirable"), "好": ("好评", "差评"), "floats": (1.0, 0.0),
}  # fmt: skip


def judged(path, options=SINGLE):
    return [(row.chosen, row.label) for row in read(path, options=options)[0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_label_in_every_shape(shape, tmp_path):
    make = SHAPES[shape]
    for good, bad in LABELS.values():
        rows = [make(GOOD, good), make(BAD, bad), make(BAD, bad)]
        path = write(tmp_path, lines(*rows))
        assert judged(path) == [(GOOD, True), (BAD, False), (BAD, False)], (good, bad)
        first = read(path, options=SINGLE)[0][0]
        assert first.question == USER and first.rejected == "" and first.prompt is None
        _, report = read(path)  # for any other loss
        assert report.rows_kept == 0 and "loss=kto" in report.summary()


@pytest.mark.parametrize(
    "column, good, bad",
    [("is_good", "yes", "no"), ("thumbs_up", 1, 0), ("liked", True, False), ("is_bad", False, True),
     ("Thumbs Down", "0", "1"), ("点踩", 0, 1)],
)  # fmt: skip
def test_columns_whose_name_says_what_true_means(column, good, bad, tmp_path):
    path = write(tmp_path, lines(*({"question": USER, "answer": text, column: value}
                                   for text, value in ((GOOD, good), (BAD, bad)))))  # fmt: skip
    assert judged(path) == [(GOOD, True), (BAD, False)]


@pytest.mark.parametrize("values", [(1, 2), (5, 1), (0.9, 0.1), (0, 1, 2), ("A", "B"), ("yes", "no"), ("4", "1")])
def test_labels_that_do_not_speak_for_themselves_are_asked_for(values, tmp_path):
    rows = [{"prompt": USER, "completion": f"{GOOD} {i}", "label": value} for i, value in enumerate(values)]
    path = write(tmp_path, lines(*rows))
    _, report = read(path, options=SINGLE)
    assert report.rows_kept == 0 and "--labels" in report.summary()
    said = choose(unpaired=True, labels=f"{values[0]}=good,{values[1]}=bad")
    assert [label for _, label in judged(path, said)] == [True, False]


def test_labels_are_named_as_the_file_spells_them_and_count_for_single_answers_alone(tmp_path):
    def said(labels, *values):
        rows = [{"prompt": USER, "completion": f"{GOOD} {i}", "label": value} for i, value in enumerate(values)]
        kept, report = read(write(tmp_path, lines(*rows)), options=choose(unpaired=True, labels=labels))
        return [row.label for row in kept], " ".join(report.warnings)

    assert said("true=bad,false=good", True, False) == ([False, True], "")
    assert said("5=good,1=bad", {"rating": 5}, {"rating": 1}) == ([True, False], "")
    judged, warned = said("0=first,1=second", 1, 0)
    assert judged == [True, False] and "labels (--labels) has no effect" in warned
    rows = [{"prompt": USER, "response_a": GOOD, "response_b": BAD, "winner": "a"}]
    options = choose(unpaired=True, labels="a=good,b=bad")
    assert [row.chosen for row in read(write(tmp_path, lines(*rows)), options=options)[0]] == [GOOD]


def test_columns_that_say_bad_are_never_read_the_other_way_round(tmp_path):
    def said(**columns):
        count = len(next(iter(columns.values())))
        rows = [{"prompt": USER, "response": f"{GOOD} {i}"} | {name: v[i] for name, v in columns.items()}
                for i in range(count)]  # fmt: skip
        kept, report = read(write(tmp_path, lines(*rows)), options=SINGLE)
        return [row.label for row in kept], dict(report.dropped)

    assert said(is_bad=["+1", "0"]) == ([False, True], {})
    assert said(thumbs_down=[1, -1]) == ([], {"choice_needed": 1})
    both = {"thumbs_up": [1, 0, 0, 1], "thumbs_down": [0, 1, 0, 1]}
    assert said(**both) == ([True, False], {"no_label": 2})  # no vote, and both


def test_a_single_answer_with_tools_is_dropped_by_name(tmp_path):
    row = SHAPES["trl"](GOOD, True) | {"tools": [{"name": "weather"}]}
    assert read(write(tmp_path, lines(row)), options=SINGLE)[1].dropped == {"tool_calls": 1}


def test_a_vote_that_was_not_cast_is_dropped_by_name(tmp_path):
    rows = [{"prompt": USER, "completion": GOOD, "label": value} for value in (1, -1, 0, None, "neutral", "wat")]
    kept, report = read(write(tmp_path, lines(*rows)), options=SINGLE)
    assert [row.label for row in kept] == [True, False]
    assert report.dropped == {"no_label": 3, "wrong_label": 1}


def test_pairs_are_pairs_for_kto_too_and_are_taken_apart_beside_single_answers(tmp_path):
    pair = {"prompt": USER, "chosen": GOOD, "rejected": BAD}
    assert read(write(tmp_path, lines(pair)), options=SINGLE)[0][0].label is None
    write(tmp_path, lines({"prompt": USER, "completion": "So so.", "label": False}), "b.jsonl")
    rows, report = read(tmp_path, options=SINGLE)
    found = alike(KeptRows(rows), report)
    assert [(row.chosen, row.label) for row in found] == [("So so.", False), (GOOD, True), (BAD, False)]
    assert report.rows_kept == 3 and report.notes["pairs_taken_apart"] == 1
    with pytest.raises(DataError, match="two rows"):
        alike(KeptRows(rows[:1]), report)


def test_one_is_written_and_read_again(tmp_path, capsys):
    rows = [SHAPES["ours"](GOOD, "up"), SHAPES["ours"](BAD, "down")]
    path, out, again = write(tmp_path, lines(*rows)), tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    assert script.main([str(path), "--output", str(out)]) == 1
    assert "--unpaired" in capsys.readouterr().out
    assert script.main([str(path), "--output", str(out), "--unpaired"]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["response"], row["label"]) for row in written] == [(GOOD, True), (BAD, False)]
    assert script.main([str(out), "--output", str(again), "--unpaired"]) == 0
    assert again.read_text() == out.read_text()
    text = capsys.readouterr().out
    assert "single_answers 2" in text and "length_bias" not in text


def test_prepared_rows_hold_the_answer_its_label_and_an_answer_to_another_prompt(tmp_path):
    rows = [{"prompt": f"{USER} {i}", "completion": f"{GOOD} {'x ' * 40 * (i == 2)}{i}", "label": i < 2}
            for i in range(3)]  # fmt: skip
    kept, report = read(write(tmp_path, lines(*rows)), options=SINGLE)
    tokenizer, conv = tiny_tokenizer(), get_conv_template("qwen")
    limits = {"max_source_length": 100, "max_target_length": 60}
    dataset = build_dataset(kept, conv, tokenizer, report=report, **limits)
    assert dataset["desirable"] == [1.0, 1.0, 0.0]
    for row in dataset:
        assert tokenizer.decode(row["chosen_ids"]) == row["chosen"] != row["rejected"]
        full = next(other for other in dataset if other["chosen"] == row["rejected"])["chosen_ids"]
        assert row["rejected_ids"] == full[: 160 - len(row["prompt_ids"])]
    assert report.sections["tokens"]["single_answers"] == 3 and report.sections["tokens"]["good"] == 2
    assert "bad answer (learned" in describe_pair(dataset[2], tokenizer)
    pairs, _ = read(write(tmp_path, lines({"prompt": USER, "chosen": GOOD, "rejected": BAD})))
    assert "desirable" not in build_dataset(pairs, conv, tokenizer, report=DataReport(), **limits).column_names
