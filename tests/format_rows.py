"""A row or more of every family of datasets that makes the same pair, and the files that rows come in."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pytest
from reading import lines

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
    ("ranking", {"instruction": USER, "input": "", "output": [GOOD, "Middling.", BAD], "history": []}),
    ("ranking", {"instruction": USER, "system": "", "response": [GOOD, BAD]}),
    ("alpaca", {"instruction": USER, **PAIR, "output": GOOD}),
    ("orca", {"system": "", "question": USER, **PAIR}),
    ("orca", {"question": USER, "chatgpt": GOOD, "llama2-13b-chat": BAD}),
    ("orca", {"question": USER, **CHAT}),
    ("orca-rejudged", {"system": "", "input": USER, **PAIR, "status": "swapped", "rating": [9, 7]}),
    ("hh", {"chosen": HH.format(USER, GOOD), "rejected": HH.format(USER, BAD)}),
    ("dialogue-text", {"chosen": f"User: {USER}\nAssistant: {GOOD}", "rejected": f"User: {USER}\nAssistant: {BAD}"}),
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
    ("nova", {"messages": [{"role": "user", "content": [{"text": USER}]}, {"role": "assistant", "candidates": [
        {"content": [{"text": BAD}], "preferenceLabel": "non-preferred"},
        {"content": [{"text": GOOD}], "preferenceLabel": "preferred"}]}]}),
    ("vertex", {"contents": [{"role": "user", "parts": [{"text": USER}]}], "completions": [
        {"score": 0.0, "completion": {"role": "model", "parts": [{"text": BAD}]}},
        {"score": 1.0, "completion": {"role": "model", "parts": [{"text": GOOD}]}}]}),
    ("paddlenlp", {"src": [USER], "tgt": [], "response": [[BAD], [GOOD]], "sort": [0, 1]}),
    ("halos", {"prompt": [u()], "output_A": [a(BAD)], "output_B": [a(GOOD)], "label": 0, "type": "pairwise_feedback"}),
    ("label-studio", {"data": {"prompt": USER, "answer1": BAD, "answer2": GOOD}, "annotations": [{"result": [
        {"to_name": "answer1,answer2", "type": "pairwise", "value": {"selected": "right"}}]}]}),
    ("two-answers", {"prompt": USER, "response_1": BAD, "response_2": GOOD, "preferred": 2}),
    ("two-answers", {"question": USER, "answer_0": BAD, "answer_1": GOOD, "score_0": -1.0, "score_1": 1.0}),
    ("ranked-answers", {"instruction": USER, "generations": [BAD, GOOD, "Middling."], "ratings": [1, 5, 3]}),
    ("ranked-answers", {"context": [u()], "completions": [{"rank": 1, "completion": [a(BAD)]},
                                                          {"rank": 0, "completion": [a(GOOD)]}]}),
    ("named-sides", {"Question": USER, "Better Answer": GOOD, "Worse Answer": BAD}),
    ("named-sides", {"问题": USER, "优选回答": GOOD, "拒绝回答": BAD}),
    ("trl-implicit-text", {"chosen": f"{USER} {GOOD}", "rejected": f"{USER} {BAD}"}),
]  # fmt: skip

# formats whose rows hold lists that are no messages, which a CSV cell cannot say
LISTS = ("ranking", "nova", "vertex", "paddlenlp", "label-studio", "ranked-answers", "summarize")

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


def as_csv(rows) -> bytes:
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
