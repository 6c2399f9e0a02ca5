"""Which columns of a row are two answers side by side, and which say what is better; by their names alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from preference.data.formats.names import canonical, direction_of, key_of

STEMS = frozenset(
    """response answer output completion candidate summary reply generation resp ans text conversation response_text
    answer_text completion_text output_text generated generated_text generated_response hypothesis continuation message
    messages assistant assistant_response assistant_answer model_response model_answer model_output model_completion
    chat reply_text turn y 回答 回复 答案 回应 候选 候选回答 模型回答 输出""".split()
)
# Marks of the two sides
_MARKS = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"), ("one", "two"), ("x", "y"),
          ("甲", "乙"), ("一", "二"), ("左", "右"))  # fmt: skip
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
SIGNED = ("overall_preference", "preference_strength")  # below 0 the first is better (HelpSteer)
DECIDING = (*NAMING, *SIGNED, *LOOSE)


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


def answer_pairs(columns: tuple[str, ...]) -> list[tuple[str, str]]:
    """All pairs of columns that are two answers side by side, whether or not something decides between them."""
    return [pair for _, pair in _pairs(canonical(columns))]


def _direction(scores: tuple[str, str] | None) -> str:
    return "up" if scores is None else _stem_direction(scores[0]) or "up"


def _pairs(named: dict[str, str]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    for key, column in named.items():
        for marks in _MARKS:
            other = with_mark(key, *marks)
            if other and other[0] in STEMS and (match := next((o for o in other[1] if o in named), None)):
                yield marks, (column, named[match])


@lru_cache(maxsize=4096)
def with_mark(key: str, mark: str, other: str) -> tuple[str, tuple[str, ...]] | None:
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
    found: list[str] = []
    stem = key[: -len(mark)]
    first = ord(mark)
    while (name := stem + chr(first + len(found))) in named and len(found) < 10:
        found.append(named[name])
    return found


def _scores(named: dict[str, str], marks: tuple[str, str]) -> tuple[str, str] | None:
    """The columns of one score a side, as score_a and score_b, rating_1 and rating_2."""
    for key, column in named.items():
        other = with_mark(key, *marks)
        if other and other[1][0] in named and direction_of(other[0]) in ("up", "down"):
            return column, named[other[1][0]]
    return None


def _stem_direction(column: str) -> str | None:
    for marks in _MARKS:
        if (found := with_mark(key_of(column), *marks)) and (direction := direction_of(found[0])):
            return direction
    return None
