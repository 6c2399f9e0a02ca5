"""What a run says of its data: short, without zeros, with what matters."""

from __future__ import annotations

import pytest

from preference.data.headline import blocks, headline
from preference.data.report import DataReport


def spread(value: int) -> dict[str, float]:
    return {"mean": value, "min": value, "p50": value, "p90": value, "p99": value, "max": value}


def report(files: int = 2, **dropped: int) -> DataReport:
    made = DataReport()
    for number in range(files):
        made.read(f"f{number:02}.jsonl", 10)
        made.recognised(f"f{number:02}.jsonl", "triple")
    for reason, count in dropped.items():
        for line in range(count):
            made.drop(reason, "f00.jsonl", line + 1, "why")
    histogram = [
        {"from": 0, "to": 8, "prompt": 3, "chosen": 4, "rejected": 0},
        {"from": 8, "to": 16, "prompt": 1, "chosen": 0, "rejected": 1},
    ]
    tokens = {"pairs": 4, "prompt": spread(5), "chosen": spread(6), "rejected": spread(7), "histogram": histogram}
    tokens["length_bias"] = {"chosen_longer": 0.9, "equal": 0.0, "accuracy_of_length_alone": 0.9}
    made.unread("f00.jsonl", "brief", "Some words")
    made.add_section("train_text", {"duplicate_pairs": 3, "repeated_prompts": 0})
    made.add_section("train", tokens | {"control_look_alikes": {"rows": 0, "tokens": {}, "places": []}})
    made.add_section("prompts_in_train_and_eval", {"rows": 0, "places": []})
    return made


def test_what_matters_is_said_and_zeros_are_not() -> None:
    text = headline(report(too_long=2))
    assert text.splitlines()[0] == "data: 20 rows read, 18 kept"
    for told in ("f00.jsonl", "8 of 10  triple", "2 too_long, first at f00.jsonl:1 why", "none needs more than 12",
                 "90% of the pairs", "brief", "3 pairs stand there more than once", "█▂"):  # fmt: skip
        assert told in text
    for untold in ("repeated", " 0 ", "{}", "[", "control tokens", "flatter"):
        assert untold not in text


def test_many_files_and_reasons_stay_short() -> None:
    text = headline(report(files=500, **{f"reason_{i}": 1 for i in range(9)}))
    assert (
        len(text.splitlines()) <= 25
        and "and 492 more files with 4,920 rows" in text
        and "4 for 4 other reasons" in text
    )


@pytest.mark.parametrize("counts, line", [([], ""), ([0, 0], ""), ([1, 8, 0, 4], "▁█ ▄"), ([1000, 1], "█▁")])
def test_blocks(counts: list[int], line: str) -> None:
    assert blocks(counts) == line
