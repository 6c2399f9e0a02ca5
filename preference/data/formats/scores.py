"""Scores of a pair, and pairs out of ranked candidates."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

from preference.data.formats.base import Drop, Options, RowDict, number
from preference.data.formats.names import CANDIDATES, canonical, direction_of


@dataclass(frozen=True)
class ScoreColumns:
    """Columns that score the two sides: one each, a list of two, or the margin between them."""

    sides: tuple[str, str] | None = None
    rises: bool = True  # False: 1 is the best
    both: str = ""
    margin: str = ""


@lru_cache(maxsize=1024)
def score_columns(columns: tuple[str, ...]) -> ScoreColumns | None:
    """What scores the sides of rows with these columns: chosen_reward and rejected_reward, rating_list, margin."""
    named = canonical(columns)
    for key, column in named.items():
        for good, bad in (("chosen", "rejected"), ("preferred", "dispreferred"), ("better", "worse"), ("win", "lose")):
            tokens = key.split("_")
            if good in tokens and (other := named.get("_".join(bad if t == good else t for t in tokens))):
                direction = direction_of("_".join(token for token in tokens if token != good))
                if direction in ("up", "down"):
                    return ScoreColumns((column, other), direction == "up")
    both = next((named[key] for key in _LISTS if key in named), "")
    # beside candidates (responses, all_generated_responses) they are the scores of those, in their order
    if both and not any(key in CANDIDATES or key.rsplit("_", 1)[-1] in _PLURALS for key in named):
        return ScoreColumns(both=both)
    margin = next((named[key] for key in _MARGINS if key in named), "")
    return ScoreColumns(margin=margin) if margin else None


_LISTS = ("ratings", "rating_list", "scores", "score_list", "rewards", "reward_list", "rating", "score")
_PLURALS = frozenset(name for name in CANDIDATES if name.endswith("s"))
_MARGINS = ("margin", "score_margin", "reward_margin", "rating_margin", "score_gap", "score_diff", "reward_diff")


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
    """`check_gap` of what scores the two sides of the row; without any the row is kept, which is noted."""
    found = score_columns(tuple(row))
    scores = None if found is None else _scores_of(row, found)
    if scores is None:
        return {} if options.min_score_gap is None else {"kept_without_scores": True}
    return check_gap(*scores, options)


def _scores_of(row: RowDict, columns: ScoreColumns) -> tuple[float | None, float | None] | None:
    """(score of chosen, score of rejected); None where the columns hold nothing of the kind."""
    if columns.sides:
        chosen, rejected = (number(row.get(column)) for column in columns.sides)
        if columns.rises or chosen is None or rejected is None:
            return chosen, rejected
        return -chosen, -rejected
    if columns.both:
        value = row.get(columns.both)
        scores = [number(item) for item in value] if isinstance(value, (list, tuple)) and len(value) == 2 else []
        return (scores[0], scores[1]) if scores and None not in scores else None
    margin = number(row.get(columns.margin))
    return (margin, 0.0) if margin else None  # a margin of 0 is often one that nobody filled in


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
