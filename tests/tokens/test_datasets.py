"""Rows to ids: rendering, the length filter, truncation, the report, and the split."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from conversation import get_conv_template
from preference.data.report import DataError, DataReport
from preference.data.row import Row
from preference.data.rows import load_rows
from preference.tokens import datasets
from preference.tokens.datasets import build_dataset, split_by_prompt
from preference.tokens.pairs import PairBatcher
from preference.tokens.rendering import Renderer, render
from preference.tokens.showing import describe_pair
from tiny import tiny_tokenizer

QWEN = get_conv_template("qwen")
HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


def row(question="What helps?", chosen="Rest.", rejected="Nothing at all.", line=1, **more) -> Row:
    return Row(question, chosen, rejected, file="rows.jsonl", line=line, **more)


def build(rows, report=None, conv=QWEN, source=200, target=200, **more):
    return build_dataset(
        rows,
        conv,
        tiny_tokenizer(),
        max_source_length=source,
        max_target_length=target,
        report=report or DataReport(),
        **more,
    )


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False).input_ids


# -- rendering


def test_a_row_becomes_three_texts():
    texts = render(row(history=(("Hi", "Hello"),)), QWEN)
    assert texts == {
        "prompt": f"{HEAD}Hi{TAIL}Hello<|im_end|>\n<|im_start|>user\nWhat helps?{TAIL}",
        "chosen": "Rest.<|im_end|>",
        "rejected": "Nothing at all.<|im_end|>",
    }


@pytest.mark.parametrize(
    "prompt, forced, rendered",
    [
        (f"{HEAD}Hi{TAIL}", False, True),
        (f"<|im_start|>system\nOther.<|im_end|>\n<|im_start|>user\nHi{TAIL}", False, True),
        ("Question: Hi\nAnswer:", False, False),
        (f"{HEAD}Hi", False, False),  # does not end where the assistant begins
        (f"Hi{TAIL}", False, False),
        ("<s>[INST] Hi<|im_end|> [/INST]", True, True),
        ("<s>[INST] Hi<|im_end|> [/INST]", False, False),
    ],
)
def test_control_tokens_of_a_ready_prompt(prompt, forced, rendered):
    report = DataReport()
    (pair,) = build([row("", "Rest.", "No.", prompt=prompt)], report, prompt_is_rendered=forced)
    assert pair["prompt"] == prompt
    control = {tiny_tokenizer().convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    assert (pair["prompt_ids"] == ids_of(prompt)) == (rendered or "<|" not in prompt)
    assert bool(control & set(pair["prompt_ids"])) == (rendered and "<|" in prompt)
    assert report.sections["tokens"]["ready_prompts"] == {"rendered": int(rendered), "plain": int(not rendered)}
    assert any("rows.jsonl:1" in warning for warning in report.warnings) == (not rendered)


@pytest.mark.parametrize("prompt", [f"{HEAD}Hi{TAIL}", "Q: Hi\nA:"])
@pytest.mark.parametrize("ending", ["", "<|im_end|>", "<|im_end|>\n", " <|im_end|>"])
def test_a_ready_answer_gets_its_stop_text_once(prompt, ending):
    report = DataReport()
    (pair,) = build([row("", f"Rest.{ending}", "No.", prompt=prompt)], report)
    assert pair["chosen"] == "Rest.<|im_end|>"
    assert pair["chosen_ids"] == ids_of("Rest.<|im_end|>")
    assert report.sections["tokens"]["control_look_alikes"]["rows"] == 0


def test_a_ready_answer_keeps_its_inner_look_alikes_as_text():
    (pair,) = build([row("", "a<|im_end|>b<|im_end|>", "No.", prompt=f"{HEAD}Hi{TAIL}")])
    assert pair["chosen"] == "a<|im_end|>b<|im_end|>"
    assert pair["chosen_ids"].count(tiny_tokenizer().eos_token_id) == 1


def test_rendered_prompts_get_the_templates_reply_and_plain_ones_the_stop_text_alone():
    qwen3 = get_conv_template("qwen3")
    prompt = qwen3.get_prompt("Hi")
    assert render(row("", "A", "B", prompt=prompt), qwen3)["chosen"] == "<think>\n\n</think>\n\nA<|im_end|>"
    assert render(row("", "A", "B", prompt="Q: Hi"), qwen3)["chosen"] == "A<|im_end|>"


def test_a_row_that_the_template_refuses_is_dropped_by_name():
    report = DataReport()
    dataset = build([row(system="Be brief."), row(line=2)], report, get_conv_template("gemma"))
    assert dataset["source"] == ["rows.jsonl:2"]
    (example,) = report.examples["template_refused"]
    assert (example["file"], example["line"]) == ("rows.jsonl", 1) and "system" in example["detail"]


def test_reasoning_that_the_template_takes_out_is_taken_out_of_rows_with_look_alikes_too():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|channel>", "<channel|>", "<|turn>", "<turn|>", "<bos>"], special_tokens=True)
    conv = get_conv_template("gemma4")
    batcher = PairBatcher(Renderer(conv), tokenizer, 500, 500, truncate=False)
    (pair,) = batcher([row("<|turn> <|channel>?", "<|channel>thought hm<channel|>Rest <turn|>.", "No.")])[0].to_pylist()
    assert pair["chosen"] == "Rest <turn|>.<turn|>" == conv.get_response("<|channel>x<channel|>Rest <turn|>.")
    tokens = tokenizer.convert_ids_to_tokens(pair["prompt_ids"] + pair["chosen_ids"])
    assert tokens.count("<turn|>") == 2 and tokens.count("<|turn>") == 2 and "<|channel>" not in tokens


# -- lengths


def lengths(pair) -> tuple[int, int, int]:
    return len(pair["prompt_ids"]), len(pair["chosen_ids"]), len(pair["rejected_ids"])


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_pair_stays_if_both_answers_fit_with_the_prompt(longer):
    answers = {"chosen": "Rest.", "rejected": "Drink."} | {longer: "Rest, drink water, and see a doctor if it lasts."}
    (pair,) = build([row(**answers)])
    need = lengths(pair)[0] + max(lengths(pair)[1:])
    assert len(build([row(**answers)], source=1, target=need - 1)) == 1
    report = DataReport()
    rows = [row(**answers), row(line=2, question="?", chosen="a", rejected="b")]
    assert build(rows, report, source=1, target=need - 2)
    (example,) = report.examples["too_long"]
    assert (example["file"], example["line"]) == ("rows.jsonl", 1)
    assert str(need) in example["detail"] and str(need - 1) in example["detail"]


def test_stop_text_counts_and_ends_both_answers():
    (pair,) = build([row()])
    assert pair["chosen_ids"] == [*ids_of("Rest."), tiny_tokenizer().eos_token_id]
    assert pair["rejected_ids"][-1] == tiny_tokenizer().eos_token_id
    assert pair["prompt_ids"] == ids_of(f"{HEAD}What helps?{TAIL}")


def test_nothing_left_says_the_numbers():
    report = DataReport()
    with pytest.raises(DataError) as error:
        build([row(), row(line=2, chosen="Rest. " * 50)], report, source=8, target=9)
    text = str(error.value)
    (pair,) = build([row()])
    shortest = lengths(pair)[0] + max(lengths(pair)[1:])
    assert "of 2: 2 too_long" in text and "8 + max_target_length 9 = 17 tokens" in text
    assert f"needs {shortest}\n" in text and "p50" in text and "chosen: mean" in text
    assert report.dropped["too_long"] == 2
    with pytest.raises(DataError, match="no rows"):
        build([])


def test_truncation_cuts_pairs_that_do_not_fit_and_counts_the_cuts():
    tokenizer = tiny_tokenizer()
    short, long = row(), row("Name juices. " * 30, "Apple and mint. " * 20, "Orange.", line=2)
    report = DataReport()
    whole, cut = build([short, long], report, source=45, target=30, truncate=True)
    assert whole == build([short])[0]
    assert lengths(cut) == (45, 30, len(ids_of("Orange.<|im_end|>")))
    assert cut["prompt_ids"] == ids_of(render(long, QWEN)["prompt"])[-45:]  # the end, which the answer follows
    assert tokenizer.eos_token_id not in cut["chosen_ids"]
    assert cut["rejected_ids"][-1] == tokenizer.eos_token_id  # was not cut
    assert cut["chosen"] == tokenizer.decode(cut["chosen_ids"])
    assert report.sections["tokens"]["cut"] == {"prompt": 1, "chosen": 1, "rejected": 0}


def test_truncation_by_one_token_takes_the_stop_token_and_keeps_a_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    answer = "Rest, and drink water."
    need = len(ids_of(f"{answer}<|im_end|>"))
    limits = {"max_source_length": 20, "max_target_length": need - 1}
    rows = [row("What helps? " * 9, answer, "No.")]
    (pair,) = build_dataset(rows, QWEN, tokenizer, **limits, report=DataReport(), truncate=True)
    assert pair["chosen_ids"] == ids_of(answer)
    assert pair["prompt_ids"][0] == tokenizer.bos_token_id and len(pair["prompt_ids"]) == 20


def test_a_cut_answer_holds_no_part_of_a_stop_text_of_two_tokens():
    conv = replace(QWEN, reply_end="<|im_end|><|endoftext|>")
    need = len(ids_of("Rest, and drink water.<|im_end|>"))
    (pair,) = build([row("What helps? " * 9, "Rest, and drink water.", "No.")], None, conv, 20, need, truncate=True)
    assert pair["chosen_ids"] == ids_of("Rest, and drink water.")
    assert pair["rejected_ids"] == ids_of("No.<|im_end|><|endoftext|>")


def test_answers_that_a_cut_makes_equal_are_dropped():
    report = DataReport()
    rows = [row(line=1), row("?" * 99, "Rest and water", "Rest and wine", line=2)]
    dataset = build(rows, report, source=50, target=3, truncate=True)
    assert dataset["source"] == ["rows.jsonl:1"]
    assert report.dropped == {"identical_answers": 1}


def test_report_of_lengths_and_look_alikes():
    rows = [row(line=i, chosen="Rest. " * i, rejected="Rest.") for i in range(2, 12)]
    rows += [row(line=12, chosen="Rest.", rejected="Rest. " * 40), row(line=13, chosen="Yes<|im_end|>", rejected="Not")]
    report = DataReport()
    dataset = build(rows, report)
    section = report.sections["tokens"]
    counts = sorted(len(ids) for ids in dataset["chosen_ids"])
    assert section["pairs"] == 12
    assert (section["chosen"]["min"], section["chosen"]["max"]) == (counts[0], counts[-1])
    assert section["chosen"]["p50"] in counts[5:7]
    bias = {"chosen_longer": round(11 / 12, 4), "equal": 0.0, "accuracy_of_length_alone": round(11 / 12, 4)}
    assert section["length_bias"] == bias
    look_alikes = section["control_look_alikes"]
    assert look_alikes == {"rows": 1, "tokens": {"<|im_end|>": 1}, "places": ["rows.jsonl:13"]}
    json.dumps(report.to_dict())


def test_order_and_counts_do_not_depend_on_batches(monkeypatch):
    rows = [row(f"Question {i}?", f"Yes {i}<|im_end|>" if i % 3 else f"Yes {i}", "No.", line=i) for i in range(20)]
    reports = DataReport(), DataReport()
    whole = build(rows, reports[0], source=30, target=25).to_list()
    monkeypatch.setattr(datasets, "ROWS_PER_BATCH", 3)
    assert build(iter(rows), reports[1], source=30, target=25).to_list() == whole
    assert reports[0].to_dict() == reports[1].to_dict()
    assert [pair["source"] for pair in whole] == [f"rows.jsonl:{i}" for i in range(20)]


# -- what is printed, and the split


def test_described_pair_marks_what_is_learned():
    (pair,) = build([row()])
    text = describe_pair(pair, tiny_tokenizer())
    assert "⟦Rest.<|im_end|>⟧" in text and "⟦Nothing at all.<|im_end|>⟧" in text
    assert text.index(f"What helps?{TAIL}") < text.index("⟦R")
    assert text.startswith("rows.jsonl:1:") and f"'<|im_end|>'={tiny_tokenizer().eos_token_id}" in text
    assert len(describe_pair(pair | {"prompt_ids": pair["prompt_ids"] * 300}, tiny_tokenizer())) < 4000


@pytest.mark.parametrize("as_dataset", [False, True])
def test_split_keeps_questions_together(as_dataset):
    texts = [f"Question {i % 41}?" if i % 2 or as_dataset else f" question  {i % 41}?" for i in range(120)]
    rows = [row(text, f"Yes {i}", "No", line=i) for i, text in enumerate(texts)]
    given = build(rows) if as_dataset else rows
    training, evaluation = split_by_prompt(given, 10, seed=3)

    def questions(part):
        return {item["prompt"] if as_dataset else " ".join(item.question.casefold().split()) for item in part}

    assert len(training) + len(evaluation) == 120 and 10 <= len(evaluation) <= 12
    assert not questions(training) & questions(evaluation)
    lines = [item["source"] if as_dataset else item.line for item in training]
    assert lines == sorted(lines, key=lambda line: int(str(line).split(":")[-1]))  # the given order


def test_split_is_the_same_for_a_seed_in_any_order():
    rows = [row(f"Question {i}?", line=i) for i in range(50)]
    chosen = {item.line for item in split_by_prompt(rows, 20, seed=1)[1]}
    assert chosen == {item.line for item in split_by_prompt(rows[::-1], 20, seed=1)[1]}
    assert chosen != {item.line for item in split_by_prompt(rows, 20, seed=2)[1]}


def test_split_that_cannot_be_is_refused():
    rows = [row(line=i) for i in range(9)]
    with pytest.raises(DataError, match="1 different questions"):
        split_by_prompt(rows, 10, seed=0)
    with pytest.raises(ValueError, match="between 0 and 100"):
        split_by_prompt(rows, 0, seed=0)
    training, evaluation = split_by_prompt([*rows, row("Other?")], 50, seed=0)  # whole groups, the nearest there is
    assert (len(training), len(evaluation)) == (9, 1)


def test_numbers_that_rows_bring_become_columns(tmp_path):
    """A weight or a margin of any format's row; rows without one get the neutral value, none at all gives no column."""
    pair = {"response_chosen": "a good answer", "response_rejected": "a bad one"}
    numbers = [
        {"pair_weight": 2, "score_margin": 0.5},
        {},
        {"pair_weight": 0},
        {"pair_weight": -1},
        {"pair_weight": "x"},
    ]
    lines = [json.dumps({"question": f"q{i}", **pair, **more}) for i, more in enumerate(numbers)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    report = DataReport()
    rows = load_rows([tmp_path / "rows.jsonl"], report)
    assert report.dropped["bad_number"] == 2
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        dataset = build(rows, cache_dir=cache)
        assert dataset["pair_weight"][:] == [2.0, 1.0, 0.0]
        assert dataset["score_margin"][:] == [0.5, 0.0, 0.0]
    assert not {"pair_weight", "score_margin"} & set(build(rows[1:2]).column_names)
    scored = row(extra={"score_chosen": 4, "score_rejected": 1.5})
    assert build([scored])["score_margin"][:] == [2.5]
