"""Short explanations at the places where users of preference tuning get lost. Pure functions of the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

ENTRIES = 8  # training log entries before a trend is spoken of


def hints(history: Sequence[Mapping[str, Any]], max_steps: int) -> Iterator[tuple[str, str]]:
    """(name, explanation) of every pattern that the log shows now. `history` is the Trainer's log_history."""
    train = [entry for entry in history if "loss" in entry]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    yield from _at_the_start(evaluations)
    if len(train) >= ENTRIES:
        yield from _trends(train, max_steps)
    yield from _held_out(train, evaluations)


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
        yield (
            "below_half",
            f"accuracy starts at {accuracy:.0%}, below chance (50%): the model finds the rejected answers likelier, as "
            "is usual where they are in more common words. Training is there to turn it round; watch the trend",
        )


def _trends(train: Sequence[Mapping[str, Any]], max_steps: int) -> Iterator[tuple[str, str]]:
    chosen, rejected = _ends(train, "logps/chosen"), _ends(train, "logps/rejected")
    margin, nll, accuracy = (_ends(train, name) for name in ("rewards/margins", "nll_loss", "preference/accuracies"))
    if chosen and rejected and margin and all(b < a - 0.02 * abs(a) for a, b in (chosen, rejected)):
        if margin[1] > margin[0]:
            yield (
                "both_fall",
                "chosen and rejected log-probabilities both fall: normal while the margin grows, as it does. The loss "
                "looks at the difference, and the two answers share words",
            )
        else:
            yield (
                "both_fall_alone",
                "chosen and rejected log-probabilities both fall and the margin does not grow: the model gets worse at "
                "both answers. Try a lower learning_rate",
            )
    if nll and nll[1] > nll[0] * 1.05:
        yield (
            "nll_rises",
            f"the NLL of the chosen answers rises ({nll[0]:.3g} to {nll[1]:.3g}): beta or learning_rate is too high, "
            "and the model unlearns to write the answers that it should prefer",
        )
    late = train[-1].get("step", 0) >= max(50, 0.3 * max_steps)
    if late and accuracy and 0.45 <= accuracy[1] <= 0.55 and accuracy[1] - accuracy[0] < 0.05:
        yield (
            "at_chance",
            f"accuracy is still {accuracy[1]:.0%}, chance level: learning_rate is too low, or the pairs differ "
            "in nothing that can be learned (noisy or swapped labels). Read some pairs; look at data_report.json",
        )


def _held_out(train: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> Iterator[tuple]:
    losses = [entry["eval_loss"] for entry in evaluations]
    if len(losses) >= 3 and losses[-1] > 1.03 * min(losses):
        best = min(evaluations, key=lambda entry: entry["eval_loss"])
        yield (
            "eval_rises",
            f"the evaluation loss is up from its best ({best['eval_loss']:.4g} at step {best['step']}): the model "
            "begins to overfit the training pairs. Fewer epochs, or the checkpoint of that step, serve better",
        )
    accuracy = _ends(train, "preference/accuracies")
    if len(train) >= ENTRIES and accuracy and evaluations and evaluations[-1]["step"]:
        unseen = evaluations[-1].get("eval_preference/accuracies", 1.0)
        if accuracy[1] - unseen > 0.2 and accuracy[1] > 0.8:
            yield (
                "gap",
                f"accuracy is {accuracy[1]:.0%} on the pairs being trained on and {unseen:.0%} on held-out ones: more "
                "or more varied data helps; more steps do not",
            )
