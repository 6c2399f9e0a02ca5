"""Every family of datasets: what a row becomes, what is dropped by name, what is refused and how."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_triples import lines, read, write

from preference.formats import FORMATS, Options
from preference.triples import DataError, DataReport, iter_rows, load_rows

SHARED = Path(__file__).resolve().parents[2] / "shared" / "datasets"
real_samples = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/datasets is not there")

USER, GOOD, BAD = "What helps?", "Rest and water.", "No idea."


def u(text=USER):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


def s(text):
    return {"role": "system", "content": text}


def h(text):
    return {"from": "human", "value": text}


def g(text):
    return {"from": "gpt", "value": text}


def part(text):
    return [{"type": "text", "value": text}]


HH = "\n\nHuman: {}\n\nAssistant: {}"
TRIPLE = {"question": USER, "response_chosen": GOOD, "response_rejected": BAD}
CHAT = {"chosen": [u(), a(GOOD)], "rejected": [u(), a(BAD)]}
PAIR = {"chosen": GOOD, "rejected": BAD}
SHP = {"history": USER, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1, "score_ratio": 2.5, "post_id": "x"}
PKU = {"prompt": USER, "response_0": BAD, "response_1": GOOD}
RATED = {"helpfulness": 5, "honesty": 5, "instruction_following": 5, "truthfulness": 5}


def completion(text, **ratings):
    annotations = {aspect: {"Rating": str(value), "Rationale": ""} for aspect, value in (RATED | ratings).items()}
    return {"response": text, "overall_score": 10, "custom_system_prompt": "Be odd.", "annotations": annotations}


# (format, row that makes USER / GOOD / BAD): one or more for every format that is recognised by itself
ROWS = [
    ("triple", TRIPLE),
    ("triple", {"system": "", "history": [], **TRIPLE}),
    ("ms-swift", {"messages": [u(), a(GOOD)], "rejected_response": BAD}),
    ("ms-swift", {"messages": [u(), a(GOOD)], "rejected_response": [a(BAD)]}),
    ("ms-swift", {"messages": [u(), a(GOOD)], "rejected_messages": [u(), a(BAD)], "rejected_response": "ignored"}),
    ("ms-swift-v2", {"query": USER, "response": GOOD, "rejected_response": BAD, "images": []}),
    ("ms-swift-v2", {"instruction": USER, "output": GOOD, "rejected_response": BAD}),
    ("llamafactory-v1", {"chosen_messages": [u(part(USER)), a(part(GOOD))],
                         "rejected_messages": [u(part(USER)), a(part(BAD))]}),
    ("sharegpt", {"conversations": [h(USER)], "chosen": g(GOOD), "rejected": g(BAD)}),
    ("sharegpt", {"conversations": [h(USER)], "chosen": GOOD, "rejected": BAD}),
    ("sharegpt", {"conversation": [u()], "chosen": a(GOOD), "rejected": a(BAD)}),
    ("llamafactory-v1", {"chosen_conversations": [u(), a(GOOD)], "rejected_conversations": [u(), a(BAD)]}),
    ("azure", {"input": {"messages": [u()]}, "preferred_output": [a(GOOD)], "non_preferred_output": [a(BAD)]}),
    ("pku-saferlhf", PKU | {"better_response_id": 1}),
    ("cvalues", {"prompt": USER, "pos_resp": GOOD, "neg_resp": BAD, "pos_type": "x", "neg_type": "y"}),
    ("ultrafeedback", {"instruction": USER, "source": "x", "models": [],
                       "completions": [completion(BAD, honesty=1), completion("So so.", honesty=3), completion(GOOD)]}),
    ("ultrafeedback-argilla", CHAT | {"prompt": USER, "chosen-rating": 5.0, "rejected-rating": 1.5}),
    ("ultrafeedback-binarized", CHAT | {"prompt": USER, "prompt_id": "0", "messages": [u(), a(GOOD)],
                                        "score_chosen": 8.0, "score_rejected": 6.0}),
    ("capybara", CHAT | {"prompt": "no", "rating_chosen": 5, "rating_rejected": 4, "chosen_model": "m",
                         "conversation": []}),
    ("ultramix", CHAT | {"prompt": USER, "task_category": "x", "chosen_instruct_reward": 1.0,
                         "rejected_instruct_reward": 2.0}),
    ("axolotl", {"messages": [u()], "chosen": a(GOOD), "rejected": a(BAD)}),
    ("axolotl", {"messages": USER, "chosen": GOOD, "rejected": BAD}),
    ("axolotl", {"messages": [u()], "chosen": [a(GOOD)], "rejected": [a(BAD)]}),
    ("axolotl", {"messages": [u(), a(GOOD)], **CHAT}),
    ("axolotl-icr", {"input": USER, **PAIR}),
    ("nectar", {"prompt": HH.format(USER, ""), "answers": [{"answer": BAD, "rank": 3}, {"answer": GOOD, "rank": 1.0},
                                                          {"answer": "Middling.", "rank": 2}]}),
    ("stack-exchange", {"question": USER, "response_j": GOOD, "response_k": BAD}),
    ("arena", {"prompt": json.dumps([USER]), "response_a": json.dumps([BAD]), "response_b": json.dumps([GOOD]),
               "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}),
    ("arena", {"prompt": USER, "response_a": BAD, "response_b": GOOD, "winner": "model_b", "model_a": "x"}),
    ("arena-conversations", {"conversation_a": [u(), a(GOOD)], "conversation_b": [u(), a(BAD)], "winner": "model_a"}),
    ("argilla-strings", {"instruction": USER, "chosen_response": GOOD, "rejected_response": BAD}),
    ("argilla-strings", {"prompt": USER, "chosen_response": GOOD, "rejected_response": BAD}),
    ("ranking", {"instruction": USER, "input": "", "output": [GOOD, "Middling.", BAD]}),
    ("ranking", {"prompt": USER, "response": [GOOD, BAD]}),
    ("alpaca", {"instruction": USER, **PAIR, "output": GOOD}),
    ("orca", {"system": "", "question": USER, **PAIR}),
    ("orca", {"question": USER, "chatgpt": GOOD, "llama2-13b-chat": BAD}),
    ("orca", {"question": USER, **CHAT}),
    ("orca-rejudged", {"system": "", "input": USER, **PAIR, "status": "swapped", "rating": [9, 7]}),
    ("hh", {"chosen": HH.format(USER, GOOD), "rejected": HH.format(USER, BAD)}),
    ("hh-prompt", {"prompt": HH.format(USER, ""), "response": GOOD, **PAIR}),
    ("hh-cn", {"context": [{"role": "human", "text": USER}], "chosen": {"role": "assistant", "text": GOOD},
               "rejected": {"role": "assistant", "text": BAD}}),
    ("shp", SHP),
    ("shp", SHP | {"human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0}),
    ("trl", {"prompt": [u()], "chosen": [a(GOOD)], "rejected": [a(BAD)]}),
    ("trl", {"prompt": [u()], "chosen": GOOD, "rejected": BAD}),
    ("trl", {"prompt": USER, "chosen": [a(GOOD)], "rejected": [a(BAD)]}),
    ("trl", {"prompt": USER, **CHAT}),
    ("trl", {"prompt": [{"role": "user", "content": [{"type": None, "text": USER}]}], **PAIR}),
    ("trl", {"system": "", "prompt": [u()], **CHAT}),
    ("trl-implicit-messages", CHAT),
    ("trl-implicit-text", {"chosen": f"{USER} {GOOD}", "rejected": f"{USER} {BAD}"}),
]  # fmt: skip


@pytest.mark.parametrize("name, row", ROWS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ROWS)])
def test_row_of_a_family(tmp_path, name, row):
    rows, report = read(write(tmp_path, lines(row)))
    assert [(r.system, r.history, r.question, r.chosen, r.rejected) for r in rows] == [(None, (), USER, GOOD, BAD)]
    assert next(iter(report.files.values()))["format"] == name
    assert rows[0].prompt is None


def test_implicit_prompt_ends_with_a_word(tmp_path):
    rows, _ = read(write(tmp_path, lines({"chosen": "It is a cat.", "rejected": "It is a car."})))
    assert (rows[0].question, rows[0].chosen, rows[0].rejected) == ("It is a", "cat.", "car.")


def test_every_recognised_format_has_an_example_here():
    named_only = {name for name, format in FORMATS.items() if format.only_when_named or not format.detected}
    assert set(FORMATS) - named_only == {name for name, _ in ROWS}


HISTORY = [s("Be kind."), u("Hello"), a("Hi."), u()]
MULTI = [
    {"messages": [*HISTORY, a(GOOD)], "rejected_response": BAD},
    {"chosen_messages": [*HISTORY, a(GOOD)], "rejected_messages": [*HISTORY, a(BAD)]},
    {"conversations": [{"from": "system", "value": "Be kind."}, h("Hello"), g("Hi."), h(USER)], "chosen": g(GOOD),
     "rejected": g(BAD)},
    {"conversations": [h("Hello"), g("Hi."), h(USER)], "chosen": GOOD, "rejected": BAD, "system": "Be kind."},
    {"input": {"messages": HISTORY}, "preferred_output": [a(GOOD)], "non_preferred_output": [a(BAD)]},
    {"prompt": HISTORY, "chosen": [a(GOOD)], "rejected": [a(BAD)]},
    {"prompt": HISTORY, "chosen": [*HISTORY, a(GOOD)], "rejected": [*HISTORY, a(BAD)]},
    {"chosen": [*HISTORY, a(GOOD)], "rejected": [*HISTORY, a(BAD)]},
    {"chosen": [*HISTORY, a(GOOD)], "rejected": [*HISTORY[1:], a(BAD)]},
    {"instruction": "What", "input": "helps?", "system": "Be kind.", "history": [["Hello", "Hi."]], **PAIR},
    {"query": USER, "response": GOOD, "rejected_response": BAD, "system": "Be kind.", "history": [["Hello", "Hi."]]},
    {"instruction": USER, "output": [GOOD, BAD], "system": "Be kind.", "history": [["Hello", "Hi."]]},
    {"prompt": USER, "system": "Be kind.", "history": [["Hello", "Hi."]], **PAIR},
    {"messages": HISTORY, "chosen": GOOD, "rejected": a([{"type": "text", "text": BAD}])},
]  # fmt: skip


@pytest.mark.parametrize("row", MULTI, ids=range(len(MULTI)))
def test_system_and_history_are_carried(tmp_path, row):
    rows, _ = read(write(tmp_path, lines(row)))
    assert [(r.system, r.history, r.question.replace("\n", " "), r.chosen, r.rejected) for r in rows] == [
        ("Be kind.", (("Hello", "Hi."),), USER, GOOD, BAD)
    ]


def test_hh_with_history_and_a_human_inside_a_reply(tmp_path):
    context = HH.format("Hello", "Hi.  Human: said the book.") + "\n\nHuman: What helps?\n\nAssistant:"
    rows, report = read(write(tmp_path, lines({"chosen": context + " " + GOOD, "rejected": context + " " + BAD})))
    assert rows[0].history == (("Hello", "Hi.  Human: said the book."),)
    assert (rows[0].question, rows[0].chosen, rows[0].rejected) == (USER, GOOD, BAD)
    assert any("not meant for supervised training" in warning for warning in report.warnings)


ok = HH.format(USER, GOOD)
DROPPED = [
    ("identical_answers", {"chosen": ok, "rejected": ok + " "}),
    ("irregular_turns", {"chosen": ok + "\n\nHuman: And?", "rejected": HH.format(USER, BAD)}),
    ("irregular_turns", {"chosen": ok, "rejected": HH.format(USER, BAD) + "\n\nHuman: And?\n\nAssistant: So."}),
    ("irregular_turns", {"chosen": ok, "rejected": HH.format("Something else?", BAD)}),
    ("irregular_turns", {"chosen": ok + "\n\nAssistant: More.", "rejected": HH.format(USER, BAD)}),
    ("same_role_turns", {"chosen": HH.format("Hello", "x\n\nAssistant: y") + ok,
                         "rejected": HH.format("Hello", "x\n\nAssistant: y") + HH.format(USER, BAD)}),
    ("irregular_turns", {"chosen": HH.format(USER, "x\n\nAssistant: y"),
                         "rejected": HH.format(USER, "x\n\nAssistant: z")}),
    ("irregular_turns", {"prompt": HH.format(USER, ""), "response": GOOD, "chosen": GOOD + HH.format("And?", "So."),
                         "rejected": BAD}),
    ("empty_answer", {"chosen": HH.format(USER, ""), "rejected": HH.format(USER, BAD)}),
    ("different_prompts", {"chosen": [u(), a(GOOD)], "rejected": [u("Else?"), a(BAD)]}),
    ("different_prompts", {"prompt": [u()], "chosen": [u("Else?"), a(GOOD)], "rejected": [a(BAD)]}),
    ("irregular_turns", {"chosen": [u(), a(GOOD), u()], "rejected": [u(), a(BAD), u()]}),
    ("irregular_turns", {"prompt": [u(), a("Hi.")], "chosen": [a(GOOD)], "rejected": [a(BAD)]}),
    ("irregular_turns", {"prompt": [a("Hi."), u()], "chosen": [a(GOOD)], "rejected": [a(BAD)]}),
    ("irregular_turns", {"prompt": [u(), s("Late."), u()], "chosen": [a(GOOD)], "rejected": [a(BAD)]}),
    ("same_role_turns", {"prompt": [u(), u()], "chosen": [a(GOOD)], "rejected": [a(BAD)]}),
    ("same_role_turns", {"prompt": [u()], "chosen": [a(GOOD), a("More.")], "rejected": [a(BAD)]}),
    ("empty_prompt", {"prompt": [s("Be kind.")], "chosen": [a(GOOD)], "rejected": [a(BAD)]}),
    ("unknown_role", {"prompt": [{"role": "narrator", "content": "x"}], "chosen": [a(GOOD)], "rejected": [a(BAD)]}),
    ("tool_calls", {"conversations": [h(USER), {"from": "function_call", "value": "{}"}], **PAIR}),
    ("tool_calls", {"conversations": [h(USER)], "tools": '[{"name": "f"}]', "chosen": GOOD, "rejected": BAD}),
    ("tool_calls", {"prompt": [u()], "chosen": [{"role": "assistant", "content": None, "tool_calls": [{}]}],
                    "rejected": [a(BAD)]}),
    ("tool_calls", {"input": {"messages": [u()], "tools": [{}]}, "preferred_output": [a(GOOD)],
                    "non_preferred_output": [a(BAD)]}),
    ("images", {**TRIPLE, "images": ["a.png"]}),
    ("images", {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "chosen": [a(GOOD)],
                "rejected": [a(BAD)]}),
    ("tie", CHAT | {"prompt": USER, "prompt_id": "0", "score_chosen": 8.5, "score_rejected": 8.5}),
    ("negative_gap", CHAT | {"prompt": USER, "chosen-rating": 2.0, "rejected-rating": 2.5}),
    ("tie", CHAT | {"rating_chosen": 4, "rating_rejected": 4}),
    ("tie", {"instruction": USER, "completions": [completion(GOOD), completion(BAD)]}),
    ("too_few_candidates", {"instruction": USER, "completions": [completion(GOOD), completion(BAD, honesty="N/A")]}),
    ("too_few_candidates", {"instruction": USER, "completions": []}),
    ("tie", {"prompt": USER, **PAIR, "chosen_score": 4, "rejected_score": 4.0}),
    ("negative_gap", {"instruction": USER, **PAIR, "rating_chosen": 3, "rating_rejected": 4}),
    ("tie", {"question": USER, **PAIR, "chosen_rating": "5", "rejected_rating": "5"}),
    ("tie", {"input": USER, **PAIR, "status": "tie"}),
    ("wrong_label", {"input": USER, **PAIR, "status": "?"}),
    ("tie", {"prompt": "p", "response_a": "a", "response_b": "b", "winner_model_a": 0, "winner_model_b": 0,
             "winner_tie": 1}),
    ("wrong_label", {"prompt": "p", "response_a": "a", "response_b": "b", "winner_model_a": 1, "winner_model_b": 1}),
    ("different_prompts", {"prompt": '["p", "q"]', "response_a": '["1", "a"]', "response_b": '["2", "b"]',
                           "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}),
    ("tie", {"conversation_a": [u(), a(GOOD)], "conversation_b": [u(), a(BAD)], "winner": "tie (bothbad)"}),
    ("tie", {"prompt": USER, "response_a": GOOD, "response_b": BAD, "winner": "both_bad"}),
    ("wrong_label", {"prompt": USER, "response_a": GOOD, "response_b": BAD, "winner": "x"}),
    ("wrong_label", SHP | {"labels": 2}),
    ("wrong_label", PKU | {"better_response_id": -1}),
    ("identical_answers", {"instruction": USER, "output": [GOOD, GOOD]}),
    ("no_common_prompt", {"chosen": "One thing.", "rejected": "Another."}),
]  # fmt: skip


@pytest.mark.parametrize("reason, row", DROPPED, ids=[f"{reason}-{i}" for i, (reason, _) in enumerate(DROPPED)])
def test_row_that_cannot_be_used_is_dropped_by_name(tmp_path, reason, row):
    rows, report = read(write(tmp_path, lines(row)))
    assert rows == [] and report.dropped == {reason: 1}


REFUSED = [
    ("KTO", {"prompt": USER, "completion": GOOD, "label": True}),
    ("KTO", {"messages": [u(), a(GOOD)], "label": False}),
    ("safety label", {"prompt": USER, "response": GOOD, "category": {}, "is_safe": 0}),
    ("red-team", {"transcript": ok, "min_harmlessness_score_transcript": 0.1, "rating": 1.0}),
    ("SFT", {"messages": [u(), a(GOOD)]}),
    ("SFT", {"conversations": [h(USER), g(GOOD)]}),
    ("SFT", {"instruction": USER, "input": "", "output": GOOD}),
    ("SFT", {"prompt": USER, "response": GOOD}),
    ("plain text", {"text": "Once upon a time."}),
    ("without labels", {"query": USER, "history": [], "response_0": GOOD, "response_1": BAD}),
    ("without labels", {"0": {"query": USER, "response_0": GOOD}, "1": {"query": USER, "response_0": GOOD}}),
    ("inverse", {"query": USER, "history": "[]", "rank1": GOOD, "rank2": BAD, "rank3": "", "rank4": ""}),
    ("what its label means", {"prompt": USER, "response_1": GOOD, "response_2": BAD, "label": 1}),
    ("inside it", {"data": [TRIPLE, TRIPLE]}),
    ("no known format", {"alpha": 1, "beta": 2}),
    ("inside it", {"a": TRIPLE, "b": TRIPLE}),
    (r"triple \(response_chosen and response_rejected\), orca \(chosen and rejected\)", {**TRIPLE, **PAIR}),
    (r"orca \(question\), trl \(prompt\): say which", {"question": USER, "prompt": "Answer in French.", **PAIR}),
    (r"alpaca \(instruction\), orca \(question\)", {"instruction": "Answer.", "question": USER, **PAIR}),
]


@pytest.mark.parametrize("message, row", REFUSED, ids=[message for message, _ in REFUSED])
def test_what_is_no_preference_data_is_refused_by_what_it_is(tmp_path, message, row):
    path = write(tmp_path, lines(row, row), "bad.jsonl")
    with pytest.raises(DataError, match=f"bad.jsonl.*{message}"):
        load_rows([path], DataReport())
    write(tmp_path, lines(TRIPLE), "good.jsonl")
    rows, report = read(tmp_path)
    assert len(rows) == 1 and report.rows_read == 2 and "bad.jsonl was refused" in report.warnings[0]
    with pytest.raises(DataError, match="bad.jsonl"):
        list(iter_rows([tmp_path], DataReport(), data_check="strict"))


@pytest.mark.parametrize(
    "row, missing",
    [
        ({"question": USER, "response_chosen": GOOD}, "response_rejected"),
        ({"prompt": USER, "chosen": GOOD}, "rejected"),
        ({"conversations": [h(USER)], "chosen": g(GOOD)}, "rejected"),
        ({"prompt": USER, "pos_resp": GOOD}, "neg_resp"),
    ],
)
def test_near_miss_names_the_missing_key(tmp_path, row, missing):
    with pytest.raises(DataError, match=f"missing_key.*'{missing}'"):
        load_rows([write(tmp_path, lines(row))], DataReport())


def test_two_columns_with_the_same_question_are_not_ambiguous(tmp_path):
    rows, report = read(write(tmp_path, lines({"question": USER, "prompt": f" {USER}", "instruction": "", **PAIR})))
    assert len(rows) == 1 and rows[0].question == USER and not report.dropped
    rows, report = read(write(tmp_path, lines({"question": "", "chosen": "It is a cat.", "rejected": "It is a car."})))
    assert not rows and report.dropped == {"empty_prompt": 1}


def test_whole_dialogues_need_no_question_beside_them(tmp_path):
    """orpo-dpo-mix: some rows have a prompt, some a question, all hold it in chosen and rejected."""
    rows = [CHAT | {"prompt": USER, "question": None}, CHAT | {"prompt": None, "question": USER}]
    for mixed in ([*rows, rows[0]], [*rows, rows[1]]):
        kept, report = read(write(tmp_path, lines(*mixed)))
        assert [row.question for row in kept] == [USER] * 3 and not report.dropped
        assert "mixes formats" in report.warnings[0] and "1 of the first 3 rows look like" in report.warnings[0]


def test_choices_of_one_file_among_others(tmp_path):
    write(tmp_path, lines(PKU | {"better_response_id": 1, "safer_response_id": 0}), "a.jsonl")
    write(tmp_path, lines(TRIPLE), "b.jsonl")
    write(tmp_path, lines(TRIPLE), "c.jsonl")
    _, report = read(tmp_path, options=Options(axis="better", min_score_gap=1))
    assert [warning for warning in report.warnings if "no effect" in warning] == [
        f"min_score_gap (--min-score-gap) has no effect on {tmp_path / 'a.jsonl'} (pku-saferlhf) and 2 more"
    ]


def test_incomplete_candidates_are_left_out_and_counted(tmp_path):
    damaged = [completion(GOOD) | {"response": None}, completion(GOOD) | {"annotations": None}, "text"]
    for other in damaged:
        row = {"instruction": USER, "completions": [other, completion(GOOD, honesty=4), completion(BAD, honesty=1)]}
        rows, report = read(write(tmp_path, lines(row)))
        assert (rows[0].chosen, rows[0].rejected) == (GOOD, BAD) and report.notes == {"incomplete_candidates": 1}


def test_rankings_that_rank_nothing(tmp_path):
    good = {"instruction": USER, "output": [GOOD, BAD]}
    rows, report = read(write(tmp_path, lines(good, good | {"output": [GOOD]}, good | {"output": []},
                                              good | {"output": GOOD}, good | {"output": [GOOD, None]})))  # fmt: skip
    assert len(rows) == 1 and report.dropped == {"too_few_candidates": 2, "wrong_type": 2}


@pytest.mark.parametrize("name, row", ROWS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ROWS)])
def test_choices_count_or_are_called_without_effect(tmp_path, name, row):
    """A gap that no pair reaches drops every scored pair; where nothing is dropped the report says why."""
    path = write(tmp_path, lines(row))
    for choice, value in {"min_score_gap": 1e9, "pairs": "all", "axis": "safer"}.items():
        rows, report = read(path, options=Options(**{choice: value}))
        warned = any(f"--{choice.replace('_', '-')}) has no effect" in warning for warning in report.warnings)
        assert warned == (choice not in FORMATS[name].uses)
        if choice == "min_score_gap" and not rows:
            assert not warned and set(report.dropped) <= {"score_gap", "no_score"}
        elif choice == "min_score_gap":
            assert warned or report.notes["kept_without_scores"] == len(rows)


def test_unknown_format_lists_keys_and_the_way_out(tmp_path):
    row = {"QUERY": USER, "GOOD": GOOD, "BAD": BAD}
    path = write(tmp_path, lines(row))
    with pytest.raises(DataError, match="keys are QUERY, GOOD, BAD.*--columns"):
        load_rows([path], DataReport())
    rows = load_rows([path], DataReport(), columns="question=QUERY,chosen=GOOD,rejected=BAD")
    assert (rows[0].question, rows[0].chosen, rows[0].rejected) == (USER, GOOD, BAD)


def test_mixed_file_reads_the_majority_and_names_the_others(tmp_path):
    rows, report = read(write(tmp_path, lines(TRIPLE, {"prompt": USER, **PAIR}, TRIPLE, {"text": "x"})))
    assert len(rows) == 2 and report.dropped == {"missing_key": 2}


def test_formats_may_differ_by_file(tmp_path):
    for i, (_, row) in enumerate(ROWS):
        write(tmp_path, lines(row), f"{i:02}.jsonl")
    rows, report = read(tmp_path)
    assert len(rows) == len(ROWS) and not report.dropped


def test_pku_asks_for_the_axis_with_the_disagreement(tmp_path):
    row = PKU | {"is_response_0_safe": False, "is_response_1_safe": False}
    labels = [(1, 0), (1, 1), (0, 1)]
    rows = [row | {"better_response_id": better, "safer_response_id": safer} for better, safer in labels]
    path = write(tmp_path, lines(*rows))
    with pytest.raises(DataError, match="disagree in 2 of 3 rows.*--axis better or --axis safer"):
        load_rows([path], DataReport())
    report = DataReport()
    assert [r.chosen for r in load_rows([path], report, axis="better")] == [GOOD, GOOD, BAD]
    assert [r.chosen for r in load_rows([path], DataReport(), axis="safer")] == [BAD, GOOD, GOOD]
    assert report.notes["both_unsafe"] == 3


@pytest.mark.parametrize("gap, kept", [(None, 1), (0, 2), (1, 1), (3, 0)])
def test_min_score_gap(tmp_path, gap, kept):
    rows = [CHAT | {"prompt_id": "0", "score_chosen": 8, "score_rejected": low} for low in (6, 8)]
    rows, _ = read(write(tmp_path, lines(*rows)), options=Options(min_score_gap=gap))
    assert len(rows) == kept


def test_min_score_gap_of_shp_is_the_ratio_and_missing_scores_are_named(tmp_path):
    rows, report = read(write(tmp_path, lines(SHP, SHP | {"score_ratio": 1.1})), options=Options(min_score_gap=2))
    assert len(rows) == 1 and report.dropped == {"score_gap": 1}
    row = CHAT | {"task_category": "x", "chosen_instruct_reward": None, "rejected_instruct_reward": 1.0}
    assert read(write(tmp_path, lines(row)), options=Options(min_score_gap=1))[1].dropped == {"no_score": 1}


def test_pairs_of_a_ranked_list(tmp_path):
    path = write(tmp_path, lines({"instruction": USER, "output": ["1", "2", "3", "2"]}))
    rows, report = read(path, options=Options(pairs="all"))
    assert [(r.chosen, r.rejected) for r in rows] == [("1", "2"), ("1", "3"), ("1", "2"), ("2", "3"), ("3", "2")]
    assert report.rows_read == 6 and report.dropped == {"identical_answers": 1}
    picks = {read(path, options=Options(pairs="best-random", seed=seed))[0][0].rejected for seed in range(20)}
    assert picks == {"2", "3"}
    assert len({read(path, options=Options(pairs="best-random", seed=3))[0][0].rejected for _ in range(3)}) == 1


def test_named_only_formats(tmp_path):
    path = write(tmp_path, lines({"prompt": USER, "response_1": BAD, "response_2": GOOD, "label": 0}))
    assert load_rows([path], DataReport(), format="pairwise-label")[0].chosen == GOOD
    tsv = f"id\tquery\thistory\trank1\trank2\trank3\trank4\n0\t{USER}\t[['Hello', 'Hi.']]\t{GOOD}\tMiddling.\t{BAD}\t\n"
    rows = load_rows([write(tmp_path, tsv.encode(), "x.tsv")], DataReport(), format="zhongjing-ranks")
    assert (rows[0].history, rows[0].chosen, rows[0].rejected) == ((("Hello", "Hi."),), GOOD, BAD)


SYSTEMS = [
    ("<|im_start|>system\nSo.<|im_end|>\n<|im_start|>user\nWhat helps?<|im_end|>\n<|im_start|>assistant\n", "So."),
    ("<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhat helps? [/INST]", "Be kind."),
    ("System: Be kind.\n\nUser: What helps?", "Be kind."),
    ("You are a helpful assistant.\n\nWhat helps?", "You are a helpful assistant."),
    ("\n\nHuman: What helps?\n\nAssistant:", None),
    ("What helps?", None),
]


@pytest.mark.parametrize("prompt, system", SYSTEMS)
def test_split_system(tmp_path, prompt, system):
    path = write(tmp_path, lines({"prompt": prompt, **PAIR}))
    rows, _ = read(path, options=Options(split_system=True), prompt_as_question=True)
    assert (rows[0].system, rows[0].question) == (system, USER)
    rows, report = read(path, prompt_as_question=True)
    assert rows[0].question == prompt.strip() and rows[0].system is None
    assert bool(report.warnings) == any(mark in prompt for mark in ("<|im_start|>", "[INST]", "\n\nHuman:"))


# ------------------------------------------------------------------------------------------------ containers


def as_csv(rows) -> bytes:
    import io

    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()})
    return text.getvalue().encode()


def as_parquet(rows) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


CONTAINERS = {
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "array-named.jsonl": lambda rows: json.dumps(rows).encode(),
    "lines-named.json": lambda rows: lines(*rows),
    "rows.jsonl.gz": lambda rows: gzip.compress(lines(*rows)),
    "rows.csv": as_csv,
    "rows.csv.gz": lambda rows: gzip.compress(as_csv(rows)),
    "rows.parquet": as_parquet,
}


# a list of plain strings in a CSV cell is text, so ranked lists have no CSV form
BOXED = [(name, row, box) for name, row in ROWS for box in CONTAINERS if name != "ranking" or "csv" not in box]


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
    from preference import json_records

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


def test_message_lists_as_text_are_warned_about(tmp_path):
    row = {"prompt": USER, "chosen": json.dumps([a(GOOD)]), "rejected": json.dumps([a(BAD)])}
    rows, report = read(write(tmp_path, lines(row, row | {"rejected": BAD})))
    assert len(rows) == 2 and rows[0].chosen == row["chosen"] and report.notes == {"message_lists_as_text": 1}
    assert "written as text" in report.warnings[0]


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
    with pytest.raises(DataError, match="ambiguous_split.*train.*test"):
        load_rows([tmp_path / "two"], DataReport())
    assert len(read(tmp_path / "two" / "train")[0]) == 3


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
        names = ("train", "test") if name == "owner/name" else ("train_prefs", "test_prefs")
        return rows if split else datasets.IterableDatasetDict(dict.fromkeys(names, rows))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("hub:owner/name")[0][0].file == "hub:owner/name"
    assert len(read("hub:owner/name:config:test")[0]) == len(read("hub:owner/name::test")[0]) == 1
    assert asked == [("owner/name", None, None, True), ("owner/name", "config", "test", True),
                     ("owner/name", None, "test", True)]  # fmt: skip
    with pytest.raises(DataError, match="hub:h4/uf::train_prefs, hub:h4/uf::test_prefs"):
        load_rows(["hub:h4/uf"], DataReport())
    with pytest.raises(DataError, match="hub:none/there: hub_error.*doesn't exist"):
        load_rows(["hub:none/there"], DataReport())


# -------------------------------------------------------------------------------------------- the real samples

# file: format, rows read, rows kept, dropped: as measured in ../shared/datasets/SCHEMAS.md
SAMPLES = {
    "finemed/finemed_dpo_row0_from_notebook.jsonl": ("trl", 1, 1, {}),
    "hh_rlhf/harmless-base_test.jsonl.gz": (
        "hh", 2312, 2299, {"irregular_turns": 5, "empty_answer": 4, "same_role_turns": 4},
    ),
    "llamafactory/dpo_zh_demo.json": ("sharegpt", 300, 300, {}),
    "llamafactory/v1_dpo_demo.jsonl": ("llamafactory-v1", 10, 10, {}),
    "medicalgpt/dpo_zh_500.conversations.jsonl": ("sharegpt", 500, 500, {}),
    "medicalgpt/dpo_zh_500.triples.jsonl": ("triple", 500, 500, {}),
    "medicalgpt/medical_reward_test.json": ("triple", 100, 100, {}),
    "medicalgpt/toolcall_dpo_zh_demo.jsonl": ("sharegpt", 11, 0, {"tool_calls": 11}),
    "ms_swift/docs_dpo_orpo_examples.jsonl": ("ms-swift", 2, 2, {}),
    "not_preference/beavertails_demo.json": ("", 1, 0, {"not_preference": 1}),
    "not_preference/kto_en_demo.json": ("", 1, 0, {"not_preference": 1}),
    "not_preference/red-team-attempts.jsonl": ("", 1, 0, {"not_preference": 1}),
    "orca_dpo_pairs/orca_dpo_pairs_demo.csv": ("orca", 100, 100, {}),
    "pku_saferlhf/align-anything_preference_train.json": ("", 1, 0, {"choice_needed": 1}),
    "transcribed_rows/argilla_uf_cleaned_row0_TRUNCATED.jsonl": ("ultrafeedback-argilla", 1, 1, {}),
    "transcribed_rows/cvalues_comparison_row_from_card.jsonl": ("cvalues", 1, 1, {}),
    "transcribed_rows/ms_swift_v2_doc_rows.jsonl": ("ms-swift-v2", 1, 0, {"images": 1}),
    "transcribed_rows/shibing624_medical_reward_train_row_TRUNCATED.jsonl": ("triple", 1, 1, {}),
    "transcribed_rows/shp_row_from_card.jsonl": ("shp", 2, 2, {}),
    "transcribed_rows/ultrafeedback_binarized_train_prefs_row0_TRUNCATED.jsonl": (
        "ultrafeedback-binarized", 1, 0, {"tie": 1},
    ),
    "transcribed_rows/ultrafeedback_raw_row53227_TRUNCATED_1of4_completions.jsonl": (
        "ultrafeedback", 1, 0, {"too_few_candidates": 1},
    ),
    "trl_formats/conversational_implicit_prompt_preference.jsonl": ("trl-implicit-messages", 19, 19, {}),
    "trl_formats/conversational_preference.jsonl": ("trl", 19, 19, {}),
    "trl_formats/conversational_unpaired_preference.jsonl": ("", 1, 0, {"not_preference": 1}),
    "trl_formats/standard_implicit_prompt_preference.jsonl": ("trl-implicit-text", 19, 19, {}),
    "trl_formats/standard_preference.jsonl": ("trl", 19, 19, {}),
    "trl_formats/standard_unpaired_preference.jsonl": ("", 1, 0, {"not_preference": 1}),
    "zhongjing/rlhf_label_tool_input_file.json": ("", 1, 0, {"not_preference": 1}),
    "zhongjing/rlhf_label_tool_output_result.tsv": ("", 1, 0, {"ambiguous_format": 1}),
    "zhongjing/zhongjing_total_dataset.tsv": ("", 1, 0, {"ambiguous_format": 1}),
}  # fmt: skip


@real_samples
@pytest.mark.parametrize("file", SAMPLES)
def test_real_sample(file):
    name, rows_read, rows_kept, dropped = SAMPLES[file]
    rows, report = read(SHARED / file)
    assert (report.rows_read, len(rows), dict(report.dropped)) == (rows_read, rows_kept, dropped)
    assert next(iter(report.files.values()))["format"] == name


@real_samples
def test_every_real_sample_is_listed():
    found = {str(path.relative_to(SHARED)) for path in SHARED.rglob("*") if path.is_file() and path.suffix != ".md"}
    assert found == set(SAMPLES)


@real_samples
def test_real_facts():
    triples, _ = read(SHARED / "medicalgpt/dpo_zh_500.triples.jsonl")
    conversations, _ = read(SHARED / "medicalgpt/dpo_zh_500.conversations.jsonl")
    assert triples == [replace(row, file=triples[0].file) for row in conversations]
    assert sum(row.system is not None for row in triples) == 84
    assert triples[0].question == '20个关于新鲜果汁菜单的口号，适用于一家名为"Dishes"的餐厅'
    sharegpt, _ = read(SHARED / "llamafactory/dpo_zh_demo.json")
    assert sum(row.system is not None for row in sharegpt) == 64 and not any(row.history for row in sharegpt)
    orca, report = read(SHARED / "orca_dpo_pairs/orca_dpo_pairs_demo.csv")
    assert sum(row.system is None for row in orca) == 8 and report.notes["leading_space_in_rejected_only"] == 100
    hh, _ = read(SHARED / "hh_rlhf/harmless-base_test.jsonl.gz")
    assert 0.69 < sum(bool(row.history) for row in hh) / len(hh) < 0.73
    with pytest.raises(DataError, match="disagree in 19 of 32 rows"):
        load_rows([SHARED / "pku_saferlhf"], DataReport())
    _, report = read(SHARED / "pku_saferlhf", options=Options(axis="safer"))
    assert report.rows_kept == 32 and report.notes["both_unsafe"] == 16
    shp, _ = read(SHARED / "transcribed_rows/shp_row_from_card.jsonl")
    assert shp[0].chosen.startswith("Pectinex") and shp[1].chosen.startswith("It's ironic")
    v1, _ = read(SHARED / "llamafactory/v1_dpo_demo.jsonl")
    assert v1[1].chosen == "D: considerate" and v1[1].system.startswith("You are an AI assistant")


@real_samples
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("file", [file for file, entry in SAMPLES.items() if entry[2] and "hh_rlhf" not in file])
def test_real_sample_out_of_every_container(tmp_path, file, container):
    plain = SHARED / file
    if plain.suffix == ".csv":
        with open(plain, encoding="utf-8", newline="") as stream:
            originals = list(csv.DictReader(stream))
    else:
        text = plain.read_text(encoding="utf-8")
        one_a_line = not text.startswith("[")
        originals = [json.loads(line) for line in text.split("\n") if line] if one_a_line else json.loads(text)
    expected, _ = read(plain)
    rows, _ = read(write(tmp_path, CONTAINERS[container](originals), container))
    assert [(r.system, r.history, r.question, r.prompt, r.chosen, r.rejected) for r in rows] == [
        (r.system, r.history, r.question, r.prompt, r.chosen, r.rejected) for r in expected
    ]
