"""Two answers side by side and a label: SHP, PKU-SafeRLHF, chatbot arenas, and plain response_1 / response_2."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from preference.data.formats.base import Ask, Drop, Format, Options, Pair, RowDict, flag, index, number, take
from preference.data.formats.messages import Turn, is_messages, pair_of_context, pair_of_dialogues

# ------------------------------------------------------------------------------------------------------ SHP


def shp(row: RowDict, options: Options) -> Iterator[Pair]:
    """`history` is the post, so the question; labels 1 prefers A. The gap is score_ratio, which is at least 1."""
    post, first, second, label = take(row, "history", "human_ref_A", "human_ref_B", "labels")
    chosen, rejected = (first, second) if index(label, 2) == 1 else (second, first)
    ratio = number(row.get("score_ratio"))
    if options.min_score_gap is not None and (ratio is None or ratio < options.min_score_gap):
        raise Drop("no_score" if ratio is None else "score_gap", f"score_ratio is {ratio}")
    yield Pair(post, chosen, rejected, extra={} if ratio is None else {"score_ratio": ratio})


SHP = Format(
    name="shp",
    what="SHP / SHP-2: Reddit posts with two comments",
    needs=("human_ref_A", "human_ref_B", "labels", "history"),
    answers=frozenset({"human_ref_A", "human_ref_B"}),
    pairs=shp,
    sure=True,
    scored=True,
    warnings=(
        "the card of SHP advises score_ratio >= 2 and at most five pairs a post: --min-score-gap 2 --max-per-prompt 5",
    ),
)

# ----------------------------------------------------------------------------------------------- PKU-SafeRLHF

_AXES = {"better": "better_response_id", "safer": "safer_response_id"}


def pku(row: RowDict, options: Options) -> Iterator[Pair]:
    axis = options.axis or next((name for name, key in _AXES.items() if row.get(key) is not None), "better")
    first, second, label = take(row, "response_0", "response_1", _AXES[axis])
    (prompt,) = take(row, "prompt")
    best = index(label, 2)
    safe = [flag(row.get(f"is_response_{i}_safe")) for i in (best, 1 - best)]
    extra = {name: True for name, unsafe in (("both_unsafe", safe == [False, False]), ("chosen_unsafe", not safe[0]))
             if unsafe and None not in safe}  # fmt: skip
    yield Pair(prompt, (first, second)[best], (first, second)[1 - best], extra=extra)


def ask_axis(format: Format, rows: Iterable[RowDict], options: Options) -> Format:
    """The format itself. Raises Ask, with what hangs on it, where it is not settled which of two labels decides."""
    if options.axis:
        return format
    both = differ = 0
    for row in rows:
        labels = [row.get(key) for key in _AXES.values()]
        if None not in labels:
            both += 1
            differ += str(labels[0]) != str(labels[1])
    if not both:
        return format
    raise Ask(
        "the rows carry two labels, more helpful (better_response_id) and safer (safer_response_id), which disagree in "
        f"{differ} of {both} rows: say which one decides, --axis better or --axis safer"
    )


PKU = Format(
    name="pku-saferlhf",
    what="PKU-SafeRLHF v0, v1, single-dimension",
    needs=("prompt", "response_0", "response_1", "better_response_id|safer_response_id"),
    answers=frozenset({"response_0", "response_1"}),
    pairs=pku,
    sure=True,
    uses=frozenset({"axis"}),
    bind=ask_axis,
    warnings=(
        "in many rows both answers are unsafe (counted as both_unsafe): ORPO would train on the chosen one as a model "
        "answer; the licence is CC-BY-NC-4.0",
    ),
)

# ------------------------------------------------------------------------------------------------------ arenas

WINNER = "winner|winner_model_a|winner_tie"


def arena(row: RowDict, options: Options) -> Iterator[Pair]:
    """Several rounds are kept only if both models said the same up to the last."""
    prompt, first, second = (_rounds(text) for text in take(row, "prompt", "response_a", "response_b", WINNER)[:3])
    first_won = _first_won(row)
    if not len(prompt) == len(first) == len(second):
        raise Drop("irregular_turns", f"{len(prompt)} questions, {len(first)} and {len(second)} answers")
    if first[:-1] != second[:-1]:
        raise Drop("different_prompts", "the two dialogues part before the last answer")
    turns = [turn for pair in zip(prompt, first, strict=True) for turn in _round(*pair)][:-1]
    best, worst = (first[-1:], second[-1:]) if first_won else (second[-1:], first[-1:])
    yield pair_of_context(turns, *(best or [""]), *(worst or [""]))


def _first_won(row: RowDict) -> bool:
    """Whether A won: by one column with the winner's name, or one column for each outcome. Raises Drop for a tie."""
    winner = row.get("winner")
    won = [flag(row.get(f"winner_model_{side}")) for side in "ab"]
    if winner is not None:
        won = [winner == f"model_{side}" for side in "ab"]
    if flag(row.get("winner_tie")) or str(winner).startswith(("tie", "both")):
        raise Drop("tie", "the judge called it a tie")
    if won.count(True) != 1:
        told = "winner_model_a, winner_model_b or winner_tie must be 1, or winner must be model_a, model_b or tie"
        raise Drop("wrong_label", told + ("" if winner is None else f", not {str(winner)[:40]!r}"))
    return bool(won[0])


def _round(question: str, answer: str) -> list[Turn]:
    return [Turn("user", question), Turn("assistant", answer)]


def _rounds(text: Any) -> list[str]:
    """The texts of all rounds: a JSON list, also one inside a CSV cell."""
    if isinstance(text, str):
        try:
            value = json.loads(text) if text.startswith("[") else [text]
        except (ValueError, RecursionError):
            value = [text]
    else:
        value = text
    if not isinstance(value, list):
        raise Drop("wrong_type", "prompt and responses must be text or a JSON list of texts")
    if not all(isinstance(item, str) for item in value):
        raise Drop("empty_answer" if None in value else "wrong_type", "a round that is not text")
    return value


def arena_conversations(row: RowDict, options: Options) -> Iterator[Pair]:
    first, second, _ = take(row, "conversation_a", "conversation_b", WINNER)
    yield pair_of_dialogues(first, second) if _first_won(row) else pair_of_dialogues(second, first)


ARENA = Format(
    name="arena",
    what="LMSYS arena: response_a, response_b and winner, or one column for each outcome",
    needs=("prompt", "response_a", "response_b", WINNER),
    answers=frozenset({"response_a", "response_b"}),
    pairs=arena,
)
ARENA_CONVERSATIONS = Format(
    name="arena-conversations",
    what="LMSYS arena: conversation_a, conversation_b, winner",
    needs=("conversation_a", "conversation_b", WINNER),
    also=lambda row: is_messages(row["conversation_a"]),
    answers=frozenset({"conversation_a", "conversation_b"}),
    pairs=arena_conversations,
)

# ---------------------------------------------------------------------------------------- response_1, response_2


def first_or_second(row: RowDict, options: Options) -> Iterator[Pair]:
    prompt, first, second, label = take(row, "prompt|question", "response_1", "response_2", "label")
    found = number(label)
    if found not in (0, 1, 2):
        raise Drop("wrong_label", f"label must be 1 (first is better), 0 or 2 (second), not {str(label)[:40]!r}")
    yield Pair(prompt, first, second) if found == 1 else Pair(prompt, second, first)


def two_labels(format: Format, rows: Iterable[RowDict], options: Options) -> Format:
    if {number(row.get("label")) for row in rows} >= {0, 1, 2}:
        raise Ask("the labels 0, 1 and 2 fit two conventions: say which, for example --labels 0=first,1=second,2=tie")
    return format


FIRST_OR_SECOND = Format(
    name="pairwise-label",
    what="response_1, response_2 and a label: 1 says that the first is better, 0 or 2 the second",
    needs=("prompt|question", "response_1", "response_2", "label"),
    answers=frozenset({"response_1", "response_2"}),
    pairs=first_or_second,
    detected=False,
    bind=two_labels,
)
