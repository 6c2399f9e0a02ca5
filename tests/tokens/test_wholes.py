"""Answers of several turns and with tools: what of them is learned, from files to log-probabilities."""

from __future__ import annotations

import json

import pytest
import torch
from format_rows import BAD, GOOD, USER, a, g, h, s, u
from reading import lines, read, write
from training import logged, make_trainer

from preference.data.report import DataReport
from preference.engine.forward import pair_logps
from preference.engine.packing import PackingError, pack_pairs
from preference.engine.probe import prepare_model
from preference.losses import Objective
from preference.report.evaluation import Evaluation
from preference.templates.families import get_conv_template
from preference.templates.resolve import auto_template
from preference.tokens import convert as script
from preference.tokens.datasets import build_dataset
from preference.tokens.showing import describe_pair
from preference.train.reference import data_fingerprint
from preference.train.trl_engine import TrlError
from tiny import tiny_model, tiny_tokenizer

TOOLS = [{"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}  # fmt: skip
RESULT = {"role": "tool", "content": "12 degrees"}
# ChatML with tools, in the test's own words
TEMPLATE = """{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for c in m.tool_calls or [] %}CALL {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LIMITS = {"max_source_length": 600, "max_target_length": 300}
SEVERAL = {"chosen": [u(), a(GOOD), u("More?"), a("Tea too.")], "rejected": [u(), a(BAD)]}
CALLS = {"prompt": [s("Be kind."), u()], "chosen": [CALL, RESULT, a(GOOD)], "rejected": [a(BAD)], "tools": TOOLS}


def own():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return auto_template(tokenizer), tokenizer


def prepared(tmp_path, *rows, conv=None, tokenizer=None, report=None):
    kept, _ = read(write(tmp_path, lines(*rows)))
    if conv is None:
        conv, tokenizer = own()
    return build_dataset(kept, conv, tokenizer, report=report or DataReport(), **LIMITS)


def learned(row, side):
    """The texts of an answer that are learned, and the whole of it."""
    tokenizer, ids, found, start = tiny_tokenizer(), row[f"{side}_ids"], [], 0
    for place, run in enumerate(row.get(f"{side}_runs") or [len(ids)]):
        if place % 2 == 0:
            found.append(tokenizer.decode(ids[start : start + run]))
        start += run
    return found, tokenizer.decode(ids)


def rendered(messages, tools=None, prompt=False):
    """By transformers alone."""
    _, tokenizer = own()
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)


def test_the_assistants_turns_are_learned_and_no_others(tmp_path):
    (row,) = prepared(tmp_path, CALLS)
    tools = [{"type": "function", "function": TOOLS[0]}]
    prompt, whole = rendered(CALLS["prompt"], tools, True), rendered([*CALLS["prompt"], *CALLS["chosen"]], tools)
    texts, answer = learned(row, "chosen")
    assert row["prompt"] == prompt and prompt + answer + "\n" == whole == row["prompt"] + row["chosen"] + "\n"
    assert texts == ['CALL weather {"city": "Oslo"}<|im_end|>', f"{GOOD}<|im_end|>"]
    assert learned(row, "rejected") == ([f"{BAD}<|im_end|>"], f"{BAD}<|im_end|>")
    shown = describe_pair(row, tiny_tokenizer())
    assert '⟦CALL weather {"city": "Oslo"}<|im_end|>⟧…⟦' in shown and "12 degrees" not in shown


def test_pairs_that_part_early_with_a_template_by_name(tmp_path):
    conv, tokenizer = get_conv_template("qwen"), tiny_tokenizer()
    (row,) = prepared(tmp_path, SEVERAL, conv=conv, tokenizer=tokenizer)
    texts, answer = learned(row, "chosen")
    assert texts == [f"{GOOD}<|im_end|>", "Tea too.<|im_end|>"]
    assert row["prompt"] + answer == conv.get_prompt("More?", [(USER, GOOD)]) + conv.get_response("Tea too.")
    report = DataReport()
    with pytest.raises(ValueError, match="template qwen2? writes no tools"):
        prepared(tmp_path, CALLS, conv=conv, tokenizer=tokenizer, report=report)
    assert report.dropped == {"template_refused": 1}


TRIED = {
    "several": (SEVERAL, 1), "calls": (CALLS, 2),
    "text beside tools": ({"prompt": USER, "chosen": GOOD, "rejected": BAD, "tools": json.dumps(TOOLS)}, 1),
    "sharegpt": ({"conversations": [h(USER), {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
                                    {"from": "observation", "value": "12"}],
                  "tools": json.dumps(TOOLS), "chosen": g(GOOD), "rejected": g(BAD)}, 3),
    "azure": ({"input": {"messages": [u()], "tools": TOOLS}, "preferred_output": [CALL],
               "non_preferred_output": [a(BAD)]}, 1),
    "ms-swift": ({"messages": [u(), CALL, RESULT, a(GOOD)], "rejected_response": BAD, "tools": TOOLS}, 1),
    "ms-swift messages": ({"messages": [u(), a(GOOD), u("So?"), a("Yes.")], "rejected_messages": [u(), a(BAD)]}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", TRIED)
def test_every_shape_is_read_prepared_written_and_read_again(name, tmp_path, capsys):
    row, shared = TRIED[name]
    (found,), _ = read(write(tmp_path, lines(row)))
    assert found.dialogue.shared == shared and found.question == USER and BAD in found.rejected
    (first,) = prepared(tmp_path, row)
    texts = learned(first, "chosen")[0]
    assert texts[-1].removesuffix("<|im_end|>") in found.chosen or "CALL" in texts[-1]
    out = tmp_path / "out" / "o.jsonl"
    assert script.main([str(tmp_path / "rows.jsonl"), "--output", str(out)]) == 0
    (again,), _ = read(out)
    assert script.main([str(tmp_path / "out"), "--output", str(out)]) == 1  # known as a conversion's, and not read
    capsys.readouterr()
    assert again.dialogue == found.dialogue


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"chosen": [u(), a("x"), u("A?"), a(GOOD)], "rejected": [u(), a("x"), u("B?"), a(BAD)]}, "different_prompts"),
        ({"chosen": [u(), a(GOOD), u("A?"), a("x")], "rejected": [u(), a(GOOD)]}, "different_prompts"),
        ({"chosen": [u(), a(GOOD), u("A?")], "rejected": [u(), a(BAD)]}, "irregular_turns"),
        ({"prompt": USER, "chosen": GOOD, "rejected": BAD, "tools": "use the hammer"}, "tool_calls"),
        ({"prompt": USER, "chosen": GOOD, "rejected": BAD, "tools": TOOLS, "image": "a.png"}, "images"),
        ({"prompt": [u()], "chosen": [CALL | {"tool_calls": [{"id": "1"}]}], "rejected": [a(BAD)]}, "tool_calls"),
    ],
)
def test_what_is_no_pair_of_conversations_is_dropped_by_name(row, reason, tmp_path):
    assert read(write(tmp_path, lines(row)))[1].dropped == {reason: 1}


def test_control_text_in_a_tools_result_never_ends_a_turn(tmp_path):
    report, row = DataReport(), CALLS | {"chosen": [CALL, RESULT | {"content": "12<|im_end|>"}, a(GOOD)]}
    with pytest.raises(ValueError, match="no pair is left of 1"):
        prepared(tmp_path, row, report=report)
    assert report.dropped == {"template_refused": 1}


@pytest.mark.parametrize("share_prompt", [True, False])
def test_log_probabilities_are_those_of_the_learned_tokens(share_prompt):
    """Against a plain forward of each conversation, token by token."""
    pair = {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [11, 12, 13, 14, 15, 16, 17], "rejected_ids": [21, 22, 23],
            "chosen_runs": [2, 3, 2], "rejected_runs": None}  # fmt: skip
    model = tiny_model()
    prepare_model(model, share_prompt=share_prompt)
    with torch.no_grad():
        found = pair_logps(model, pack_pairs([pair, pair | {"chosen_runs": None}], share_prompt=share_prompt))
        ids = torch.tensor([pair["prompt_ids"] + pair["chosen_ids"]])
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
    each = [logps[3 + i, token].item() for i, token in enumerate(pair["chosen_ids"])]
    assert found.chosen_B.tolist() == pytest.approx([sum(each[:2] + each[5:]), sum(each)], abs=1e-4)
    assert found.chosen_len_B.tolist() == [4, 7] and found.rejected_len_B.tolist() == [3, 3]
    with pytest.raises(PackingError, match="do not fit"):
        pack_pairs([pair | {"chosen_runs": [2, 3]}])


def test_engines_agree_and_a_step_does_not_depend_on_how_it_is_cut(tmp_path):
    plain = {"chosen": [u("Why?"), a("So.")], "rejected": [u("Why?"), a("Well.")]}
    last = {"prompt": [u("And?")], "chosen": [a("Yes."), u("Go on."), a("It is.")], "rejected": [a("No.")]}
    rows = prepared(tmp_path, CALLS, SEVERAL, plain, last)
    assert rows[2]["chosen_runs"] is None and rows[0]["rejected_runs"] is None

    def train(engine, loss, batch):
        trainer = make_trainer(engine, tmp_path, rows, loss=loss, eval_pairs=rows, per_device_train_batch_size=batch,
                               gradient_accumulation_steps=4 // batch, max_steps=2, learning_rate=1e-3)  # fmt: skip
        trainer.train()
        return [value for step in logged(trainer, "loss", "grad_norm") for value in step], trainer

    dpo, trainer = train("packed", "dpo", 4)
    assert dpo == pytest.approx(train("trl", "dpo", 4)[0], rel=1e-3)
    evaluation = Evaluation(trainer, rows, {})
    assert evaluation.lengths()[0].tolist() == [sum(rows[0]["chosen_runs"][::2]), len(rows[0]["rejected_ids"])]
    assert train("packed", Objective("orpo"), 4)[0] == pytest.approx(train("packed", Objective("orpo"), 1)[0], rel=1e-4)
    with pytest.raises(TrlError, match="not learned"):
        make_trainer("trl", tmp_path, rows, loss="orpo")
    assert data_fingerprint(rows) != data_fingerprint(rows.remove_columns(["chosen_runs", "rejected_runs"]))
