"""Evaluation prompts that are nearly the same as one that is trained on, found with MinHash.

Exact repeats are told by `text_stats.shared_prompts`. Candidates come from locality-sensitive hashing (rensa) and are
then compared for real: two prompts are near-duplicates if 80% of their shingles, three neighbouring words or
characters of scripts without spaces, are the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from preference.data.report import DataReport
from preference.data.row import Row
from preference.data.text_stats import normalised, prompt_key

SIMILAR = 0.8  # Jaccard index of the shingles
PERMUTATIONS, BANDS = 128, 32  # an index of 0.8 shares no band of 4 once in 10^7: (1 - 0.8**4)**32
LOOKED_AT = 2000  # characters of a prompt
MOST_TRAINING_ROWS = 100_000  # compared, evenly drawn from more
_WORD = re.compile(r"[^\W\u2e80-\u9fff\uac00-\ud7af]+|[\u2e80-\u9fff\uac00-\ud7af]")  # a word, or one such character


def near_duplicates(train: Sequence[Row], evaluation: Sequence[Row], report: DataReport) -> list[tuple[Row, Row]]:
    """(evaluation row, training row) for each evaluation row with a near-duplicate; a section and a warning for it."""
    from rensa import RMinHash, RMinHashLSH

    if not train or not evaluation:
        return []

    def digest(shingles: list[str]) -> RMinHash:
        made = RMinHash(PERMUTATIONS, 42)
        made.update(shingles)
        return made

    known = {prompt_key(row) for row in train}
    index, asked = RMinHashLSH(SIMILAR, PERMUTATIONS, BANDS), 0
    for number, row in enumerate(evaluation):
        if prompt_key(row) not in known and (shingles := shingles_of(row)):
            index.insert(number, digest(shingles))
            asked += 1
    step = -(-len(train) // MOST_TRAINING_ROWS)
    found: dict[int, Row] = {}
    for row in train[::step]:
        shingles = shingles_of(row)
        if not shingles or len(found) == asked:
            continue
        for number in index.query(digest(shingles)):
            if number not in found and jaccard(set(shingles), set(shingles_of(evaluation[number]))) >= SIMILAR:
                found[number] = row
    pairs = [(evaluation[number], row) for number, row in sorted(found.items())]
    _say(pairs, len(train[::step]), report)
    return pairs


def shingles_of(row: Row) -> list[str]:
    """What is compared of a prompt: each three neighbouring words, or all of them where there are fewer."""
    words = _WORD.findall(normalised((row.question if row.prompt is None else row.prompt)[:LOOKED_AT]))
    if len(words) < 3:
        return [" ".join(words)] if words else []
    return [" ".join(three) for three in zip(words, words[1:], words[2:], strict=False)]


def jaccard(ours: set[str], theirs: set[str]) -> float:
    """The share of two sets' members that both have."""
    return len(ours & theirs) / len(ours | theirs)


def _say(pairs: list[tuple[Row, Row]], compared: int, report: DataReport) -> None:
    places = [f"{ours.file}:{ours.line} is like {theirs.file}:{theirs.line}" for ours, theirs in pairs[:100]]
    section = {"rows": len(pairs), "training_rows_compared": compared, "places": places}
    report.add_section("near_duplicates_in_train_and_eval", section)
    if pairs:
        report.warn(
            f"{len(pairs)} evaluation rows have a prompt that is nearly the same as one that is trained on, the first "
            f"{places[0]}: the evaluation figures flatter the model"
        )
