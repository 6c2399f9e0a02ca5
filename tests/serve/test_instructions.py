"""Checkable instructions: what follows them, in English and Chinese, and the same as a public copy of IFEval's code."""

from __future__ import annotations

import json

import pytest

import evaluate_model
from preference.serve.instructions import CHECKS, InstructionsError, Task, follows, forms, read_tasks, score
from tiny import tiny_model, tiny_tokenizer

FOLLOWED = [  # id, arguments, an answer that follows, one that does not
    ("keywords:existence", {"keywords": ["tea", "茶"]}, "Tea is 茶.", "Tea."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "Catalogues.", "A cat."),
    ("keywords:forbidden_words", {"forbidden_words": ["茶"]}, "喝水。", "喝茶。"),
    ("keywords:frequency", {"keyword": "水", "frequency": 2, "relation": "at least"}, "水和水", "水"),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 2, "let_relation": "less than"}, "An.", "Aha."),
    ("language:response_language", {"language": "zh"}, "今天天气很好，我们去公园。", "The weather is nice today."),
    ("language:response_language", {"language": "en"}, "The weather is nice today.", "今天天气很好，我们去公园。"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "3.5 m.", "One. Two!"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "下雨了。在家！", "下雨了。"),
    ("length_constraints:number_words", {"num_words": 4, "relation": "at least"}, "一二三四", "one two three"),
    ("length_constraints:number_words", {"num_words": 4, "relation": "少于"}, "只有三", "有四个字"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n\nTwo."),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"}, "One.\n\n'then, two.", "Then.\n\nTwo."),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "首先"}, "首先洗手。", "洗手。"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], 【地址】", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. Tea!", "Bye."),
    ("detectable_content:postscript", {"postscript_marker": "附言"}, "再见。\n附言：喝水", "再见。"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a* b", "** b"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "Section 1\na\nSection 2\nb", "Section 1\na"),
    ("detectable_format:multiple_sections", {"section_spliter": "章节", "num_sections": 2}, "章节一 a 章节二 b", "a"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<A day>>\nIt rained.", "<< >>"),
    ("combination:two_responses", {}, "One.******Two.", "One.******One."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Yes.", "Yes."),
    ("startend:end_checker", {"end_phrase": "That is all."}, '"So. That is all."', "That is all. So"),
    ("startend:quotation", {}, "“好。”", '"So'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "GO ON", "GO on"),
    ("change_case:english_capital", {}, "THE WEATHER IS NICE TODAY.", "The weather is NICE."),
    ("change_case:english_lowercase", {}, "the weather is nice today.", "The weather."),
    ("punctuation:no_comma", {}, "No. Yes.", "不，是。"),
]  # fmt: skip


@pytest.mark.parametrize("name, arguments, good, bad", FOLLOWED)
def test_what_follows_and_what_does_not(name, arguments, good, bad):
    assert follows(good, (name, arguments)) and not follows(bad, (name, arguments))
    assert not follows("  ", (name, arguments))


def test_every_instruction_is_tried():
    assert {name for name, *_ in FOLLOWED} == set(CHECKS) and len(CHECKS) == 25


def test_measures_strict_and_loose_of_two_models():
    tasks = [
        Task("p", (("punctuation:no_comma", {}), ("detectable_format:title", {}))),
        Task("q", (("startend:end_checker", {"end_phrase": "Bye."}),)),
    ]
    answers = {"base": ["Sure, here:\n<<T>>", "*Bye.*"], "tuned": ["<<T>>", "Bye."]}
    found = {
        each.measure: {who: row.tolist() for who, row in each.right.items()} for each in score("f", tasks, answers)
    }
    assert found["prompt, strict"] == {"base": [0, 0], "tuned": [1, 1]}
    assert found["prompt, loose"] == {"base": [1, 1], "tuned": [1, 1]}
    assert found["instruction, strict"] == {"base": [0, 1, 0], "tuned": [1, 1, 1]}
    assert len(forms("a\nb\nc")) == 8 and "b" in forms("a\nb\nc")


@pytest.mark.parametrize(
    "row, said",
    [
        ('{"prompt": "p"}', "x.jsonl:1: a row is"),
        ('{"prompt": "p", "instruction_id_list": ["a:b"], "kwargs": [{}]}', "no instruction is called 'a:b'"),
        ('{"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []}', "as many kwargs"),
        ('{"prompt": "p", "instruction_id_list": ["keywords:frequency"], "kwargs": [{"keyword": "a"}]}', "frequency"),
        ("", "holds no row"),
    ],
)
def test_a_faulty_file_names_its_row(row, said, tmp_path):
    (tmp_path / "x.jsonl").write_text(row)
    with pytest.raises(InstructionsError, match=said):
        read_tasks(tmp_path / "x.jsonl")


def test_a_model_is_asked(tmp_path, monkeypatch, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"key": 1, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"keyword": None}]},
        {"key": 2, "prompt": "说。", "instruction_id_list": ["startend:quotation"], "kwargs": [{}]},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["evaluate_model.py", str(tmp_path / "model"), "--instructions", str(tmp_path / "x.jsonl"), "--use_cpu"]
    monkeypatch.setattr("sys.argv", [*words, "--max_new_tokens", "4", "--output", str(tmp_path / "scores.json")])
    evaluate_model.main()
    assert "prompt, strict" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {len(each["right"]["model"]) for each in scores} == {2}


def test_the_same_as_a_public_copy_of_ifeval():
    """Of the checks that neither draw at random nor need a downloaded model."""
    public = pytest.importorskip("if_verifiable.ifeval.instructions_registry")
    skipped = ("language:", "change_case:english", "length_constraints:number_sentences", "capital_word")
    for name, arguments, good, bad in FOLLOWED:
        if not name.isascii() or any(word in name for word in skipped) or not (good + bad + str(arguments)).isascii():
            continue
        theirs = public.INSTRUCTION_DICT[name](name)
        theirs.build_description(**arguments)
        assert (bool(theirs.check_following(good)), bool(theirs.check_following(bad))) == (True, False), name
