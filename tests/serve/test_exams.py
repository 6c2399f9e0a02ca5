"""Multiple-choice exams: every file as it comes, and likelihoods against a plain computation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import evaluate_model
from preference.serve.exam_files import ExamError, read_exam
from preference.serve.exams import (
    Score,
    context_limit,
    continuation_logps,
    encode_pair,
    letter_context,
    picks,
    text_context,
)
from tiny import tiny_model, tiny_tokenizer

AS_THEY_COME = {
    "cmb.json": json.dumps([
        {"question": "Which?", "option": {"A": "one", "B": "two", "C": ""}, "answer": "B"},
        {"question": "Several?", "option": {"A": "one", "B": "two"}, "answer": "AB"},
        {"question": "Unknown?", "option": {"A": "one", "B": "two"}},
    ]),
    "cmexam.csv": 'Question,Options,Answer,Explanation\nWhich?,"A one\nB two",B,because\n',
    "medqa.jsonl": json.dumps({"question": "Which?", "answer": "two", "options": {"A": "one", "B": "two"},
                               "answer_idx": "B"}),
    "medqa_list.jsonl": json.dumps({"question": "Which?", "answer_idx": "B",
                                    "options": [{"key": "A", "value": "one"}, {"key": "B", "value": "two"}]}),
    "mmlu.csv": "Which?,one,two,B\n",
    "mmlu.jsonl": json.dumps({"question": "Which?", "choices": ["one", "two"], "answer": 1}),
    "ceval.csv": "id,question,A,B,answer\n0,Which?,one,two,B\n",
    "medmcqa.jsonl": json.dumps({"question": "Which?", "opa": "one", "opb": "two", "opc": "3", "opd": "4", "cop": 1}),
    "arc.jsonl": json.dumps({"question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]},
                             "answerKey": "B"}),
}  # fmt: skip


@pytest.mark.parametrize("name", AS_THEY_COME)
def test_files_as_they_come(name, tmp_path):
    (tmp_path / name).write_text("\ufeff" + AS_THEY_COME[name], encoding="utf-8")
    exam = read_exam(tmp_path / name)
    assert [(q.text, q.options[:2], q.right) for q in exam.questions] == [("Which?", ("one", "two"), 1)]
    if name == "cmb.json":
        assert dict(exam.left_out) == {"several answers are right": 1, "no answer is given": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"question": "q", "options": {"A": "1", "B": "2"}, "answer": "D"}', "x.jsonl:1: the answer 'D' is none"),
        ('{"q": "q"}', "no question with options; it has q"),
        ('{"question": "q"', "x.jsonl"),
        ("[]", "no question with one right answer"),
    ],
)
def test_a_faulty_file_names_its_row(text, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ExamError, match=message.replace("(", r"\(")):
        read_exam(tmp_path / "x.jsonl")


def plain_sum(model, tokenizer, context: str, continuation: str) -> float:
    """One continuation in one row, token by token."""
    start, rest = encode_pair(tokenizer, context, continuation)
    assert start + rest == tokenizer(context + continuation, add_special_tokens=False).input_ids
    logps = torch.log_softmax(model(input_ids=torch.tensor([start + rest])).logits[0].double(), dim=-1)
    return sum(logps[len(start) + i - 1, token].item() for i, token in enumerate(rest))


@torch.no_grad()
def test_picks_are_the_likeliest(tmp_path):
    """The batch of padded options gives what each option gives alone."""
    (tmp_path / "mmlu.csv").write_text("Which is it?,a cold,rest,water and much rest,B\nWho?,he,she and he,it,A\n")
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for question in read_exam(tmp_path / "mmlu.csv").questions:
        letters = [plain_sum(model, tokenizer, letter_context(question), f" {letter}") for letter in "ABC"]
        options = [plain_sum(model, tokenizer, text_context(question), f" {option}") for option in question.options]
        per_character = [value / len(option) for value, option in zip(options, question.options, strict=True)]
        assert picks(model, tokenizer, question) == {
            "letter": int(np.argmax(letters)),
            "option": int(np.argmax(options)),
            "option per character": int(np.argmax(per_character)),
        }


def test_sums_and_picks_are_those_of_lm_eval(tmp_path):
    """lm-eval's own requests on the same rows (0.4.13 runs beside these transformers)."""
    library = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    from lm_eval.api.instance import Instance

    (tmp_path / "mmlu.csv").write_text(
        "Which is it?,a cold,rest,water and much rest,B\nWho? ,he,she and he,it,A\n怎么办？,水,茶,药,C\n"
    )
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    theirs = library.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)

    def sums(context: str, continuations) -> list[float]:
        requests = [Instance("loglikelihood", {}, (context, f" {text}"), i) for i, text in enumerate(continuations)]
        return [logp for logp, _ in theirs.loglikelihood(requests, disable_tqdm=True)]

    for question in read_exam(tmp_path / "mmlu.csv").questions:
        lengths = [len(option) for option in question.options]
        for context, texts in ((letter_context(question), "ABC"), (text_context(question), question.options)):
            pairs = [encode_pair(tokenizer, context, f" {text}") for text in texts]
            ours = continuation_logps(model, pairs[0][0], [ids for _, ids in pairs], context_limit(model))
            assert ours == pytest.approx(found := sums(context, texts), abs=1e-4)
        assert picks(model, tokenizer, question) == {
            "letter": int(np.argmax(sums(letter_context(question), "ABC"))),
            "option": int(np.argmax(found)),
            "option per character": int(np.argmax(np.array(found) / lengths)),
        }


def test_a_change_is_paired():
    base, tuned = np.array([1] * 50 + [0] * 50), np.array([1] * 48 + [0] * 2 + [1] * 20 + [0] * 30)
    difference, low, high, p = Score("x", "letter", {"base": base, "tuned": tuned}).change()
    assert difference == pytest.approx(0.18) and low == pytest.approx(0.095, abs=2e-3)
    assert high == pytest.approx(0.265, abs=2e-3) and p == pytest.approx(2 * (1 + 22 + 231) / 2**22)
    assert Score("x", "letter", {"base": base, "tuned": base}).change() == (0, 0, 0, 1)


def test_a_model_sits_an_exam(tmp_path, monkeypatch, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "mmlu.csv").write_text("Which?,one,two,B\nWho?,he,she,A\n")
    words = ["evaluate_model.py", str(tmp_path / "model"), "--mcq", str(tmp_path / "mmlu.csv"), "--use_cpu"]
    monkeypatch.setattr("sys.argv", [*words, "--output", str(tmp_path / "scores.json")])
    evaluate_model.main()
    assert "mmlu.csv" in capsys.readouterr().out
    assert {len(score["right"]["model"]) for score in json.loads((tmp_path / "scores.json").read_text())} == {2}
    monkeypatch.setattr("sys.argv", [*words[:3], str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit, match="none.csv"):
        evaluate_model.main()
