"""UltraFeedback in its shapes: raw (four rated completions), binarized (HuggingFaceH4), cleaned (argilla)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from preference.data.formats.base import RANKED, Drop, Format, Options, Pair, RowDict, number, take
from preference.data.formats.scores import pick
from preference.data.formats.trl import ANSWERS, pair_of_prompt

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def raw(row: RowDict, options: Options) -> Iterator[Pair | Drop]:
    """Ranked by the mean of the four ratings: `overall_score` is wrong in thousands of rows of the first release.

    A completion that lacks its text or one of the four is left out, and noted. `custom_system_prompt` differs by
    completion: it is no system.
    """
    question, completions = take(row, "instruction", "completions")
    if not isinstance(completions, (list, tuple)):
        raise Drop("wrong_type", "completions must be a list")
    rated = [pair for pair in map(_rated, completions) if pair is not None]
    incomplete = {"incomplete_candidates": True} if len(rated) < len(completions) else {}
    for picked in pick(rated, options, str(question)):
        yield picked if isinstance(picked, Drop) else Pair(question, *picked[:2], extra=picked[2] | incomplete)


def _rated(completion: Any) -> tuple[str, float] | None:
    if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
        return None
    annotations = completion.get("annotations")
    aspects = [annotations.get(aspect) if isinstance(annotations, dict) else None for aspect in ASPECTS]
    rated = [number(aspect.get("Rating")) if isinstance(aspect, dict) else None for aspect in aspects]
    ratings = [rating for rating in rated if rating is not None]
    return None if len(ratings) < len(rated) else (completion["response"], sum(ratings) / len(ratings))


def dialogues(row: RowDict, options: Options) -> Iterator[Pair]:
    chosen, rejected = take(row, "chosen", "rejected")
    prompt = row.get("prompt", row.get("instruction"))
    pair = pair_of_prompt(prompt, chosen, rejected, row.get("system"))
    pair.prompt = None
    yield pair


def predecessor(row: RowDict, options: Options) -> Iterator[Pair]:
    question, chosen, rejected = take(row, "instruction|prompt|question", "chosen_response", "rejected_response")
    yield Pair(question, chosen, rejected, row.get("system"))


RAW = Format(
    name="ultrafeedback",
    what="UltraFeedback, raw: completions ranked by the mean of their four ratings",
    needs=("instruction", "completions"),
    also=lambda row: isinstance(row["completions"], (list, tuple)),
    answers=frozenset({"completions"}),
    ignores=frozenset({"correct_answers", "incorrect_answers"}),
    pairs=raw,
    scored=True,
    uses=RANKED,
)
BINARIZED = Format(
    name="ultrafeedback-binarized",
    what="HuggingFaceH4/ultrafeedback_binarized (use the splits train_prefs and test_prefs)",
    needs=("chosen", "rejected", "score_chosen", "score_rejected", "prompt_id|messages"),
    answers=ANSWERS,
    reads=lambda row: ("prompt", "instruction"),
    ignores=frozenset({"messages"}),
    pairs=dialogues,
)
CLEANED = Format(
    name="ultrafeedback-argilla",
    what="argilla/ultrafeedback-binarized-preferences-cleaned",
    needs=("chosen", "rejected", "chosen-rating", "rejected-rating"),
    answers=ANSWERS,
    reads=lambda row: ("prompt", "instruction"),
    ignores=frozenset({"messages"}),
    pairs=dialogues,
    warnings=("rows come grouped by source: shuffle before a split by position",),
)
ARGILLA_STRINGS = Format(
    name="argilla-strings",
    what="{instruction, chosen_response, rejected_response} (argilla's first binarization, axolotl chatml.argilla)",
    needs=("instruction|prompt|question", "chosen_response", "rejected_response"),
    answers=frozenset({"chosen_response", "rejected_response"}),
    pairs=predecessor,
)
