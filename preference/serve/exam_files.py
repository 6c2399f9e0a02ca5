"""Multiple-choice exams as they come: CMB, CMExam, MedQA, MMLU, C-Eval, MedMCQA; JSON, JSON lines and CSV."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preference.errors import PreferenceError

LETTERS = "ABCDEFGHIJ"
QUESTION_KEYS = ("question", "Question", "input", "stem")
OPTION_KEYS = ("options", "option", "Options", "choices")
ANSWER_KEYS = ("answer_idx", "answer", "Answer", "cop", "answerKey", "label")
_OPTION_LINE = re.compile(r"^\s*([A-J])[.、:：)\s]\s*(.*)$")


class ExamError(PreferenceError, ValueError):
    """An exam file that cannot be read; the message names file and row."""


@dataclass(frozen=True)
class Question:
    """One question with one right option. `options` are in the order of their letters; `right` is an index."""

    text: str
    options: tuple[str, ...]
    right: int
    where: str


@dataclass
class Exam:
    """A file's questions, and why some rows are none, with counts."""

    name: str
    questions: list[Question]
    left_out: Counter[str]


def read_exam(path: str | Path) -> Exam:
    """The questions of a file with one right answer each.

    Raises:
        ExamError: the file cannot be read, a row is malformed, or no question is left.
    """
    path = Path(path)
    exam = Exam(path.name, [], Counter())
    try:
        rows = list(_rows(path))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, csv.Error) as error:
        raise ExamError(f"{path}: {error}") from None
    for line, row in rows:
        found = _question(row, f"{path}:{line}")
        if isinstance(found, Question):
            exam.questions.append(found)
        else:
            exam.left_out[found] += 1
    if not exam.questions:
        raise ExamError(f"{path}: no question with one right answer; left out: {dict(exam.left_out) or 'nothing'}")
    return exam


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() in (".csv", ".tsv"):
        table = list(csv.reader(text.splitlines(keepends=True), delimiter="\t" if path.suffix == ".tsv" else ","))
        head = table[0] if table else []
        if not any(name in head for name in QUESTION_KEYS):  # MMLU's own files: question, A, B, C, D, answer
            head = ["question", *LETTERS[: len(head) - 2], "answer"]
            table = [head, *table]
        for line, cells in enumerate(table[1:], start=2 if any(name in table[0] for name in QUESTION_KEYS) else 1):
            if cells:
                yield line, dict(zip(head, cells, strict=False))
    elif text.lstrip().startswith("["):
        for line, row in enumerate(json.loads(text), start=1):
            yield line, row
    else:
        for line, row in enumerate(text.splitlines(), start=1):
            if row.strip():
                yield line, json.loads(row)


def _first(row: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) not in (None, "")), None)


def _question(row: Any, where: str) -> Question | str:
    """The question, or why the row is none."""
    if not isinstance(row, Mapping):
        raise ExamError(f"{where}: a row is an object with a question, options and an answer")
    text, options, answer = _first(row, QUESTION_KEYS), _options(row), _first(row, ANSWER_KEYS)
    if not isinstance(text, str) or len(options) < 2:
        raise ExamError(
            f"{where}: no question with options; it has {', '.join(map(str, row))}. Known are "
            f"{', '.join(QUESTION_KEYS)} with {', '.join(OPTION_KEYS)} or columns A, B, C, ..."
        )
    if answer is None:
        return "no answer is given"
    right = _right(answer, list(options))
    if right is None:
        letters = re.sub(r"[\s,、]", "", str(answer))
        if len(letters) > 1 and set(letters) <= set(options):
            return "several answers are right"
        raise ExamError(f"{where}: the answer {answer!r} is none of the options {', '.join(options)}")
    return Question(text.strip(), tuple(options.values()), right, where)


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    """Letter -> text."""
    found = _first(row, OPTION_KEYS)
    if isinstance(found, Mapping) and {"label", "text"} <= found.keys():  # ARC
        if isinstance(found["label"], list) and isinstance(found["text"], list):
            return dict(zip(map(str, found["label"]), map(str, found["text"]), strict=False))
        return {}
    if isinstance(found, Mapping):
        return {str(key): str(value).strip() for key, value in found.items() if value not in (None, "")}
    if isinstance(found, str):  # CMExam: a line each, its letter in front
        lines = [match for line in found.splitlines() if (match := _OPTION_LINE.match(line))]
        return {match[1]: match[2].strip() for match in lines}
    if isinstance(found, Sequence):
        values = [value.get("value", "") if isinstance(value, Mapping) else value for value in found]
        return dict(zip(LETTERS, map(str, values), strict=False))
    if "opa" in row:  # MedMCQA
        return {letter: str(row[name]) for letter in "ABCD" if (name := f"op{letter.lower()}") in row}
    return {letter: str(row[letter]).strip() for letter in LETTERS if row.get(letter) not in (None, "")}


def _right(answer: Any, letters: list[str]) -> int | None:
    """The index of the right option; numbers count from 0, as MMLU's and MedMCQA's do."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(letters) else None
    text = str(answer).strip()
    if text in letters:
        return letters.index(text)
    return int(text) if text.isdecimal() and len(text) < 3 and int(text) < len(letters) else None
