"""Training and evaluation rows from one set, with no question on both sides."""

from __future__ import annotations

import hashlib
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
    groups: dict[bytes, list[int]] = {}
    for i, question in enumerate(_questions(rows)):
        groups.setdefault(_draw(question, seed), []).append(i)
    wanted = max(1, round(len(rows) * percentage / 100))
    evaluation: list[int] = []
    for _, members in sorted(groups.items()):
        if len(evaluation) + len(members) <= wanted:
            evaluation += members
        if len(evaluation) == wanted:
            break
    if not evaluation and groups:  # every group is larger than the wanted part: the smallest is the nearest
        evaluation = min(groups.values(), key=len)
    if not evaluation or len(evaluation) == len(rows):
        raise DataError(
            f"{len(rows)} rows with {len(groups)} different questions cannot be split into training and evaluation "
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


def _draw(question: str, seed: int) -> bytes:
    """A number that stands for the question and for its place in the seed's order."""
    normal = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16, key=str(seed).encode()).digest()


def _select(rows: Sequence[Row] | Dataset, indices: list[int]) -> Any:
    return rows.select(indices) if hasattr(rows, "select") else [rows[i] for i in indices]
