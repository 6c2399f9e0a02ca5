"""Several answers and what ranks them: scores, ranks or the best one's place, beside the list, inside it or numbered.

`responses: [...], scores: [...]`, `generations` and `ratings` (distilabel), `completions: [{rank, completion}]`
(NeMo-RL), `completions: [{score, completion}]`, `summaries` and `choice`, `completion_0 ..` and `ranking` (KoChatGPT).
Whether more is better comes from the name alone; a list whose sibling has no such name is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from preference.data.formats.base import RANKED, Ask, Drop, Format, Options, Pair, RowDict, number
from preference.data.formats.messages import is_message, is_messages, reply_of
from preference.data.formats.named import answer_columns, question_column, question_columns, question_of
from preference.data.formats.names import CANDIDATES, canonical, direction_of, key_of
from preference.data.formats.scores import pick
from preference.data.formats.sides import NAMING, STEMS
from preference.data.formats.trl import pair_of_prompt

_TEXTS = ("completion", "response", "answer", "output", "text", "content", "generation", "candidate", "reply",
          "summary", "message", "value")  # fmt: skip
_INDEX = ("index", "idx")  # counted from 0 by their name
_UNCLEAR = "says nothing about whether more is better: rename it to score or to rank (1 is the best)"


@dataclass(frozen=True)
class Ranking:
    """Where a row's candidates are, and what puts them in order."""

    lists: tuple[str, ...]  # one column with a list of them, or one column each
    by: str  # the column that ranks them; "" where they carry their own score or rank
    direction: str  # up | down | best | sort | order
    inside: str = ""  # the key of a candidate that ranks it


def ranking_of(row: RowDict) -> Ranking | None:
    named = canonical(tuple(row))
    for key, column in named.items():
        value = row[column]
        if key in CANDIDATES and isinstance(value, (list, tuple)) and len(value) > 1 and not is_messages(value):
            found = _inside(column, value) or _beside(row, column, len(value))
            if found:
                return found
    series = _series(tuple(row))
    return _of_series(row, series) if len(series) > 2 else None


def _inside(column: str, value: Any) -> Ranking | None:
    if not all(isinstance(item, Mapping) for item in value):
        return None
    keys = {key: direction for key in value[0] if (direction := direction_of(key)) in ("up", "down")}
    for key, direction in keys.items():
        if all(number(item.get(key)) is not None for item in value):
            return Ranking((column,), "", direction, key)
    return None


def _beside(row: RowDict, column: str, size: int) -> Ranking | None:
    for other, value in row.items():
        if other == column or value is None:
            continue
        direction = direction_of(other)
        if direction == "best" and not isinstance(value, (list, tuple, dict)):
            return Ranking((column,), other, direction)
        if direction and isinstance(value, (list, tuple)) and len(value) == size and _numbers(value):
            return Ranking((column,), other, "order" if key_of(other) in ("ranking", "rankings") else direction)
    return None


def _numbers(value: Iterable[Any]) -> bool:
    return any(number(item) is not None for item in value) and all(
        item is None or number(item) is not None for item in value
    )


@lru_cache(maxsize=1024)
def _series(columns: tuple[str, ...]) -> tuple[str, ...]:
    """completion_0, completion_1, completion_2; answer_a, answer_b, answer_c."""
    named = canonical(columns)
    best: list[str] = []
    for key in named:
        stem, mark = (key[:-2], key[-1]) if key[-2:-1] == "_" else (key[:-1], key[-1:])
        if mark in ("0", "1", "a") and stem in STEMS:
            found: list[str] = []
            first = ord(mark)
            while (name := key[:-1] + chr(first + len(found))) in named and len(found) < 10:
                found.append(named[name])
            best = max(best, found, key=len)
    return tuple(best)


def _of_series(row: RowDict, series: tuple[str, ...]) -> Ranking | None:
    for other, value in row.items():
        direction = direction_of(other)
        if direction in ("up", "down") and isinstance(value, (list, tuple)) and len(value) == len(series):
            return Ranking(series, other, direction)  # KoChatGPT's ranking holds the place of each
    marks = [key_of(column)[-1] for column in series]
    named = canonical(tuple(row))
    for column in (named[key] for key in NAMING if key in named):
        if isinstance(row[column], str) and key_of(row[column]) in (*marks, *map(key_of, series)):
            return Ranking(series, column, "best")
    for key in named:
        if key.endswith(marks[0]) and (direction := direction_of(key[:-1].rstrip("_"))) in ("up", "down"):
            columns = [named.get(key[:-1] + mark) for mark in marks]
            if None not in columns:
                return Ranking(series, "\n".join(map(str, columns)), direction)
    return None


# ------------------------------------------------------------------------------------------------------ the pairs


def pairs(row: RowDict, options: Options, base: int = 0) -> Iterator[Pair | Drop]:
    ranking = ranking_of(row)
    if ranking is None:
        raise Drop("missing_key", "no list of answers with scores, ranks or the best one's place beside it")
    question = question_of(row, ranking.lists)
    texts = [_text_of(item) for item in _items(row, ranking)]
    scores = _scores(row, ranking, texts, base)
    candidates = [(text, score) for text, score in zip(texts, scores, strict=True) if score is not None and text]
    incomplete = {"incomplete_candidates": True} if len(candidates) < len(texts) else {}
    for picked in pick(candidates, options, str(question)):
        if isinstance(picked, Drop):
            yield picked
            continue
        pair = pair_of_prompt(question, picked[0], picked[1], extra=picked[2] | incomplete)
        pair.prompt = None
        yield pair


def _items(row: RowDict, ranking: Ranking) -> list[Any]:
    return [row[column] for column in ranking.lists] if len(ranking.lists) > 1 else list(row[ranking.lists[0]])


def _text_of(item: Any) -> str:
    if item is None or isinstance(item, str):
        return item or ""
    if is_message(item) or is_messages(item):
        return reply_of(item)
    if isinstance(item, Mapping):
        value = next((item[key] for key in _TEXTS if item.get(key) is not None), None)
        if isinstance(value, (str, Mapping, list, tuple)) and value is not item:
            return _text_of(value)
        if "parts" in item:  # Vertex: {"role": "model", "parts": [{"text": ...}]}
            return "".join(_text_of(part) for part in item["parts"])
    if isinstance(item, (list, tuple)) and len(item) == 1:
        return _text_of(item[0])
    raise Drop("wrong_type", f"a candidate must be text or a message, not {type(item).__name__}")


def _scores(row: RowDict, ranking: Ranking, texts: list[str], base: int) -> list[float | None]:
    if ranking.inside:
        found = [number(item.get(ranking.inside)) for item in _items(row, ranking)]
    elif ranking.direction == "best":
        best = _place_of_best(row[ranking.by], ranking, texts, base)
        return [float(i == best) for i in range(len(texts))]
    elif "\n" in ranking.by:
        found = [number(row[column]) for column in ranking.by.split("\n")]
    else:
        found = [number(value) for value in row[ranking.by]]
    if ranking.direction == "sort" and set(found) - {0.0, 1.0}:
        raise Drop("wrong_label", f"{ranking.by} {_UNCLEAR}")
    if ranking.direction == "order":
        found = _ranks(found, ranking)
    falls = ranking.direction in ("down", "order")
    return [None if value is None else -value if falls else value for value in found]


def _ranks(found: list[float | None], ranking: Ranking) -> list[float | None]:
    """`ranking: [2, 0, 1]`: the place of each answer, or the answers in order? Read where both say the same."""
    places = [int(value) for value in found if value is not None]
    low = min(places, default=0)
    if len(places) < len(found) or sorted(places) != list(range(low, low + len(places))):  # ties: places, not an order
        return found
    inverse = [0] * len(places)
    for place, answer in enumerate(places):
        inverse[answer - low] = place + low
    if inverse != places:
        raise Drop(
            "wrong_label",
            f"{ranking.by} may hold each answer's place or the answers in order, which differ here: rename it to rank "
            "if it holds places",
        )
    return found


def _place_of_best(value: Any, ranking: Ranking, texts: list[str], base: int) -> int:
    keys = [key_of(column) for column in ranking.lists]
    if isinstance(value, str) and len(keys) > 1 and (named := [k for k in keys if key_of(value) in (k, k[-1])]):
        return keys.index(named[0])
    found = number(value)
    if found is not None and found - base in range(len(texts)):
        return int(found) - base
    stripped = [text.strip() for text in texts]
    if isinstance(value, str) and stripped.count(value.strip()) == 1:
        return stripped.index(value.strip())
    raise Drop("wrong_label", f"{ranking.by} must name one of {len(texts)} answers, not {str(value)[:40]!r}")


def bind(format: Format, rows: Iterable[RowDict], options: Options) -> Format:
    """The format with the places of best ones counted from 0 or from 1, as all rows of the file show."""
    zero = past = False
    written = ""
    for row in rows:
        ranking = ranking_of(row)
        if ranking is None:
            continue
        if ranking.direction != "best":
            return format
        found, size = number(row[ranking.by]), len(_items(row, ranking))
        if found is not None and isinstance(row[ranking.by], str) and key_of(ranking.by).split("_")[-1] not in _INDEX:
            written = ranking.by
        zero, past = zero or found == 0, past or found == size
    if zero and past:
        raise Ask("the places of the best answers are counted from 0 in some rows and from 1 in others")
    if written and not zero and not past:
        raise Ask(
            f"the places in {written} are text, and no row shows whether they are counted from 0 or from 1: rename it "
            f"to {written}_index if the first answer is 0, or write the places as numbers from 0"
        )
    return replace(format, pairs=partial(pairs, base=int(past)))


def matches(row: RowDict) -> bool:
    ranking = ranking_of(row)
    if ranking is None or answer_columns(tuple(row)):
        return False
    return bool(question_columns(tuple(row), ranking.lists))


def read_by(row: RowDict) -> tuple[str, ...]:
    ranking = ranking_of(row)
    if ranking is None:
        return ()
    return (*ranking.lists, *ranking.by.split("\n"), *question_column(row, ranking.lists))


CANDIDATES_RANKED = Format(
    name="ranked-answers",
    what="several answers with scores, ranks or the best one's place (distilabel, RRHF, NeMo-RL, Vertex, KoChatGPT)",
    needs=(),
    also=matches,
    pairs=pairs,
    scored=True,
    bind=bind,
    reads=read_by,
    uses=RANKED,
)
