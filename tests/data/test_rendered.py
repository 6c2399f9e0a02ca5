"""Texts that a chat template was applied to: taken apart, kept or refused; stop texts; what convert.py writes."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from format_rows import BAD, GOOD, PAIR, USER
from reading import lines, read, write

from preference.data.formats import Options
from preference.data.formats.notations import STOPS
from preference.data.formats.rendering import parse, without_stops
from preference.data.rows import DataError, DataReport, load_rows
from preference.templates.families import FAMILIES, ConversationError
from preference.tokens import convert as script

SYSTEM, HISTORY, QUESTION = "Be kind.", (("Hello", "Hi.\n\nAnd now?"), ("A: b", "c")), "What helps?\n\nSay it."


def prompts_of(conv):
    """(prompt, system, history) for every mixture that the family can write and that can be told from the text."""
    in_question = conv.system_place in ("first", "last") and conv.name != "llama2"
    for system in (None,) if in_question else (None, SYSTEM):
        for history in ((), HISTORY[:1], HISTORY):
            try:
                yield conv.get_prompt(QUESTION, history, system), system or conv.default_system or None, history
            except ConversationError:
                continue


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_own_prompts_become_turns(tmp_path, name):
    conv = FAMILIES[name]
    cases = list(prompts_of(conv))
    ends = conv.turn_end if "<|user|>" not in conv.stop_str else conv.stop_str
    pair = {"chosen": conv.seam + GOOD + ends, "rejected": conv.seam + BAD + ends}
    rows, report = read(
        write(tmp_path, lines(*({"prompt": prompt, **pair} for prompt, _, _ in cases))), data_check="strict"
    )
    default = None if name == "vicuna" else conv.default_system or None  # Vicuna's is a text of the template
    for row, (prompt, system, history) in zip(rows, cases, strict=True):
        expected = system if system == SYSTEM else default
        assert (row.system, row.history, row.question, row.prompt) == (expected, history, QUESTION, None), prompt
        assert (row.chosen, row.rejected) == (GOOD, BAD)
    assert sum(count for note, count in report.notes.items() if note.startswith("taken_apart")) == len(cases)


PLAIN = {  # text: system, history
    "Human: What helps?\nAssistant:": (None, ()),
    "\n\nHuman: What helps?\n\nAssistant:": (None, ()),
    "\n\nHuman: Hello\n\nAssistant: Hi.\nHuman: no\n\nHuman: What helps?\n\nAssistant: ": (
        None, (("Hello", "Hi.\nHuman: no"),),
    ),
    "Human: Hello\nAssistant: Hi.\nHuman: What helps?\nAssistant:": (None, (("Hello", "Hi."),)),
    "### System:\nBe kind.\n\n### User:\nWhat helps?\n\n### Assistant:\n": ("Be kind.", ()),
    "### Human: What helps?\n### Assistant:": (None, ()),
    "System: Be kind.\n\nHuman: What helps?\n\nAssistant:": ("Be kind.", ()),
    "**User:** What helps?\n\n**Assistant:**": (None, ()),
    "用户：What helps?\n助手：": (None, ()),
    "[Round 1]\n\n问：Hello\n\n答：Hi.\n\n[Round 2]\n\n问：What helps?\n\n答：": (None, (("Hello", "Hi."),)),
    "Patient: What helps?\nDoctor:": (None, ()),
    "Be kind. USER: Hello ASSISTANT: Hi.</s>USER: What helps? ASSISTANT:": ("Be kind.", (("Hello", "Hi."),)),
    "Below is an instruction that describes a task.\n\n### Instruction:\nWhat helps?\n\n### Response:\n": (None, ()),
    "### Instruction:\nWhat\n\n### Input:\nhelps?\n\n### Response:": (None, ()),
    "Be kind.\n\n### Instruction:\nWhat helps?\n\n### Response:": ("Be kind.", ()),
    "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nWhat helps?\n<extra_id_1>Assistant\n<extra_id_2>quality:4\n": (
        "Be kind.", (),
    ),
    "<|prompter|>What helps?<|endoftext|><|assistant|>": (None, ()),
    "GPT4 Correct User: What helps?<|end_of_turn|>GPT4 Correct Assistant:": (None, ()),
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: "
    "04 May 2025\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat helps?<|eot_id|>": (
        "Be kind.", (),
    ),
    "<|im_start|>user\nWhat helps?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n": (None, ()),
    "[SYSTEM_PROMPT] Be kind.[/SYSTEM_PROMPT][INST] What helps?[/INST]": ("Be kind.", ()),
}  # fmt: skip


@pytest.mark.parametrize("column", ["prompt", "question", "instruction", "input"])
@pytest.mark.parametrize("text", PLAIN)
def test_renderings_of_others_in_every_text_column(tmp_path, text, column):
    system, history = PLAIN[text]
    rows, _ = read(write(tmp_path, lines({column: text, **PAIR})), data_check="strict")
    assert (rows[0].system, rows[0].history, rows[0].question.replace("\n", " ")) == (system, history, USER)


@pytest.mark.parametrize(
    "text",
    [
        "What does <|im_start|>user mean?",
        "Why does my model write <|im_end|>",
        "User: what is 2?",
        "Continue the talk:\nUser: hi\nAssistant:",
        "Sort these:\n1. a\n2. b",
        "Note: it hurts.\nAnswer:",
        "请翻译：你好：",
    ],
)
def test_questions_about_templates_stay_questions(text):
    assert parse(text) is None


@pytest.mark.parametrize("stop", STOPS)
def test_stop_texts_leave_both_answers_and_are_counted(tmp_path, stop):
    row = {"question": USER, "chosen": f"{GOOD}{stop}\n", "rejected": f"{BAD} {stop}\n<|endoftext|>"}
    rows, report = read(write(tmp_path, lines(row, row | {"rejected": BAD})))
    assert [(row.chosen, row.rejected) for row in rows] == [(GOOD, BAD)] * 2
    assert report.notes == {"stop_text_off_chosen": 2, "stop_text_off_rejected": 1}
    rows, _ = read(write(tmp_path, lines(row)), options=Options(rendered="keep"))
    assert rows[0].chosen == GOOD + stop
    rows, report = read(write(tmp_path, lines(row, {"question": USER, **PAIR})), options=Options(rendered="strict"))
    assert len(rows) == 1 and report.dropped == {"template_text": 1}


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_rows_that_disagree_are_asked_about_at_the_head_and_dropped_by_name_behind_it(tmp_path):
    plain, rendered = {"prompt": USER, **PAIR}, {"prompt": CHATML.format(USER), **PAIR}
    mixed = write(tmp_path, lines(plain, rendered))
    _, report = read(mixed)
    assert report.dropped == {"choice_needed": 1} and "--rendered split" in report.warnings[0]
    assert [row.question for row in read(mixed, options=Options(rendered="split"))[0]] == [USER, USER]
    kept, _ = read(mixed, options=Options(rendered="keep"))
    assert [row.prompt for row in kept] == [plain["prompt"], rendered["prompt"]]
    for most, other in ((plain, rendered), (rendered, plain)):
        rows, report = read(write(tmp_path, lines(*[most] * 20, other, *[most] * 60, other)))
        assert len(rows) == 80 and report.dropped == {"mixed_rendering": 2}
    with pytest.raises(DataError, match="mixed_rendering"):
        load_rows([write(tmp_path, lines(*[plain] * 20, rendered))], DataReport(), data_check="strict")


def test_tool_turns_and_unknown_roles_are_dropped_by_name(tmp_path):
    tool = "<|im_start|>assistant\ncall<|im_end|>\n<|im_start|>tool\nRESULT<|im_end|>\n<|im_start|>assistant\n"
    rows, report = read(write(tmp_path, lines({"prompt": CHATML.format(USER)[:-22] + tool, **PAIR})))
    assert rows == [] and report.dropped == {"tool_calls": 1}
    prompt = CHATML.format(USER).replace("user", "narrator") + CHATML.format(USER)
    _, report = read(write(tmp_path, lines({"prompt": prompt, **PAIR})))
    assert set(report.dropped) <= {"unknown_role", "irregular_turns"} and report.rows_kept == 0
    begun = {"prompt": CHATML.format(USER) + "Sure, ", **PAIR}
    _, report = read(write(tmp_path, lines(begun)))
    assert (
        report.dropped == {"irregular_turns": 1}
        and "--rendered keep" in report.examples["irregular_turns"][0]["detail"]
    )


@pytest.mark.parametrize(
    "begin, mid",
    [("User: ", "\nAssistant: "), ("Human: ", "\nAssistant: "), ("用户：", "\n\n助手："),
     ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"), ("[INST] ", " [/INST] ")],
)  # fmt: skip
def test_two_whole_dialogues(tmp_path, begin, mid):
    row = {"chosen": begin + USER + mid + GOOD, "rejected": begin + USER + mid + BAD}
    for columns in ({}, {"prompt": USER}, {"question": USER}):
        rows, report = read(write(tmp_path, lines(columns | row)))
        assert [(row.question, row.chosen, row.rejected) for row in rows] == [(USER, GOOD, BAD)], report.summary()
    _, report = read(write(tmp_path, lines(row | {"rejected": row["rejected"].replace(USER, "Other?")})))
    assert report.dropped == {"different_prompts": 1}


def test_answers_that_begin_with_the_label(tmp_path):
    row = {"prompt": f"Human: {USER}", "chosen": f"Assistant: {GOOD}", "rejected": f"Assistant: {BAD}"}
    rows, _ = read(write(tmp_path, lines(row)))
    assert (rows[0].question, rows[0].chosen, rows[0].rejected) == (USER, GOOD, BAD)


def test_a_system_column_beside_a_rendered_system_turn(tmp_path):
    prompt = "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML.format(USER)
    rows, _ = read(write(tmp_path, lines({"question": prompt, "system": "Be kind.", **PAIR})))
    assert rows[0].system == "Be kind."
    _, report = read(write(tmp_path, lines({"question": prompt, "system": "Be odd.", **PAIR})))
    assert report.dropped == {"two_systems": 1}


def test_training_reads_what_convert_writes_as_it_reads_the_original(tmp_path):
    rows = [{"prompt": USER}, {"prompt": "\n\nHuman: What helps?\n\nAssistant:"}, {"prompt": "<|mine|>Hi<|yours|>"}]
    for i, row in enumerate(rows):
        path, out = write(tmp_path, lines(row | PAIR), f"{i}.jsonl"), tmp_path / f"out{i}.jsonl"
        assert script.main([str(path), "--output", str(out)]) == 0
        original, again = read(path)[0], read(out)[0]
        assert [replace(row, file=str(path)) for row in again] == original and len(again) == 1


def test_hostile_texts_take_linear_time():
    texts = ["</s>", "\n", "Human: ", "<|im_start|>user\n", "USER: ", "<s>", "Human: a\n \n", "x \n", "[Round 1]\n"]
    begin = time.process_time()
    for text in texts:
        for long in (text * (200_000 // len(text)), "Human: " + text * (200_000 // len(text)) + "ASSISTANT:"):
            parse(long)
            without_stops(long)
    assert time.process_time() - begin < 10  # quadratic time would take minutes
