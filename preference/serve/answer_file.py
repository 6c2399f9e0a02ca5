"""A file of prompts, answered by the tuned model and, if asked, by its base."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from preference.errors import PreferenceError
from preference.serve.generation import Turn
from preference.serve.models import Models, note
from preference.templates.conversation import checked_history

_SURROGATE = re.compile("[\ud800-\udfff]")


class PromptsError(PreferenceError, ValueError):
    """A file of prompts that cannot be answered; the message names file and line."""


def read_prompts(path: str, flag: str = "--prompts") -> list[dict[str, Any]]:
    """Rows of a jsonl file, or {"question": line} for each line of a file that is not one."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"{flag} {path}: {error}") from None
    lines_of_json = any(line.lstrip().startswith("{") for line in lines)
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_row(f"{path}:{number}", line) if lines_of_json else {"question": line.strip()})
    if not rows:
        raise PromptsError(f"{flag} {path} holds no prompt")
    return rows


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptsError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("question", row.get("prompt")), str):
        raise PromptsError(f'{where}: a row needs "question" or "prompt", a text')
    if not isinstance(row.get("system") or "", str) or not isinstance(row.get("history") or [], list):
        raise PromptsError(f'{where}: "system" is a text and "history" a list of [user, assistant]')
    if _SURROGATE.search(line) or _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise PromptsError(f"{where}: it holds half of a surrogate pair, which is no character")
    return row


def to_turn(row: dict[str, Any]) -> Turn:
    """The conversation of a row, read as in training: an empty system means the template's default."""
    if "question" not in row:
        return Turn("", prompt=row["prompt"])
    history = tuple((user.strip(), assistant.strip()) for user, assistant in checked_history(row.get("history") or ()))
    return Turn(row["question"].strip(), history, row.get("system") or None)


def answer_file(models: Models, rows: list[dict[str, Any]], args: Namespace) -> None:
    """Each row with its "answer" (and "base_answer" with --both), in the order of the file."""

    turns = []
    for number, row in enumerate(rows, 1):
        try:
            turns.append(to_turn(row if "prompt" in row or not args.system else {"system": args.system, **row}))
            models.tuned.encode(turns[-1])
        except PreferenceError as error:
            raise PromptsError(f"--prompts {args.prompts}, prompt {number}: {error}") from None
    with open(args.output, "w", encoding="utf-8") if args.output else nullcontext(sys.stdout) as out:
        for done in _batches(models, rows, turns, args):
            _write(out, done)
    note(f"{len(rows)} prompts answered")


def _batches(models: Models, rows: list, turns: list[Turn], args: Namespace) -> Iterator[list[dict]]:
    for start in range(0, len(turns), args.batch_size):
        part = turns[start : start + args.batch_size]
        done = [dict(row) for row in rows[start : start + args.batch_size]]
        if args.both:
            base, within = models.base()
            for row, answer in zip(done, base.answers(part, args.seed + start, within), strict=True):
                row["base_answer"] = answer
        for row, answer in zip(done, models.tuned.answers(part, args.seed + start), strict=True):
            row["answer"] = answer
        yield done


def _write(out: TextIO, rows: list[dict]) -> None:
    out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    out.flush()
