"""Lengths of rows in tokens where nothing is trained: for the report of data/convert.py."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from preference.data.text_stats import length_bias, spread

if TYPE_CHECKING:
    from preference.data.row import Row

SIDES = ("prompt", "chosen", "rejected")
ROWS_PER_BATCH = 256


class TokenLengths:
    """Counts the tokens of rows as they pass. A prompt is its question, history and system text, without a template.

    `tokenizer` is a folder or hub id. Raises ValueError or OSError where there is none.
    """

    def __init__(self, tokenizer: str) -> None:
        from transformers import AutoTokenizer

        self.name = tokenizer
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.lengths = {side: array("L") for side in SIDES}
        self.waiting: list[Row] = []

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows themselves, counted on their way."""
        for row in rows:
            self.waiting.append(row)
            if len(self.waiting) == ROWS_PER_BATCH:
                self._count()
            yield row
        self._count()

    def _count(self) -> None:
        if not self.waiting:
            return
        texts = [_prompt(row) for row in self.waiting]
        texts += [row.chosen for row in self.waiting] + [row.rejected for row in self.waiting]
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        for i, side in enumerate(SIDES):
            start = i * len(self.waiting)
            self.lengths[side].extend(len(tokens) for tokens in ids[start : start + len(self.waiting)])
        self.waiting = []

    def to_dict(self) -> dict[str, Any]:
        """Quantiles of each side, and how far length in tokens tells chosen from rejected."""
        import numpy as np

        chosen, rejected = (np.asarray(self.lengths[side]) for side in ("chosen", "rejected"))
        longer, equal = int((chosen > rejected).sum()), int((chosen == rejected).sum())
        quantiles = {side: spread(self.lengths[side]) for side in SIDES}
        return {"tokenizer": self.name, **quantiles, "length_bias": length_bias(longer, equal, len(chosen))}


def _prompt(row: Row) -> str:
    turns = [text for turn in row.history for text in turn]
    return "\n".join([*filter(None, [row.system]), *turns, row.question if row.prompt is None else row.prompt])
