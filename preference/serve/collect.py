"""From a talk to the next training set: judged answers as rows that training reads.

Two folders, because they train differently: `pairs/` holds triples (any loss), `labels/` single answers that were
called good or bad (loss=kto). A good and a bad answer to the same question become a triple too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from preference.errors import PreferenceError
from preference.serve.generation import Turn

PAIRS, LABELS = Path("pairs", "chat.jsonl"), Path("labels", "chat.jsonl")


class CollectError(PreferenceError, ValueError):
    """A judgement that cannot be used as training data; str() says what to do instead."""


def append_line(path: Path, row: dict[str, Any]) -> None:
    """One row at the end of a jsonl file, in one write and on the disk; a line that a crash has cut is closed first.

    Raises:
        CollectError: it cannot be written.
    """
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CollectError(f"{path} cannot be written ({error.strerror}): --collect names another folder") from None


class Collector:
    """Writes what is judged below `folder`. A row is written once, and an answer has one label."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.labels: dict[str, dict[str, bool]] = {}  # conversation up to the question -> answer -> whether it is good
        self.written: set[str] = set()

    def label(self, turn: Turn, answer: str, good: bool, cut: bool = False) -> str:
        """Call an answer good or bad; returns what was written, for the user.

        Raises:
            CollectError: the answer is empty, was called otherwise before, or is to be learned though it was cut.
        """
        asked = _row(turn)
        _check(turn, answer, cut and good)
        known = self.labels.setdefault(json.dumps(asked), {})
        if answer in known:
            if known[answer] == good:
                return "it is called so already: nothing written"
            called = "good" if known[answer] else "bad"
            raise CollectError(f"this answer was called {called} before: take its line out of {self.folder} first")
        append_line(self.folder / LABELS, asked | {"response": answer, "label": good})
        known[answer] = good
        said = f"written to {self.folder / LABELS} (for loss=kto)"
        others = [text for text, other in known.items() if other != good]
        for other in others:
            chosen, rejected = (answer, other) if good else (other, answer)
            self._write(asked, chosen, rejected)
        return said + (f"; with its counterpart {len(others)} to {self.folder / PAIRS}" if others else "")

    def better(self, turn: Turn, chosen: str, rejected: str, cut: bool = False) -> str:
        """Call one answer better than another; returns what was written. `cut`: of the better one.

        Raises:
            CollectError: one is empty, both are the same, or the better one was cut.
        """
        _check(turn, chosen, cut)
        _check(turn, rejected, False)
        if chosen == rejected:
            raise CollectError("the two answers are the same: /regen draws another one")
        new = self._write(_row(turn), chosen, rejected)
        return f"written to {self.folder / PAIRS}" if new else "it was written before: nothing written"

    def _write(self, asked: dict[str, Any], chosen: str, rejected: str) -> bool:
        row = asked | {"response_chosen": chosen, "response_rejected": rejected}
        if (key := json.dumps(row)) in self.written:
            return False
        append_line(self.folder / PAIRS, row)
        self.written.add(key)
        return True


def _row(turn: Turn) -> dict[str, Any]:
    return {"system": turn.system or "", "history": [list(pair) for pair in turn.history], "question": turn.question}


def _check(turn: Turn, answer: str, cut: bool) -> None:
    if "\0" in answer or any("\0" in text for pair in turn.history for text in pair):
        raise CollectError("a NUL character is in it, and no reader of data takes such a row: /reset or /regen")
    if not answer:
        raise CollectError("an empty answer teaches nothing: /regen draws another one")
    if cut:
        raise CollectError(
            "this answer was cut, and training would teach to stop there: raise --max_new_tokens, or /regen"
        )
