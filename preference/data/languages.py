"""Which languages rows are in, told by py3langid from a sample of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from preference.data.report import DataReport
from preference.data.row import Row

FEWEST = (
    500  # rows from which languages are told: loading the model (2 s, 120 MB) takes longer than reading a small file
)
SAMPLE = 400
CHARACTERS = 200  # of question and answer each


def add_languages(rows: Sequence[Row], report: DataReport) -> None:
    """Puts {language (ISO 639-1): share of a sample} into the report; those below one in a hundred are "other"."""
    if len(rows) < FEWEST:
        return
    import py3langid

    drawn = random.Random(0).sample(range(len(rows)), SAMPLE)
    counts = Counter(py3langid.classify(_text(rows[i]))[0] for i in drawn)
    told = {name: count for name, count in counts.most_common() if count * 100 >= SAMPLE}
    if rest := SAMPLE - sum(told.values()):
        told["other"] = rest
    report.add_section("languages", {name: round(count / SAMPLE, 3) for name, count in told.items()})


def _text(row: Row) -> str:
    question = row.question if row.prompt is None else row.prompt
    return f"{question[:CHARACTERS]}\n{row.chosen[:CHARACTERS]}"
