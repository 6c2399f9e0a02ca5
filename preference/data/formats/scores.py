"""Scores of a pair, and pairs out of ranked candidates."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from preference.data.formats.base import Drop, Options, RowDict, number

# What datasets call the scores of chosen and rejected
SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"), ("chosen-rating", "rejected-rating"),
    ("chosen_avg_rating", "rejected_avg_rating"),
)  # fmt: skip


def check_gap(chosen: float | None, rejected: float | None, options: Options, *, labels: bool = True) -> dict[str, Any]:
    """Whether the scores keep the pair; what they are, for Pair.extra.

    Raises Drop: with no threshold, 'tie' and 'negative_gap' where the scores made the label (`labels`); with one,
    'score_gap' below it, and 'no_score' where a score is missing.
    """
    if chosen is None or rejected is None:
        if options.min_score_gap is not None:
            raise Drop("no_score", "a score is missing, so there is no gap to compare")
        return {}
    gap = chosen - rejected
    if options.min_score_gap is not None:
        if gap < options.min_score_gap:
            raise Drop("score_gap", f"{chosen:g} - {rejected:g} = {gap:g}, less than {options.min_score_gap:g}")
    elif labels and gap == 0:
        raise Drop("tie", f"both answers have score {chosen:g}")
    elif labels and gap < 0:
        raise Drop("negative_gap", f"chosen has score {chosen:g}, rejected {rejected:g}")
    return {"score_chosen": chosen, "score_rejected": rejected}


def gap_of(row: RowDict, chosen: str, rejected: str, options: Options, *, labels: bool = True) -> dict[str, Any]:
    """`check_gap` of the columns `chosen` and `rejected`."""
    return check_gap(number(row.get(chosen)), number(row.get(rejected)), options, labels=labels)


def gap_of_any(row: RowDict, options: Options) -> dict[str, Any]:
    """`check_gap` of the first pair of score columns that the row has; without any the row is kept, which is noted."""
    named = next((pair for pair in SCORES if all(name in row for name in pair)), None)
    if named is None:
        return {} if options.min_score_gap is None else {"kept_without_scores": True}
    return gap_of(row, *named, options)


def pick(candidates: list[tuple[str, float]], options: Options, key: str) -> Iterator[tuple[str, str, dict] | Drop]:
    """(chosen, rejected, extra) out of (text, score) candidates, as `options.pairs` says; a Drop for a pair that fails.

    `key` (the question) and `options.seed` make best-random the same in every run and every order of rows.
    """
    if len(candidates) < 2:
        raise Drop("too_few_candidates", f"{len(candidates)} rated answer(s)")
    ranked = sorted(candidates, key=lambda candidate: -candidate[1])
    if options.pairs == "all":
        chosen_pairs = list(combinations(ranked, 2))
    elif options.pairs == "best-random":
        others = [candidate for candidate in ranked[1:] if candidate[1] < ranked[0][1]] or ranked[1:]
        chosen_pairs = [(ranked[0], random.Random(f"{options.seed}:{key}").choice(others))]
    else:
        chosen_pairs = [(ranked[0], ranked[-1])]
    for (better, high), (worse, low) in chosen_pairs:
        try:
            yield better, worse, check_gap(high, low, options)
        except Drop as drop:
            yield drop
