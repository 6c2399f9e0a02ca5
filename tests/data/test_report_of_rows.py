"""data_report.json: places and counts of what was dropped, figures of the text, pairs that say little."""

from __future__ import annotations

import json

from reading import lines, read, triple, write

from preference.data.rows import DataReport, iter_rows


def test_report_dict_save_and_summary(tmp_path):
    path = write(tmp_path, lines(triple(1), *[triple(0, question="")] * 3))
    _, report = read(path)
    report.drop("too_long", str(path), 1, "900 tokens")
    report.add_section("tokens", {"mean": 1.5})
    report.save(tmp_path / "data_report.json")
    content = json.loads((tmp_path / "data_report.json").read_text())
    assert (content["rows_read"], content["rows_kept"]) == (4, 0)
    assert content["dropped"] == {"empty_prompt": 3, "too_long": 1} and content["tokens"] == {"mean": 1.5}
    assert [place["line"] for place in content["examples"]["empty_prompt"]] == [2, 3, 4]
    assert len(report.to_dict(max_examples=1)["examples"]["empty_prompt"]) == 1
    for part in ("4 read, 0 kept, 4 dropped", "empty_prompt", f"{path}:2", "tokens: mean 1.5"):
        assert part in report.summary()


def test_report_lists_at_most_max_listed_but_counts_all(tmp_path):
    report = DataReport(max_listed=2)
    list(iter_rows([write(tmp_path, lines(*[triple(0, question="")] * 5))], report))
    assert report.dropped["empty_prompt"] == 5 and len(report.examples["empty_prompt"]) == 2


def test_text_with_half_surrogates_can_be_reported(tmp_path):
    path = write(tmp_path, b'{"\\ud800": 1, "question": "q", "response_chosen": "a"}\n' + lines(triple(1)))
    _, report = read(path)
    report.save(tmp_path / "report.json")
    report.summary().encode()
    json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))


def test_text_figures(tmp_path):
    rows = [
        triple(1, response_chosen="a much longer answer", response_rejected="short"),
        triple(1, response_chosen="A much  longer answer", response_rejected="short", question="Question  1 "),
        triple(2, response_chosen="see <|im_end|> and </s>.", response_rejected="No, and that is all there is to it."),
        triple(3, question="发烧怎么办？", response_chosen="多休息，多喝水。", response_rejected="多休息，多喝水！",
               system="S", history=[["a", "b"]]),
    ]  # fmt: skip
    _, report = read(write(tmp_path, lines(*rows)))
    text = report.sections["text"]
    assert (text["rows"], text["with_system"], text["with_history"]) == (4, 1, 1)
    assert (text["duplicate_pairs"], text["repeated_prompts"], text["near_identical_answers"]) == (1, 1, 0)
    assert text["scripts"] == {"latin": 3, "han": 1}
    assert text["control_text_rows"] == 1 and text["control_text"] == {"<|im_end|>": 1, "</s>": 1}
    assert text["length_bias"] == {"chosen_longer": 0.5, "equal": 0.25, "accuracy_of_length_alone": 0.625}
    assert text["characters"]["chosen"]["max"] == 24


def test_length_bias():
    from preference.data.text_stats import length_bias, spread

    assert length_bias(1, 0, 4) == {"chosen_longer": 0.25, "equal": 0.0, "accuracy_of_length_alone": 0.75}
    assert length_bias(0, 4, 4)["accuracy_of_length_alone"] == 0.5 and length_bias(0, 0, 0) == {}
    assert spread([3, 1, 2]) == {"mean": 2.0, "min": 1, "p50": 2, "p90": 3, "p99": 3, "max": 3} and spread([]) == {}


def test_near_identical_answers(tmp_path):
    long = "Rest, drink water, and see a doctor if the fever lasts for more than three days or gets worse."
    changed = long.replace("three", "four")
    rows = [triple(1, response_chosen=long, response_rejected=changed), triple(2, response_chosen=long.upper(),
            response_rejected=long), triple(3, response_chosen=long, response_rejected="Antibiotics.")]  # fmt: skip
    _, report = read(write(tmp_path, lines(*rows)))
    assert report.sections["text"]["near_identical_answers"] == 2


def test_prompts_shared_by_training_and_evaluation(tmp_path):
    from preference.data.text_stats import shared_prompts

    train, _ = read(write(tmp_path, lines(triple(1), triple(2, system="S")), "train.jsonl"))
    evaluation, _ = read(write(tmp_path, lines(triple(1, question="QUESTION 1"), triple(2), triple(3)), "eval.jsonl"))
    report = DataReport()
    assert [row.line for row in shared_prompts(train, evaluation, report)] == [1]
    assert report.sections["prompts_in_train_and_eval"]["rows"] == 1 and "eval.jsonl:1" in report.warnings[0]


def test_pairs_that_are_judged_both_ways(tmp_path):
    rows = [triple(1, question="Q", response_chosen="a", response_rejected="b"),
            triple(2, question="q ", response_chosen="B", response_rejected="a"),
            triple(3, question="Q", response_chosen="a", response_rejected="c"),
            triple(4, question="other", response_chosen="b", response_rejected="a")]  # fmt: skip
    _, report = read(write(tmp_path, lines(*rows)))
    assert report.sections["text"]["contradicting_pairs"] == 1


def test_the_share_of_each_file(tmp_path):
    for name, count in (("a", 3), ("b", 1)):
        write(tmp_path, lines(*(triple(i) for i in range(count)), {"question": ""}), f"{name}.jsonl")
    _, report = read(tmp_path)
    assert [file["share"] for file in report.to_dict()["files"].values()] == [0.75, 0.25]


def test_languages_are_told_from_a_sample():
    from preference.data.languages import FEWEST, add_languages
    from preference.data.row import Row

    english = Row("What should I do when my throat hurts and I have a fever?", "Drink a lot.", "I do not know.")
    german = Row("Was hilft gegen Halsschmerzen, wenn ich auch noch Fieber habe?", "Viel trinken.", "Nichts.")
    rows, report = [german if i % 4 == 0 else english for i in range(2000)], DataReport()
    add_languages(rows, report)
    told = report.sections["languages"]
    assert list(told) == ["en", "de"] and 0.2 < told["de"] < 0.3
    few = DataReport()
    add_languages(rows[: FEWEST - 1], few)
    assert not few.sections


def test_near_duplicates_between_training_and_evaluation():
    from preference.data.near_duplicates import near_duplicates
    from preference.data.row import Row

    words = "my throat hurts since yesterday and I have a fever of thirty nine what should I take against it now please"
    chinese = "我从昨天开始喉咙疼而且发烧三十九度请问现在应该吃什么药才能好得快一点谢谢医生您辛苦了"
    train = [Row(f"question number {i} about {i * i} things", "a", "b", file="t", line=i) for i in range(300)]
    train += [Row(words, "a", "b", file="t", line=900), Row(chinese, "a", "b", file="t", line=901)]
    evaluation = [
        Row(words.replace("now please", "now"), "a", "b", file="e", line=1),
        Row(words.upper(), "a", "b", file="e", line=2),  # the same: told by shared_prompts
        Row(chinese.replace("谢谢医生", "谢谢大夫"), "a", "b", file="e", line=3),
        Row("my throat hurts, and nothing else of it is like the other one", "a", "b", file="e", line=4),
        Row("?!", "a", "b", file="e", line=5),
    ]
    report = DataReport()
    pairs = near_duplicates(train, evaluation, report)
    assert [(ours.line, theirs.line) for ours, theirs in pairs] == [(1, 900), (3, 901)]
    assert (
        report.sections["near_duplicates_in_train_and_eval"]["rows"] == 2 and "e:1 is like t:900" in report.warnings[0]
    )
    assert near_duplicates([], evaluation, report) == []
