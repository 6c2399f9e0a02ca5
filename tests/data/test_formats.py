"""Every family of datasets: what a row becomes, what is dropped by name, what is refused and how."""

from __future__ import annotations

import pytest
from format_rows import BAD, CHAT, GOOD, HH, MULTI, PAIR, PKU, ROWS, SHP, TRIPLE, USER, a, completion, g, h, s, u
from reading import lines, read, write

from preference.data.formats import FORMATS, Options
from preference.data.rows import DataError, DataReport, iter_rows, load_rows


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
    named_only = {name for name, f in FORMATS.items() if f.only_when_named or f.single or not f.detected}
    assert set(FORMATS) - named_only == {name for name, _ in ROWS} | {"summarize"}


def test_summaries_are_asked_for_as_in_the_paper(tmp_path):
    row = {"info": {"post": "A long post.", "title": "T", "subreddit": "r"}, "choice": 1,
           "summaries": [{"text": BAD, "policy": "a"}, {"text": GOOD, "policy": "b"}]}  # fmt: skip
    rows, _ = read(write(tmp_path, lines(row)))
    question = "SUBREDDIT: r\n\nTITLE: T\n\nPOST: A long post.\n\nTL;DR:"
    assert [(r.question, r.chosen, r.rejected) for r in rows] == [(question, GOOD, BAD)]


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
    ("tool_calls", {"conversations": [h(USER)], "tools": '[{"title": "f"}]', "chosen": GOOD, "rejected": BAD}),
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
    ("identical_answers", {"instruction": USER, "history": [], "output": [GOOD, GOOD]}),
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
    ("--labels 0=first,1=second", {"prompt": USER, "response_1": GOOD, "response_2": BAD, "label": 1}),
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
    good = {"instruction": USER, "history": [], "output": [GOOD, BAD]}
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
        if choice == "min_score_gap":
            assert warned == bool(rows) and report.notes["kept_without_scores"] == len(rows)
            assert set(report.dropped) <= {"score_gap", "no_score"}
        else:
            assert warned == (choice not in FORMATS[name].uses)


def test_unknown_format_lists_keys_and_the_way_out(tmp_path):
    row = {"Q": USER, "A1": GOOD, "A2": BAD}
    path = write(tmp_path, lines(row))
    with pytest.raises(DataError, match="keys are Q, A1, A2.*--columns"):
        load_rows([path], DataReport())
    rows = load_rows([path], DataReport(), columns="question=Q,chosen=A1,rejected=A2")
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
    path = write(tmp_path, lines({"instruction": USER, "history": [], "output": ["1", "2", "3", "2"]}))
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
    ("System: Be kind.\n\nUser: What helps?", "Be kind."),
    ("You are a helpful assistant.\n\nWhat helps?", "You are a helpful assistant."),
    ("What helps?", None),
]


@pytest.mark.parametrize("prompt, system", SYSTEMS)
def test_split_system(tmp_path, prompt, system):
    path = write(tmp_path, lines({"prompt": prompt, **PAIR}))
    rows, _ = read(path, options=Options(split_system=True))
    assert (rows[0].system, rows[0].question) == (system, USER)
    rows, _ = read(path)
    assert rows[0].question == prompt and rows[0].system is None
