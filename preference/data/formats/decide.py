"""Two answers side by side and a column that says which is better, under any of the names that such columns have.

Which column is which comes from `names`; what a value means from its text (a column's name, a letter, left, "tie") or,
for numbers, from all numbers of the file: those that fit two conventions are asked for (--labels), never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

from preference.data.formats.base import Ask, Drop, Format, Options, Pair, RowDict, number
from preference.data.formats.named import question_column, question_columns, question_of
from preference.data.formats.names import canonical, direction_of, key_of
from preference.data.formats.scores import check_gap
from preference.data.formats.trl import pair_of_prompt

STEMS = frozenset(
    """response answer output completion candidate summary reply generation resp ans text conversation response_text
    answer_text completion_text output_text generated generated_text generated_response hypothesis continuation message
    messages assistant assistant_response assistant_answer model_response model_answer model_output model_completion
    chat reply_text turn y 回答 回复 答案 回应 候选 候选回答 模型回答 输出""".split()
)
# Marks of the two sides; a column that names the better one may use any of `_WORDS`, whatever the columns' own marks
_WORDS = ({"a", "left", "first", "one", "甲", "左"}, {"b", "right", "second", "two", "乙", "右"})
_MARKS = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"), ("one", "two"), ("x", "y"),
          ("甲", "乙"), ("一", "二"), ("左", "右"))  # fmt: skip
_TIES = frozenset(
    """tie tied ties draw equal equally same both both_bad both_good bothbad tie_bothbad neither none similar
    no_preference a_b indifferent unsure equal_quality 平局 平 一样 相同 相当 都好 都差 无 c""".split()
)
# Columns whose number names a side, by its mark or its place; those whose number may as well mean "the first is good"
NAMING = """
    winner preferred better best choice chosen selected selection comparison verdict vote better_response
    better_answer better_output better_completion better_response_id better_id better_index preferred_response
    preferred_answer preferred_output preferred_completion preferred_id preferred_index preferred_response_id
    best_response best_answer best_id best_index winner_id winner_index winning_response winning_answer
    winner_response human_choice selected_response selected_answer chosen_response_id chosen_id chosen_index
    which_is_better better_one judgment judgement decision result outcome gold_winner human_winner
    annotator_choice user_choice 胜者 更好 更优 优胜 赢家 较好 优选 选择 获胜者 更好的回答 最佳""".split()
LOOSE = """preference preferences human_preference human_label preference_label label labels gold_label annotation
 annotations preference_responses preference_values 偏好 标签 标注 结果""".split()
SIGNED = ("overall_preference", "preference_strength", "preference_score")  # below 0 the first is better (HelpSteer)
DECIDING = (*NAMING, *SIGNED, *LOOSE)
_PLACES = {"first": 0, "second": 1, "tie": None}


@dataclass(frozen=True)
class Sides:
    """The two answers of rows with these columns, and what decides between them."""

    columns: tuple[str, str]
    marks: tuple[str, str]
    deciding: tuple[str, ...]  # columns that name the better one
    scores: tuple[str, str] | None  # or one score each
    direction: str = "up"


@lru_cache(maxsize=1024)
def sides_of(columns: tuple[str, ...]) -> Sides | None:
    named = canonical(columns)
    for marks, pair in _pairs(named):
        if len(_series(named, pair[0], marks[0])) > 2:
            return None  # candidates, which a ranking or a score each puts in order
        deciding = tuple(named[key] for key in DECIDING if key in named and named[key] not in pair)
        scores = _scores(named, marks)
        if deciding or scores:
            return Sides(pair, marks, deciding, scores, _direction(scores))
    return None


def _direction(scores: tuple[str, str] | None) -> str:
    return "up" if scores is None else _stem_direction(scores[0]) or "up"


def _pairs(named: dict[str, str]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    for key, column in named.items():
        for marks in _MARKS:
            other = _with_mark(key, *marks)
            if other and other[0] in STEMS and (match := next((o for o in other[1] if o in named), None)):
                yield marks, (column, named[match])


@lru_cache(maxsize=4096)
def _with_mark(key: str, mark: str, other: str) -> tuple[str, tuple[str, ...]] | None:
    """(the name without its mark, the names of the other side) of `response_a`, `a_response`, `answer1`, `回答一`."""
    tokens = key.split("_")
    for i, token in enumerate(tokens):
        if token == mark and len(tokens) > 1:
            rest = tokens[:i] + tokens[i + 1 :]
            return "_".join(rest), ("_".join([*tokens[:i], other, *tokens[i + 1 :]]),)
    if key.endswith(mark) and (mark.isdigit() or not mark.isascii() or key[: -len(mark)] in STEMS):
        return key[: -len(mark)].rstrip("_"), (key[: -len(mark)] + other,)
    return None


def _series(named: dict[str, str], column: str, mark: str) -> list[str]:
    """The columns numbered or lettered on from `column`: response_0, response_1, response_2."""
    key = key_of(column)
    if mark not in ("0", "1", "a") or not key.endswith(mark):
        return [column]
    stem, found = key[: -len(mark)], []
    first = ord(mark)
    while (name := stem + chr(first + len(found))) in named and len(found) < 10:
        found.append(named[name])
    return found


def _scores(named: dict[str, str], marks: tuple[str, str]) -> tuple[str, str] | None:
    """The columns of one score a side, as score_a and score_b, rating_1 and rating_2."""
    for key, column in named.items():
        other = _with_mark(key, *marks)
        if other and other[1][0] in named and direction_of(other[0]) in ("up", "down"):
            return column, named[other[1][0]]
    return None


def _stem_direction(column: str) -> str | None:
    for marks in _MARKS:
        if (found := _with_mark(key_of(column), *marks)) and (direction := direction_of(found[0])):
            return direction
    return None


# ----------------------------------------------------------------------------------------------- what a value says

_LOUD = re.compile(r"^\[*\s*([ab12])\s*\]*\s*([<>=≻≺]+)\s*\[*\s*([ab12])\s*\]*$", re.IGNORECASE)


def place_of(value: Any, sides: Sides) -> int | str | None:
    """0 or 1: the better side, 'tie', or None where the text says neither."""
    if isinstance(value, (list, tuple)):
        return _agreed([place_of(item, sides) for item in value if not _discarded(item)])
    if isinstance(value, Mapping):
        return _of_mapping(value, sides)
    if not isinstance(value, str):
        return None
    if compared := _LOUD.match(value.strip()):
        return _compared(*compared.groups())
    key = key_of(value)
    names = [key_of(column) for column in sides.columns]
    if key in names:
        return names.index(key)
    if key in _TIES:
        return "tie"
    tokens = set(key.split("_"))
    if tokens & {"tie", "tied", "draw"}:
        return "tie"
    for places in ([{mark} for mark in sides.marks], [{name} for name in names], list(_WORDS)):
        hits = [bool(tokens & place) or any("_" in word and word in key for word in place) for place in places]
        if hits[0] != hits[1]:
            return hits.index(True)
    return None


def _compared(first: str, sign: str, second: str) -> int | str | None:
    if "=" in sign or first.casefold() == second.casefold():
        return "tie"
    first_is_a = first.casefold() in ("a", "1")
    return int(first_is_a != (sign[0] in ">≻"))


def _agreed(places: list[int | str | None]) -> int | str | None:
    """What most annotators say; a tie where they are even."""
    if not places or None in places:
        return None
    votes = (places.count(0), places.count(1))
    return "tie" if votes[0] == votes[1] else int(votes[1] > votes[0])


def _discarded(item: Any) -> bool:
    return isinstance(item, Mapping) and str(item.get("status", "")).casefold() in ("discarded", "draft", "pending")


def _of_mapping(value: Mapping, sides: Sides) -> int | str | None:
    for key in ("value", "values", "label", "choice", "selected", "winner", "text", "preferred"):
        if value.get(key) is not None:
            return place_of(value[key], sides)
    won = [place_of(str(key), sides) for key, flag in value.items() if number(flag) == 1 or flag is True]
    return won[0] if len(won) == 1 else None


# ------------------------------------------------------------------------------------------- what a number means


def numbers_of(rows: Iterable[RowDict], columns: Iterable[str]) -> dict[str, set[float]]:
    seen: dict[str, set[float]] = {column: set() for column in columns}
    for row in rows:
        for column in seen:
            if (found := _number(row.get(column))) is not None:
                seen[column].add(found)
    return seen


def _number(value: Any) -> float | None:
    return number(value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value)


def meaning_of(key: str, seen: set[float], sides: Sides) -> dict[float, int | str] | str:
    """What the numbers of a deciding column mean, or 'signed', 'between', or '' where that is unclear."""
    if key in SIGNED:
        return "signed"
    marks = tuple(int(mark) if mark.isdigit() else -1 for mark in sides.marks)
    naming = key in NAMING or key in ("preference", "preferences", "human_preference", "preference_label")
    if any(value < 0 for value in seen) or seen >= {0, 1, 2}:
        return ""
    if seen <= {1, 2} and marks == (1, 2) and (naming or seen == {1, 2}):
        return {1: 0, 2: 1}
    if seen <= {0, 1} and marks == (0, 1) and key in NAMING:
        return {0: 0, 1: 1}
    if marks == (-1, -1) and key in NAMING and 2 in seen and seen <= {1, 2}:
        return {1: 0, 2: 1}
    if marks == (-1, -1) and key in NAMING and 0 in seen and seen <= {0, 1}:
        return {0: 0, 1: 1}
    if key.startswith("preference") and seen and all(1 <= value <= 2 for value in seen) and marks == (1, 2):
        return "between"
    return ""


def bind(format: Format, rows: Iterable[RowDict], options: Options) -> Format:
    """The format with the meaning of its numbers settled by all numbers of the file. Raises Ask where they are not."""
    rows = iter(rows)
    first = next(rows, {})
    sides = sides_of(tuple(first))
    if sides is None or options.labels:
        return replace(format, pairs=partial(pairs, meanings={}))
    meanings: dict[str, Any] = {}
    for column, seen in numbers_of(chain([first], rows), sides.deciding).items():
        if not seen:
            continue
        meanings[column] = meaning_of(key_of(column), seen, sides)
        if meanings[column] == "":
            shown = ", ".join(f"{value:g}" for value in sorted(seen)[:5])
            raise Ask(
                f"the numbers in {column} ({shown}) may mean more than one thing, and nothing in the file says which "
                f"of {sides.columns[0]} and {sides.columns[1]} they prefer: say it with --labels, for example "
                f"--labels {_example(seen)} (first is {sides.columns[0]}, second {sides.columns[1]})"
            )
    return replace(format, pairs=partial(pairs, meanings=meanings))


def _example(seen: set[float]) -> str:
    values = sorted(seen | ({0.0, 1.0} if len(seen) < 2 else set()))[:3]
    words = ("first", "second", "tie")
    return ",".join(f"{value:g}={word}" for value, word in zip(values, words, strict=False))


# ---------------------------------------------------------------------------------------------------- the pairs


def pairs(row: RowDict, options: Options, meanings: Mapping[str, Any] | None = None) -> Iterator[Pair]:
    sides = sides_of(tuple(row))
    if sides is None:
        raise Drop("missing_key", "no two answers and a column that says which is better")
    place, extra = _better(row, sides, options, meanings or {})
    answers = [row[column] for column in sides.columns]
    if None in answers:
        raise Drop("missing_key", f"{sides.columns[answers.index(None)]} is null")
    chosen, rejected = answers[place], answers[1 - place]
    pair = pair_of_prompt(question_of(row, sides.columns), chosen, rejected, extra=extra)
    pair.prompt = None
    yield pair


def _better(row: RowDict, sides: Sides, options: Options, meanings: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Which side is better, and the scores if there are some. Raises Drop for a tie and for what says nothing."""
    said = {}
    for column in sides.deciding:
        value = row.get(column)
        if value is None or value == "" or value == []:
            continue
        place = _place(value, column, sides, options, meanings)
        if place is not None:
            said[column] = place
        elif len(sides.deciding) == 1 and sides.scores is None:
            raise Drop("wrong_label", f"{column} says {str(value)[:60]!r}, which names neither answer")
    if len(set(said.values())) > 1:
        raise Drop("wrong_label", "the labels disagree: " + ", ".join(f"{c} says {_said(p)}" for c, p in said.items()))
    scores = [number(row.get(column)) for column in sides.scores] if sides.scores else [None, None]
    if sides.direction == "down":
        scores = [None if score is None else -score for score in scores]
    if said:
        place = next(iter(said.values()))
        if place == "tie":
            raise Drop("tie", f"{next(iter(said))} says so")
    elif None in scores:
        raise Drop("wrong_label", f"nothing says which is better: {', '.join(sides.deciding or sides.scores or ())}")
    else:
        place = int(scores[1] > scores[0])
    if sides.scores is None:
        return place, {} if options.min_score_gap is None else {"kept_without_scores": True}
    return place, check_gap(scores[place], scores[1 - place], options)


def _place(value: Any, column: str, sides: Sides, options: Options, meanings: Mapping[str, Any]) -> int | str | None:
    found = _number(value)
    if options.labels:
        meant = options.labels.get(str(value).strip() if found is None else f"{found:g}")
        if meant is not None:
            return "tie" if meant == "tie" else _PLACES[meant]
    if found is None:
        return place_of(value, sides)
    meaning = meanings.get(column, {})
    if meaning == "signed":
        return "tie" if found == 0 else int(found > 0)
    if meaning == "between":
        return "tie" if found == 1.5 else int(found > 1.5)
    return meaning.get(found)


def _said(place: int | str) -> str:
    return place if isinstance(place, str) else ("first", "second")[place]


def matches(row: RowDict) -> bool:
    sides = sides_of(tuple(row))
    if sides is None or any(row[column] is None for column in sides.columns):
        return False
    if not all(isinstance(row[column], (str, list, tuple, dict)) for column in sides.columns):
        return False
    given = any(row.get(column) is not None for column in sides.deciding + (sides.scores or ()))
    return given and bool(question_columns(tuple(row), sides.columns) or not isinstance(row[sides.columns[0]], str))


def read_by(row: RowDict) -> tuple[str, ...]:
    sides = sides_of(tuple(row))
    if sides is None:
        return ()
    return (*sides.columns, *sides.deciding, *(sides.scores or ()), *question_column(row, sides.columns))


DECIDED = Format(
    name="two-answers",
    what="two answers (response, answer, output, ... _a/_b, 1/2, left/right) and a column that says which is better",
    needs=(),
    also=matches,
    pairs=pairs,
    scored=True,
    bind=bind,
    reads=read_by,
    uses=frozenset({"labels"}),
)
