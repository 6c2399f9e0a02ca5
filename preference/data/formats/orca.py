"""Intel/orca_dpo_pairs and argilla's re-judged set; also any plain question + chosen + rejected, as KoMeP's."""

from __future__ import annotations

from collections.abc import Iterator

from preference.data.formats.base import Drop, Format, Options, Pair, RowDict, number, take
from preference.data.formats.scores import check_gap
from preference.data.formats.trl import pair_of_prompt, take_question


def orca(row: RowDict, options: Options) -> Iterator[Pair]:
    """The first revision named the answers after their models."""
    question, chosen, rejected = take_question(row, "question", "chosen|chatgpt", "rejected|llama2-13b-chat")
    pair = pair_of_prompt(question, chosen, rejected, row.get("system"), row.get("history"))
    pair.prompt = None
    yield pair


def rejudged(row: RowDict, options: Options) -> Iterator[Pair]:
    """`status` says what the second judge found: unchanged, swapped (chosen and rejected are so already) or tie."""
    question, chosen, rejected, status = take(row, "input", "chosen", "rejected", "status")
    if status == "tie":
        raise Drop("tie", "the second judge found neither better")
    if status not in ("unchanged", "swapped"):
        raise Drop("wrong_label", f"status must be unchanged, swapped or tie, not {str(status)[:40]!r}")
    extra = {}
    if options.min_score_gap is not None:
        ratings = row.get("rating")
        paired = ratings if isinstance(ratings, (list, tuple)) and len(ratings) == 2 else ()
        scores = [score for score in map(number, paired) if score is not None]
        low, high = sorted(scores) if len(scores) == 2 else (None, None)
        extra = check_gap(high, low, options)
    yield Pair(question, chosen, rejected, row.get("system"), extra=extra)


ORCA = Format(
    name="orca",
    what="question (+ system) + chosen + rejected (orca_dpo_pairs, KoMeP-like)",
    needs=("question", "chosen|chatgpt", "rejected|llama2-13b-chat"),
    answers=frozenset({"chosen", "rejected", "chatgpt", "llama2-13b-chat"}),
    pairs=orca,
)
ORCA_REJUDGED = Format(
    name="orca-rejudged",
    what="argilla/distilabel-intel-orca-dpo-pairs",
    needs=("input", "chosen", "rejected", "status"),
    answers=frozenset({"chosen", "rejected"}),
    ignores=frozenset(
        {
            "generations",
            "order",
            "labelling_prompt",
            "raw_labelling_response",
            "original_chosen",
            "original_rejected",
            "in_gsm8k_train",
        }
    ),
    pairs=rejudged,
    scored=True,
)
