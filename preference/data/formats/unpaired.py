"""One answer a row and a label that calls it good or bad: KTO's rows, thumbs up and down.

Words and flags mean what they say. Numbers are read only where those of the whole file fit one convention (0 and 1, or
-1 and 1); ratings and classes are asked for (--labels 5=good,1=bad).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

from preference.data.formats.base import Ask, Drop, Format, Options, Pair, RowDict, meant, number, shown_keys
from preference.data.formats.messages import is_message, is_messages, pair_of_context, turns_of
from preference.data.formats.named import question_column, question_of
from preference.data.formats.names import canonical, key_of
from preference.data.formats.trl import pair_of_prompt


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Most usual first. In the second and third list the name itself says what "true" means.
LABELS = _names(
    """label labels kto_tag kto_label desirability feedback user_feedback human_feedback thumbs thumb vote user_vote
    reaction verdict preference sentiment rating user_rating 标签 反馈 用户反馈 评价"""
)
GOOD_IF_TRUE = _names(
    """is_good good desirable is_desirable thumbs_up thumbsup thumb_up liked like is_liked upvoted is_preferred
    is_chosen chosen accepted is_accepted is_positive helpful is_helpful is_correct correct 点赞 赞 好评"""
)
BAD_IF_TRUE = _names(
    """is_bad bad undesirable is_undesirable thumbs_down thumbsdown thumb_down disliked dislike is_disliked downvoted
    is_rejected rejected is_negative unhelpful is_incorrect incorrect 点踩 踩 差评"""
)
ANSWERS = _names(
    """completion response answer output reply generation candidate model_response model_output assistant_response
    bot_response assistant 回答 回复 答案 输出 模型回答"""
)
DIALOGUES = _names("messages conversations conversation dialogue dialog chat turns trajectory 对话")
UP = frozenset(_names(
    """true good desirable thumbs_up thumbsup thumb_up up upvote upvoted like liked positive pos chosen accept accepted
    preferred correct helpful satisfied 👍 好 好评 赞 点赞 正 正面 喜欢 满意 有用"""
))  # fmt: skip
DOWN = frozenset(_names(
    """false bad undesirable thumbs_down thumbsdown thumb_down down downvote downvoted dislike disliked negative neg
    rejected reject incorrect unhelpful dissatisfied unsatisfied 👎 坏 差 差评 踩 点踩 负 负面 不喜欢 不满意 没用"""
))  # fmt: skip
NEITHER = frozenset(_names("neutral none null tie skip skipped unknown unrated n_a na 中立 无 跳过"))
CONVENTIONS = ({0.0, 1.0}, {-1.0, 0.0, 1.0})  # false and true; down, no vote and up
SHOWN = 5


@lru_cache(maxsize=1024)
def label_column(columns: tuple[str, ...]) -> tuple[str, bool | None] | None:
    """The column that judges the answer, and whether "true" in it means good; None where its values have to say."""
    named = canonical(columns)
    for names, positive in ((LABELS, None), (GOOD_IF_TRUE, True), (BAD_IF_TRUE, False)):
        if found := next((named[name] for name in names if name in named), None):
            return found, positive
    return None


@lru_cache(maxsize=1024)
def _contrary(columns: tuple[str, ...]) -> str | None:
    """The column that calls the answer bad if true, beside one that calls it good: thumbs_down beside thumbs_up."""
    judged = label_column(columns)
    return next(iter(_by_name(columns, BAD_IF_TRUE)), None) if judged and judged[1] else None


@lru_cache(maxsize=1024)
def _by_name(columns: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    named = canonical(columns)
    return tuple(named[name] for name in names if name in named)


def answer_column(row: RowDict) -> tuple[str, bool] | None:
    """The column of the answer, and whether it is a dialogue that ends in the answer."""
    columns = tuple(row)
    for column in _by_name(columns, ANSWERS):
        text = isinstance(row[column], str) or is_message(row[column]) or is_messages(row[column])
        if text and question_column(row, (column,)):
            return column, False
    dialogues = (column for column in _by_name(columns, DIALOGUES) if is_messages(row[column]))
    return next(((column, True) for column in dialogues), None)


def _said(value: Any, positive: bool | None) -> bool | float | str | None:
    """A value as good (True), bad (False), neither (None), a number that a file has to explain, or a strange word."""
    value = _inside(value)
    if value is None or isinstance(value, bool):
        return value if positive is not False or value is None else not value
    word = key_of(str(value)) or str(value).strip()
    if word in NEITHER or word == "":
        return None
    if (found := number(value)) is not None:
        return found if positive is None or found not in (0, 1) else (found == 1) is positive
    if positive is not None and word in ("yes", "no", "y", "n", "true", "false", "是", "否"):
        return (word in ("yes", "y", "true", "是")) is positive
    return True if word in UP else False if word in DOWN else str(value).strip()


def _inside(value: Any) -> Any:
    """A label out of an object that holds one, {"rating": "thumbs_up"}; any other value as it is."""
    if not isinstance(value, dict):
        return value
    return next((value[key] for key in ("rating", "label", "value", "type") if value.get(key) is not None), None)


def matches(row: RowDict) -> bool:
    found = label_column(tuple(row))
    return found is not None and not isinstance(row[found[0]], (list, tuple)) and answer_column(row) is not None


def is_labelled(row: RowDict) -> bool:
    """Whether the row is of this format and its label says good or bad by itself."""
    if not matches(row):
        return False
    column, positive = label_column(tuple(row)) or ("", None)
    said = _said(row[column], positive)
    return isinstance(said, bool) or said in (0.0, 1.0, -1.0)


def bind(format: Format, rows: Iterable[RowDict], options: Options) -> Format:
    """The format with its numbers settled by those of the whole file. Raises Ask where they fit no one convention."""
    if options.labels_of("good"):
        return replace(format, pairs=partial(pairs, numbers={}))
    seen: set[bool | float | str] = set()
    column, positive = "", None
    for row in rows:
        if found := label_column(tuple(row)):
            column, positive = found
            said = _said(row[column], positive)
            if said is not None and len(seen) < 64:
                seen.add(f"{said}" if isinstance(said, bool) else said)  # True and 1.0 are the same in a set
    told = {said for said in seen if isinstance(said, float)}
    strange = {said for said in seen if isinstance(said, str) and said not in ("True", "False")}
    numbers = next((c for c in CONVENTIONS if told <= c), None)
    if numbers is None or (told and positive is False) or (strange and not told and not seen & {"True", "False"}):
        shown = sorted(f"{value:g}" for value in told) or sorted(strange)
        good, bad = (shown[-1], shown[0]) if len(shown) > 1 else (shown[0], "ANOTHER")
        raise Ask(
            f"there is one answer a row, and the values of {column} ({', '.join(shown[:SHOWN])}) do not say by "
            f"themselves which are good and which are bad: say it with --labels, for example --labels "
            f"{good}=good,{bad}=bad (what is not named is dropped; value=tie drops it too)"
        )
    down, neither = min(numbers), -1.0 in numbers
    meanings: dict[float, bool | None] = {1.0: True, down: False} | ({0.0: None} if neither else {})
    return replace(format, pairs=partial(pairs, numbers=meanings))


def pairs(row: RowDict, options: Options, numbers: Mapping[float, bool | None] | None = None) -> Iterator[Pair]:
    """The one answer of a row, in `chosen`, with its label."""
    judged, place = label_column(tuple(row)), answer_column(row)
    if judged is None:
        raise Drop("no_label", "nothing calls the answer good or bad")
    if place is None:
        raise Drop("missing_key", f"no question with an answer; keys are {shown_keys(row)}")
    label = _label(row[judged[0]], judged, options, numbers)
    contrary = _contrary(tuple(row))
    if contrary and not options.labels_of("good") and _said(row[contrary], False) is (not label):
        votes = f"{judged[0]} is {row[judged[0]]!r} and {contrary} {row[contrary]!r}"
        raise Drop("no_label", f"{votes}: neither good nor bad")
    column, whole = place
    if whole:
        turns = turns_of(row[column])
        if not turns or turns[-1].role != "assistant":
            raise Drop("irregular_turns", "the dialogue does not end in the assistant's answer")
        pair = pair_of_context(turns[:-1], turns[-1].text, "")
    else:
        asked = question_column(row, (column, judged[0]))
        pair = pair_of_prompt(question_of(row, (column, judged[0])), row[column], row[column])
        if pair.prompt is not None and key_of(asked[0]) != "prompt":  # as in pairs, where that column alone may stand
            pair.prompt = None
    pair.rejected, pair.label = "", label
    yield pair


def _label(value: Any, judged: tuple[str, bool | None], options: Options, numbers: Any) -> bool:
    said = _said(value, judged[1])
    if labels := options.labels_of("good"):
        said = {"good": True, "bad": False}.get(meant(labels, _inside(value)) or "tie")
    elif isinstance(said, float):
        said = bool(said > 0) if numbers is None else numbers.get(said, str(value))
    if said is None:
        raise Drop("no_label", f"{judged[0]} is {str(value)[:40]!r}: neither good nor bad")
    if not isinstance(said, bool):
        raise Drop("wrong_label", f"{judged[0]} is {str(value)[:40]!r}, which is neither good nor bad")
    return said


def read_by(row: RowDict) -> tuple[str, ...]:
    place, judged = answer_column(row), label_column(tuple(row))
    if place is None or judged is None:
        return ()
    contrary = _contrary(tuple(row))
    asked = () if place[1] else question_column(row, (place[0], judged[0]))
    return (place[0], judged[0], *((contrary,) if contrary else ()), *asked)


UNPAIRED = Format(
    name="unpaired",
    what="one answer and a label that calls it good or bad (KTO, thumbs up and down)",
    needs=(),
    also=matches,
    pairs=pairs,
    bind=bind,
    reads=read_by,
    single=True,
    uses=frozenset({"labels"}),
)
