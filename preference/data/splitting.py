"""Training and evaluation rows from one set, with no question on both sides."""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from preference.data.report import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from preference.data.row import Row


def split_by_prompt(rows: Sequence[Row] | Dataset, percentage: float, seed: int) -> tuple[Any, Any]:
    """(training part, evaluation part) of rows or of a dataset with a `prompt` column, each in the given order.

    Rows with the same question (up to case, width and white space) stay together, whatever their system text and
    history; of a dataset, whose questions are rendered already, rows with the same prompt do. The evaluation part gets
    `percentage` percent of the rows, as near as whole groups allow. In which order questions are drawn depends on the
    seed and the question alone, not on the order of the rows, nor on the machine.

    Raises DataError where one of the sides would be empty, ValueError for a percentage outside (0, 100).
    """
    if not 0 < percentage < 100:
        raise ValueError(f"percentage must lie between 0 and 100, got {percentage}")
    order, bounds = _groups(rows, seed)
    wanted = max(1, round(len(rows) * percentage / 100))
    evaluation: list[int] = []
    for start, end in itertools.pairwise(bounds):
        if len(evaluation) + end - start <= wanted:
            evaluation += order[start:end]
        if len(evaluation) == wanted:
            break
    if not evaluation and order:  # every group is larger than the wanted part: the smallest is the nearest
        evaluation = min((order[start:end] for start, end in itertools.pairwise(bounds)), key=lambda g: (len(g), g[0]))
    if not evaluation or len(evaluation) == len(rows):
        raise DataError(
            f"{len(rows)} rows with {len(bounds) - 1} different questions cannot be split into training and evaluation "
            f"({percentage}%) without a question on both sides; give a validation_file_dir",
            reason="cannot_split",
        )
    in_evaluation = set(evaluation)
    training = [i for i in range(len(rows)) if i not in in_evaluation]
    return _select(rows, training), _select(rows, sorted(evaluation))


def _questions(rows: Any) -> Any:
    if hasattr(rows, "column_names"):
        return (text for batch in rows.select_columns("prompt").iter(10_000) for text in batch["prompt"])
    return (row.question if row.prompt is None else row.prompt for row in rows)


def _groups(rows: Any, seed: int) -> tuple[list[int], list[int]]:
    """The places of the rows, those with the same question side by side and in order; and where each question begins.

    Questions come in the order that the seed draws. The last bound is the number of rows.
    """
    import numpy as np  # here, so that reading rows needs no numpy

    drawn = b"".join(_draw(question, seed) for question in _questions(rows))
    halves = np.frombuffer(drawn, ">u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # by the first half, then by the second, then as given
    same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    bounds = [0, *(np.flatnonzero(~same) + 1).tolist(), len(order)] if len(order) else [0]
    return order.tolist(), bounds


def _draw(question: str, seed: int) -> bytes:
    """A number that stands for the question and for its place in the seed's order."""
    normal = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16, key=str(seed).encode()).digest()


def _select(rows: Sequence[Row] | Dataset, indices: list[int]) -> Any:
    select = getattr(rows, "select", None) or getattr(rows, "take", None)
    return select(indices) if select else [rows[i] for i in indices]
