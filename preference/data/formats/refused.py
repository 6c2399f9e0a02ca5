"""What is not a preference pair, and how to say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from preference.data.formats.base import Format, RowDict, flag, number
from preference.data.formats.names import CANDIDATES, INPUTS, QUESTIONS, key_of
from preference.data.formats.sides import STEMS, answer_pairs
from preference.data.formats.unpaired import is_labelled


class Refused(NamedTuple):
    matches: Callable[[RowDict], bool]
    message: str


def _has(*keys: str) -> Callable[[RowDict], bool]:
    return lambda row: all(row.get(key) is not None for key in keys)


def _safety(row: RowDict) -> bool:
    labels = ("is_safe", "safety_label", "is_toxic")
    return row.get("response") is not None and any(row.get(key) is not None for key in labels)


def _red_team(row: RowDict) -> bool:
    names = {str(key).rsplit("/", 1)[-1] for key in row}
    return "transcript" in names and bool(names & {"min_harmlessness_score_transcript", "rating", "red_team_member_id"})


def _label_tool(row: RowDict) -> bool:
    if _has("query", "response_0", "response_1")(row):
        return "better_response_id" not in row and "safer_response_id" not in row
    values = list(row.values())[:5]
    return bool(values) and all(isinstance(value, dict) and _has("query", "response_0")(value) for value in values)


def _wrapped(row: RowDict) -> bool:
    lists = [value for value in row.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if lists and len(row) <= 3 and any(key in row for key in ("data", "train", "rows", "examples")):
        return True
    inside = [value.keys() if isinstance(value, dict) else None for value in row.values()]
    return bool(inside) and bool(inside[0]) and all(keys == inside[0] for keys in inside)


def _columns(row: RowDict) -> bool:
    lists = [value for value in row.values() if isinstance(value, list) and len(value) > 1]
    return len(row) >= 3 and len(lists) == len(row) and len({len(value) for value in lists}) == 1


def _plain_sft(row: RowDict) -> bool:
    keys = {str(key) for key, value in row.items() if value is not None}
    answers = keys & {"output", "response", "completion", "answer", "target", "reply"}
    questions = keys & {"instruction", "prompt", "question", "query", "input"}
    comparing = ("chosen", "reject", "prefer", "response_", "answer_", "_resp", "win")
    return bool(answers and questions) and not any(part in key for key in keys for part in comparing)


def _messages_sft(row: RowDict) -> bool:
    return any(row.get(key) is not None for key in ("messages", "conversations", "conversation")) and not any(
        "reject" in str(key) or "chosen" in str(key) for key in row
    )


def _unranked(row: RowDict) -> bool:
    keys = {key_of(key) for key, value in row.items() if isinstance(value, (list, tuple)) and len(value) > 1
            and all(isinstance(item, str) for item in value)}  # fmt: skip
    return bool(keys & CANDIDATES) and bool({key_of(key) for key in row} & (QUESTIONS | INPUTS))


def _steps(row: RowDict) -> bool:
    label = row.get("label")
    if (isinstance(label, dict) and "steps" in label) or (isinstance(label, str) and "Step 1:" in label):
        return True
    return all(isinstance(row.get(key), (list, tuple)) for key in ("completions", "labels"))


def _undecided(row: RowDict) -> bool:
    return not any(key_of(key) in STEMS for key in row) and bool(answer_pairs(tuple(row)))


REFUSED = (
    Refused(_steps, "one solution with a label for each of its steps (process supervision), not a pair"),
    Refused(
        _unranked,
        "several answers a question, and nothing beside them that is called score, rank or best: all may be right "
        "(references); if the list stands best first, --format ranking (in training --data_format)",
    ),
    Refused(_safety, "single answers with a safety label (as BeaverTails): no second answer to prefer to it"),
    Refused(
        is_labelled,
        "unpaired answers with a good/bad label (KTO, thumbs up and down): there is one answer a row, not a pair. "
        "Train on them with loss=kto (data/convert.py: --unpaired); every other loss takes a good and a bad answer to "
        "the same prompt in one row, as {prompt, chosen, rejected}",
    ),
    Refused(_red_team, "red-team transcripts: one dialogue a row with ratings, not a pair"),
    Refused(_label_tool, "candidates without labels (input of Zhongjing's labelling tool): nobody has ranked them yet"),
    Refused(_wrapped, "one JSON object around the rows: save the rows inside it, one by one or as a list"),
    Refused(_columns, "one JSON object of columns: save one object a row"),
    Refused(_plain_sft, "question and one answer (SFT): there is nothing that the answer is preferred to"),
    Refused(_undecided, "two or more answers, and no column that says which is better: call it winner"),
    Refused(_messages_sft, "dialogues without a rejected answer (SFT)"),
    Refused(lambda row: _has("text")(row) and not _has("chosen")(row), "plain text: no question, no pair of answers"),
)


def set_aside(row: RowDict, format: Format) -> tuple[str, str] | None:
    """(reason, detail) of a row whose own columns say that it is no pair: discarded, a tie, labelled the other way."""
    flags = flag_columns(tuple(row))
    if not flags:
        return None
    read = format.columns_read(row)
    for column, kind in flags:
        value = row[column]
        if value is None or column in read:
            continue
        if kind == "status" and str(value).casefold() in ("discarded", "rejected", "invalid", "deleted"):
            return "discarded", f"{column} says {str(value)[:40]!r}"
        if kind == "tie" and flag(value):
            return "tie", f"{column} says so"
        if kind == "label" and not format.scored and (flag(value) is False or number(value) == -1):
            way = f"if it means nothing, --ignore_columns {column}"
            return "wrong_label", f"{column} is {value!r} beside answers whose columns say which is better; {way}"
    return None


@lru_cache(maxsize=1024)
def flag_columns(columns: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    kinds = {"status": "status", "tie": "tie", "is_tie": "tie", "label": "label"}
    return tuple((column, kinds[key]) for column in columns if (key := key_of(column)) in kinds)
