"""Message lists with a judge's scores beside them: UltraMix, capybara-dpo."""

from __future__ import annotations

from collections.abc import Iterator

from preference.data.formats.base import Format, Options, Pair, RowDict, take
from preference.data.formats.messages import pair_of_dialogues
from preference.data.formats.scores import gap_of
from preference.data.formats.trl import ANSWERS, pair_of_prompt


def ultramix(row: RowDict, options: Options) -> Iterator[Pair]:
    """The rewards are a second opinion on given labels: they drop a pair only under --min-score-gap."""
    chosen, rejected = take(row, "chosen", "rejected")
    extra = gap_of(row, "chosen_instruct_reward", "rejected_instruct_reward", options, labels=False)
    pair = pair_of_prompt(row.get("prompt"), chosen, rejected, row.get("system"), None, extra)
    pair.prompt = None
    yield pair


def capybara(row: RowDict, options: Options) -> Iterator[Pair]:
    """`prompt` holds the first turn alone in multi-turn rows, so the dialogue is read from chosen and rejected."""
    chosen, rejected = take(row, "chosen", "rejected")
    yield pair_of_dialogues(chosen, rejected, row.get("system"))


ULTRAMIX = Format(
    name="ultramix",
    what="UltraMix, annotated",
    needs=("chosen", "rejected", "chosen_instruct_reward|rejected_instruct_reward|task_category"),
    answers=ANSWERS,
    pairs=ultramix,
    scored=True,
)
CAPYBARA = Format(
    name="capybara",
    what="argilla/distilabel-capybara-dpo-7k-binarized",
    needs=("chosen", "rejected", "rating_chosen", "rating_rejected"),
    answers=ANSWERS,
    ignores=frozenset(
        {
            "prompt",
            "original_response",
            "generation_prompt",
            "raw_generation_responses",
            "new_generations",
            "conversation",
        }
    ),
    pairs=capybara,
)
