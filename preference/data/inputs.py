"""What `train_file_dir` and its kin name: files, folders and hub ids, each with a cap or a share of its rows.

    data/a.jsonl:5000,data/b/:0.3,hub:owner/name

5000 rows of the file at most, 30% of the folder's rows, all rows of the hub dataset. Evaluation files may make several
sets, each with a name: `med=data/a.jsonl,data/b,general=data/c`.
"""

from __future__ import annotations

import math
import random
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preference.data.kept_rows import KeptRows
from preference.data.report import DataReport

NAMED = re.compile(r"\s*([^\W\d]\w*)=(.*)", re.DOTALL)
TAKEN = ("nll", "preference", "rewards", "logps", "logits")  # metrics of these names would read as those of one set


@dataclass(frozen=True)
class Input:
    """A path, and how many of its rows are wanted: all, at most `cap`, or a `share` of them (above 0, below 1)."""

    path: str
    cap: int | None = None
    share: float | None = None

    def wanted(self, rows: int) -> int:
        """How many of `rows` rows are taken."""
        if self.share is not None:
            return max(1, round(self.share * rows)) if rows else 0
        return rows if self.cap is None else min(self.cap, rows)


def parse_inputs(text: str) -> list[Input]:
    """The inputs of a text. A path that exists is taken whole, whatever commas and colons it holds.

    Raises ValueError for a cap or share that means nothing, and for an empty text.
    """
    if text.strip() and Path(text).exists():
        return [Input(text)]
    inputs = [_parse_input(part.strip()) for part in text.split(",") if part.strip()]
    if not inputs:
        raise ValueError("no file or folder is named")
    paths = [one.path for one in inputs]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise ValueError(f"{twice} is named twice")
    return inputs


def parse_sets(text: str) -> dict[str, str]:
    """The inputs of each named set; one set without a name, "", where none is named. A path that exists is no name.

    Raises ValueError for a name that cannot be one, or is there twice, and for inputs that mean nothing.
    """
    if Path(text).exists():
        return {"": text}
    sets: dict[str, list[str]] = {}
    name = ""
    for part in text.split(","):
        named = None if Path(part.strip()).exists() else NAMED.fullmatch(part)
        if named:
            name, part = named[1], named[2]
            if name in sets:
                raise ValueError(f"two sets are called {name}")
            if name in TAKEN or name.endswith("_text"):
                raise ValueError(f"a set cannot be called {name}: its metrics would be taken for others")
        sets.setdefault(name, []).append(part)
    if "" in sets and len(sets) > 1:
        raise ValueError(f"{sets[''][0]} stands before the first name: write NAME={sets[''][0]}")
    joined = {name: ",".join(parts) for name, parts in sets.items()}
    for name, inputs in joined.items():
        try:
            parse_inputs(inputs)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from None
    return joined


def _parse_input(part: str) -> Input:
    path, colon, amount = part.rpartition(":")
    if not colon or Path(part).exists() or not path:
        return Input(part)
    try:
        number = float(amount)
    except ValueError:
        return Input(part)  # hub:owner/name:config, C:\data
    if amount.strip().isdigit() and number >= 1:
        return Input(path, cap=int(amount))
    if math.isfinite(number) and 0 < number < 1:
        return Input(path, share=number)
    if number == 1:
        return Input(path)
    raise ValueError(f"{part}: behind the colon stands a number of rows (5000) or a share of them (0.3), not {amount}")


def take_wanted(
    rows: KeptRows, inputs: Sequence[tuple[Input, Sequence[str]]], seed: int, report: DataReport
) -> KeptRows:
    """The rows that the inputs ask for, in their order; drawn from each with the seed: every process draws the same.

    `inputs`: each with the sources that were read for it. Rows that are not drawn are dropped as not_sampled.
    """
    if all(one.cap is None and one.share is None for one, _ in inputs):
        return rows
    number_of = {source: number for number, (_, sources) in enumerate(inputs) for source in sources}
    at = [array("Q") for _ in inputs]
    for i, row in enumerate(rows):
        at[number_of[row.file]].append(i)
    taken: set[int] = set()
    for number, (one, _) in enumerate(inputs):
        wanted = one.wanted(len(at[number]))
        if one.cap is not None and wanted < one.cap:
            report.warn(f"{one.path}: {one.cap} rows are asked for, and it has {wanted}")
        taken.update(random.Random(f"{seed} {number}").sample(at[number], wanted))
    return keep(rows, taken, report)


def keep(rows: KeptRows, taken: set[int], report: DataReport) -> KeptRows:
    """The rows at the places `taken`; the others are dropped as not_sampled."""
    for i, row in enumerate(rows):
        if i not in taken:
            report.drop("not_sampled", row.file, row.line)
    return rows.take(sorted(taken))
