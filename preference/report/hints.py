"""Short explanations at the places where users of preference tuning get lost. Pure functions of the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from preference.terminal.language import tr

ENTRIES = 8  # training log entries before a trend is spoken of


def hints(history: Sequence[Mapping[str, Any]], max_steps: int, each_entry: bool = False) -> Iterator[tuple[str, str]]:
    """(name, explanation) of every pattern that the log shows now.

    Args:
        history: the Trainer's log_history.
        each_entry: asked anew with every entry, so that a jump of the loss need only be looked for in the last one.
    """
    train = [entry for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    yield from _at_the_start(evaluations)
    if len(train) >= ENTRIES:
        yield from _trends(train, max_steps)
        yield from _spike(train, len(train) - 1 if each_entry else ENTRIES)
    yield from _held_out(train, evaluations)


def _hint(name: str, **values: object) -> tuple[str, str]:
    return name, tr(f"hint_{name}", **values)


def _ends(entries: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float] | None:
    """Means over the first and the last quarter of the entries; None where one of them lacks the metric."""
    values = [entry[name] for entry in entries if entry.get(name) is not None]
    if not values or len(values) < len(entries):
        return None
    n = max(2, len(values) // 4)
    return fmean(values[:n]), fmean(values[-n:])


def _at_the_start(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    untrained = evaluations[0] if evaluations and evaluations[0].get("step") == 0 else {}
    accuracy = untrained.get("eval_preference/accuracies")
    if accuracy is not None and accuracy < 0.4:
        yield _hint("below_half", accuracy=accuracy)


def _trends(train: Sequence[Mapping[str, Any]], max_steps: int) -> Iterator[tuple[str, str]]:
    chosen, rejected = _ends(train, "logps/chosen"), _ends(train, "logps/rejected")
    margin, nll, accuracy = (_ends(train, name) for name in ("rewards/margins", "nll_loss", "preference/accuracies"))
    if chosen and rejected and margin and all(b < a - 0.02 * abs(a) for a, b in (chosen, rejected)):
        if margin[1] > margin[0]:
            yield _hint("both_fall")
        else:
            yield _hint("both_fall_alone")
    if nll and nll[1] > nll[0] * 1.05:
        yield _hint("nll_rises", first=nll[0], last=nll[1])
    late = train[-1].get("step", 0) >= max(50, 0.3 * max_steps)
    if late and accuracy and accuracy[1] < 0.45:
        yield _hint("below_chance", accuracy=accuracy[1])
    if late and accuracy and 0.45 <= accuracy[1] <= 0.55 and accuracy[1] - accuracy[0] < 0.05:
        yield _hint("at_chance", accuracy=accuracy[1])


def _spike(train: Sequence[Mapping[str, Any]], start: int) -> Iterator[tuple[str, str]]:
    """A loss far above those before it: by six times the usual distance from their median, and by a quarter of it."""
    losses = [entry["loss"] for entry in train]
    for at in range(max(ENTRIES, start), len(train)):
        before = losses[max(0, at - 4 * ENTRIES) : at]
        usual = median(before)
        distance = median(abs(loss - usual) for loss in before)
        if losses[at] - usual > max(6 * distance, 0.25 * abs(usual)):
            yield _hint("spike", loss=losses[at], step=train[at].get("step", 0), usual=usual)
            return


def _held_out(train: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Iterator[tuple]:
    losses = [entry["eval_loss"] for entry in evaluations]
    if len(losses) >= 3 and losses[-1] > 1.03 * min(losses):
        best = min(evaluations, key=lambda entry: entry["eval_loss"])
        yield _hint("eval_rises", best=best["eval_loss"], step=best["step"])
    accuracy = _ends(train, "preference/accuracies")
    if len(train) >= ENTRIES and accuracy and evaluations and evaluations[-1]["step"]:
        unseen = evaluations[-1].get("eval_preference/accuracies", 1.0)
        if accuracy[1] - unseen > 0.2 and accuracy[1] > 0.8:
            yield _hint("gap", seen=accuracy[1], unseen=unseen)
