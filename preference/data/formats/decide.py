"""Two answers side by side and a column that says which is better, under any of the names that such columns have.

Which column is which comes from `sides`; what a value means from its text (`verdict`) or, for numbers, from all numbers
of the file: those that fit two conventions are asked for (--labels), never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

from preference.data.formats.base import Ask, Drop, Format, Options, Pair, RowDict, meant, number
from preference.data.formats.named import question_column, question_columns, question_of
from preference.data.formats.names import canonical, key_of
from preference.data.formats.scores import check_gap
from preference.data.formats.sides import NAMING, SIGNED, Sides, sides_of, with_mark
from preference.data.formats.trl import pair_of_prompt
from preference.data.formats.verdict import place_of


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
    if sides is None or options.labels_of("first"):
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
    if min(seen) < 0:
        return f"{min(seen):g}=first,{-min(seen):g}=second,0=tie"
    values = sorted(seen | ({0.0, 1.0} if len(seen) < 2 else set()))[:3]
    words = ("first", "second", "tie")
    return ",".join(f"{value:g}={word}" for value, word in zip(values, words, strict=False))


# ---------------------------------------------------------------------------------------------------- the pairs


def pairs(row: RowDict, options: Options, meanings: Mapping[str, Any] | None = None) -> Iterator[Pair]:
    sides = sides_of(tuple(row))
    if sides is None:
        raise Drop("missing_key", "no two answers and a column that says which is better")
    place, extra = _better(row, sides, options, meanings)
    answers = [row[column] for column in sides.columns]
    if None in answers:
        raise Drop("missing_key", f"{sides.columns[answers.index(None)]} is null")
    chosen, rejected = answers[place], answers[1 - place]
    pair = pair_of_prompt(question_of(row, sides.columns), chosen, rejected, extra=extra)
    pair.prompt = None
    yield pair


def _better(row: RowDict, sides: Sides, options: Options, meanings: Any) -> tuple[int, dict[str, Any]]:
    """Which side is better, and the scores if there are some. Raises Drop for a tie and for what says nothing."""
    said = _said_by(row, sides, options, meanings)
    found = [number(row.get(column)) for column in sides.scores] if sides.scores else []
    first, second = (value for value in (found if len(found) == 2 else (None, None)))
    if first is not None and second is not None and sides.direction == "down":
        first, second = -first, -second
    if said:
        place = next(iter(said.values()))
        if not isinstance(place, int):
            raise Drop("tie", f"{next(iter(said))} says so")
    elif first is None or second is None:
        raise Drop("wrong_label", f"nothing says which is better: {', '.join(sides.deciding or sides.scores or ())}")
    else:
        place = int(second > first)
    if sides.scores is None:
        return place, {} if options.min_score_gap is None else {"kept_without_scores": True}
    return place, check_gap(*((first, second) if place == 0 else (second, first)), options)


def _said_by(row: RowDict, sides: Sides, options: Options, meanings: Any) -> dict[str, int | str]:
    """What each deciding column says. Raises Drop where they disagree, and for text that names neither side."""
    said: dict[str, int | str] = {}
    for column in sides.deciding:
        value = row.get(column)
        if value is None or value == "" or value == []:
            continue
        place = _place(value, column, row, sides, options, meanings)
        if place is not None:
            said[column] = place
        elif len(sides.deciding) == 1 and sides.scores is None:
            raise Drop("wrong_label", f"{column} says {str(value)[:60]!r}, which names neither answer")
    if len(set(said.values())) > 1:
        words = ", ".join(f"{column} says {_word(place)}" for column, place in said.items())
        raise Drop("wrong_label", f"the labels disagree: {words}")
    return said


def _place(value: Any, column: str, row: RowDict, sides: Sides, options: Options, meanings: Any) -> int | str | None:
    found = _number(value)
    if labels := options.labels_of("first"):
        said = meant(labels, value if found is None else found)
        if said is not None:
            return {"first": 0, "second": 1}.get(said, "tie")
    if found is None:
        place = _named_beside(value, row, sides) if isinstance(value, str) else None
        return place_of(value, sides) if place is None else place
    if meanings is None:  # not bound to a file yet, so any number will do
        return 0
    meaning = meanings.get(column, {})
    if meaning == "signed":
        return "tie" if found == 0 else int(found > 0)
    if meaning == "between":
        return "tie" if found == 1.5 else int(found > 1.5)
    return meaning.get(found)


def _named_beside(value: str, row: RowDict, sides: Sides) -> int | None:
    """The side of which another column says the same, as model_a and model_b where the winner is a model's name."""
    for pair in _beside(tuple(row), sides):
        hits = [isinstance(row[column], str) and row[column].strip() == value.strip() for column in pair]
        if hits[0] != hits[1]:
            return hits.index(True)
    return None


@lru_cache(maxsize=1024)
def _beside(columns: tuple[str, ...], sides: Sides) -> tuple[tuple[str, str], ...]:
    named = canonical(columns)
    others = (
        (column, named.get(found[1][0])) for key, column in named.items() if (found := with_mark(key, *sides.marks))
    )
    return (sides.columns, *((first, second) for first, second in others if second is not None))


def _word(place: int | str) -> str:
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
