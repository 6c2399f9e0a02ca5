"""Planted better and worse answers through every format, name and label convention: none comes out the wrong way round.

A row may be refused; what is read has the better answer chosen. `WANTED` says which must be read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from format_rows import BAD, GOOD, ROWS, USER
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reading import lines, write

from preference.data.formats import Options
from preference.data.formats.names import SIDES
from preference.data.formats.sides import LOOSE, NAMING, SIGNED, STEMS
from preference.data.rows import DataError, DataReport, iter_rows

QUIET = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
CASES = {
    "as it is": str,
    "Title": lambda name: name.title(),
    "UPPER": lambda name: name.upper(),
    "spaces": lambda name: name.replace("_", " "),
    "hyphens": lambda name: name.replace("_", "-"),
    "camel": lambda name: name[:1] + name.title().replace("_", "")[1:],
}
QUESTIONS = ("question", "prompt", "instruction", "query", "问题", "problem", "post", "context", "inputs")


def pairs_of(tmp_path, rows: list[dict[str, Any]], **choices: Any) -> list[tuple[str, str]]:
    path = write(tmp_path, lines(*rows))
    try:
        return [(row.chosen, row.rejected) for row in iter_rows([path], DataReport(), Options(**choices))]
    except DataError:
        return []


def swapped(value: Any) -> Any:
    """The same structure with the better text where the worse one stood, and the reverse."""
    text = json.dumps(value).replace(json.dumps(GOOD)[1:-1], "\0")
    return json.loads(
        text.replace(json.dumps(BAD)[1:-1], json.dumps(GOOD)[1:-1]).replace("\0", json.dumps(BAD)[1:-1]), strict=False
    )


@pytest.mark.parametrize("name, row", ROWS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ROWS)])
def test_every_format_tells_the_sides_by_its_labels(tmp_path, name, row):
    """With the texts exchanged and the labels as they were, the other text is chosen: nothing else decides."""
    assert pairs_of(tmp_path, [row], axis="better") == [(GOOD, BAD)]
    assert pairs_of(tmp_path, [swapped(row)], axis="better") == [(BAD, GOOD)]
    assert pairs_of(tmp_path, [dict(reversed(row.items()))], axis="better") == [(GOOD, BAD)]


@pytest.mark.parametrize("style", CASES)
def test_every_pair_of_names_in_every_letter_case(tmp_path, style):
    """Sixty names of the two sides a style, one row a file, in front of the question and behind it."""
    change, read = CASES[style], 0
    sample = SIDES[list(CASES).index(style) :: len(SIDES) // 60]
    for i, (better, worse) in enumerate(sample):
        row = {change(better): GOOD, change(QUESTIONS[i % len(QUESTIONS)]): USER, change(worse): BAD}
        found = pairs_of(tmp_path, [row if i % 2 else dict(reversed(row.items()))])
        assert found in ([], [(GOOD, BAD)]), row
        read += bool(found)
    assert read >= 0.95 * len(sample)


@dataclass(frozen=True)
class Side:
    """How a file marks its two answers, and how a label may name the first (0) or the second (1)."""

    marks: tuple[str, str]

    def columns(self, stem: str, glue: str) -> tuple[str, str]:
        return f"{stem}{glue}{self.marks[0]}", f"{stem}{glue}{self.marks[1]}"

    def labels(self, columns: tuple[str, str]) -> list[tuple[Any, Any]]:
        """Pairs of values that anyone would take for the first and the second."""
        model = tuple(f"model_{mark}" for mark in self.marks)
        better = tuple(f"{column} is better" for column in columns)
        loud = [("A>B", "B>A"), ("[[A]]", "[[B]]"), ("left", "right"), ("first", "second"), ("A", "b")]
        return [columns, self.marks, model, better, *loud]


SIDE_KINDS = [Side(marks) for marks in (("a", "b"), ("1", "2"), ("0", "1"), ("A", "B"), ("left", "right"))]


@settings(max_examples=120, **QUIET)
@given(
    st.sampled_from(sorted(STEMS)),
    st.sampled_from(SIDE_KINDS),
    st.sampled_from(["_", "-", " "]),
    st.sampled_from([*NAMING, *LOOSE]),
    st.integers(0, 8),
    st.permutations([0, 1, 0, 1]),
    st.booleans(),
)
def test_two_answers_and_what_names_the_better(tmp_path, stem, side, glue, deciding, kind, order, turned):
    columns = side.columns(stem, glue)
    values = side.labels(columns)[kind]
    rows = []
    for first_is_worse in order:
        texts = (BAD, GOOD) if first_is_worse else (GOOD, BAD)
        row = {"question": USER, columns[0]: texts[0], columns[1]: texts[1], deciding: values[first_is_worse]}
        rows.append(dict(reversed(row.items())) if turned else row)
    assert set(pairs_of(tmp_path, rows)) <= {(GOOD, BAD)}, rows[0]


NUMBERS = {"first 1, second 2": (1, 2), "first 0, second 1": (0, 1), "first 1, second 0": (1, 0), "-2, 2": (-2, 2)}


@settings(max_examples=100, **QUIET)
@given(
    st.sampled_from(["response", "answer", "output", "candidate"]),
    st.sampled_from(SIDE_KINDS),
    st.sampled_from([*NAMING, *LOOSE, *SIGNED]),
    st.sampled_from(sorted(NUMBERS)),
    st.lists(st.sampled_from([0, 1, None]), min_size=1, max_size=6),
)
@example("response", SIDE_KINDS[1], "label", "first 0, second 1", [0, 1, None])
def test_numbers_are_read_by_one_convention_or_asked_for(tmp_path, stem, side, deciding, kind, order):
    """Whatever a file's numbers mean, --labels says it; without, rows are read only where they can mean one thing."""
    columns = side.columns(stem, "_")
    values = NUMBERS[kind]
    tie = next(value for value in (0, 2, 3) if value not in values)
    rows = [
        {"question": USER, columns[0]: "same", columns[1]: "alike", deciding: tie}
        if one is None
        else {"question": USER, columns[one]: GOOD, columns[1 - one]: BAD, deciding: values[one]}
        for one in order
    ]
    labels = {str(values[0]): "first", str(values[1]): "second", str(tie): "tie"}
    said = pairs_of(tmp_path, rows, labels=labels)
    assert said == [(GOOD, BAD)] * sum(one is not None for one in order)
    if deciding in SIGNED and kind != "-2, 2":
        return  # HelpSteer's strengths are signed, whatever is in the file
    if kind == "first 1, second 2" and side.marks == ("0", "1"):
        return  # 1 is the second's own mark
    usual = kind in ("first 1, second 2", "-2, 2") or (kind == "first 0, second 1" and deciding in NAMING)
    if None in order and {0, 1} - set(order):
        return  # a file in which one side never wins says too little about what its tie is
    if kind == "first 0, second 1" and (side.marks == ("1", "2") or 0 not in order):
        return  # 1 and 2 alone are taken for the first and the second
    if usual:
        assert set(pairs_of(tmp_path, rows)) <= {(GOOD, BAD), ("same", "alike"), ("alike", "same")}, rows


LISTS = ("responses", "answers", "generations", "completions", "output", "candidates")
RANKERS = {
    "scores": lambda place, size: size - place,
    "ratings": lambda place, size: float(size - place),
    "rewards": lambda place, size: str(1.5 * (size - place)),
    "rm_scores": lambda place, size: -place,
    "rank": lambda place, size: place + 1,
    "ranks": lambda place, size: place,
    "ranking": lambda place, size: place + 1,
}


@settings(max_examples=100, **QUIET)
@given(
    st.sampled_from(LISTS),
    st.sampled_from(sorted(RANKERS)),
    st.permutations(range(4)),
    st.integers(2, 4),
    st.sampled_from(["beside", "inside", "numbered"]),
)
def test_candidates_are_ranked_by_what_stands_beside_them(tmp_path, name, ranker, order, size, layout):
    places = [place for place in order if place < size]
    texts = [GOOD if place == 0 else BAD if place == size - 1 else f"between {place}" for place in places]
    ranks = [RANKERS[ranker](place, size) for place in places]
    if layout == "beside":
        row = {"prompt": USER, name: texts, ranker: ranks}
    elif layout == "inside":
        row = {"prompt": USER, name: [{"text": text, ranker: rank} for text, rank in zip(texts, ranks, strict=True)]}
    else:
        row = {"prompt": USER, **{f"completion_{i}": text for i, text in enumerate(texts)}, ranker: ranks}
    assert pairs_of(tmp_path, [row]) in ([], [(GOOD, BAD)]), row
    best = {"prompt": USER, name: texts, "best": places.index(0)}
    assert {chosen for chosen, _ in pairs_of(tmp_path, [best])} <= {GOOD}


def test_scores_that_contradict_the_sides_drop_the_pair(tmp_path):
    pair = {"prompt": USER, "chosen": BAD, "rejected": GOOD}
    for low, high in (("chosen_reward", "rejected_reward"), ("reward_chosen", "reward_rejected"),
                      ("chosen-rm-score", "rejected-rm-score"), ("score_chosen", "score_rejected")):  # fmt: skip
        assert pairs_of(tmp_path, [pair | {low: 0.1, high: 0.9}]) == []
        assert pairs_of(tmp_path, [pair | {low: 0.9, high: 0.1}]) == [(BAD, GOOD)]
    assert pairs_of(tmp_path, [pair | {"chosen_rank": 2, "rejected_rank": 1}]) == []
    for column, value in (("rating_list", [1, 9]), ("scores", [0.1, 0.2]), ("margin", -0.5), ("label", 0)):
        assert pairs_of(tmp_path, [pair | {column: value}]) == []


def test_a_row_with_a_list_of_pairs_is_no_file_of_rows(tmp_path):
    """{"version": ..., "data": [...]} holds rows; a row that asks something itself and holds pairs does not."""
    pair = {"chosen": GOOD, "rejected": BAD}
    assert pairs_of(tmp_path, [{"prompt": USER, "pairs": [pair]}]) == []
    assert pairs_of(tmp_path, [{"version": "1", "pairs": [{"prompt": USER, **pair}]}]) == [(GOOD, BAD)]


def test_places_written_as_text_are_read_where_a_row_shows_how_they_are_counted(tmp_path):
    def row(answers, best, name="best_response"):
        return {"prompt": USER, "responses": answers, name: best}

    unclear = row(["So so.", GOOD, BAD], "2")
    assert pairs_of(tmp_path, [unclear]) == []
    assert pairs_of(tmp_path, [unclear, row([BAD, GOOD], "2")])[1:] == [(GOOD, BAD)]  # two of two: from 1
    assert pairs_of(tmp_path, [row([BAD, GOOD], "1"), row([GOOD, BAD], "0")]) == [(GOOD, BAD)] * 2
    assert pairs_of(tmp_path, [row([BAD, GOOD], "1", "best_index")]) == [(GOOD, BAD)]


def test_scores_of_all_candidates_are_not_those_of_the_two_sides(tmp_path):
    row = {
        "prompt": USER,
        "all_generated_responses": [BAD, GOOD],
        "scores": [0.1, 0.9],
        "chosen": GOOD,
        "rejected": BAD,
    }
    assert pairs_of(tmp_path, [row]) == [(GOOD, BAD)]
    assert pairs_of(tmp_path, [{"messages": [{"role": "user", "content": USER}], "chosen_response": GOOD,
                                "rejected_response": BAD}]) == [(GOOD, BAD)]  # fmt: skip
