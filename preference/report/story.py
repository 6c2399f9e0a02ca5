"""What happened in a run, in a sentence or two: what changed, how sure that is, what explains it, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from preference.report.hints import hints
from preference.report.run_folder import Run
from preference.terminal.language import tr

ACCURACY, NLL, LOSS = "preference/accuracies", "nll_loss", "loss"
STILL_FALLING = 0.02  # of the loss, from the third to the last quarter of the log
OVERFITTING, UNLEARNING = {"eval_rises", "gap"}, {"nll_rises", "both_fall_alone"}


def story(run: Run) -> str:
    """The sentences; "" where the run has no results before and after."""
    return " ".join(_sentences(run))


def _sentences(run: Run) -> Iterator[str]:
    results, prefix = run.get("all_results.json"), next(iter(run.sets), "eval")
    before, after = results.get(f"base_{prefix}_{ACCURACY}"), results.get(f"{prefix}_{ACCURACY}")
    if before is None or after is None:
        return
    change = run.get("changes.json").get(ACCURACY, {}) if prefix == "eval" else {}
    low, high = change.get("interval", (None, None))
    words = {"before": before, "after": after, "change": 100 * (after - before)}
    if low is None:
        yield tr("story_accuracy", **words)
    else:
        key = "story_same" if not change["significant"] else "story_rose" if after > before else "story_fell"
        yield tr(key, **words, low=100 * low, high=100 * high)
    if change.get("significant") and after > before:
        yield from _length(run)
    old, new = results.get(f"base_{prefix}_{NLL}"), results.get(f"{prefix}_{NLL}")
    if old is not None and new is not None:
        yield tr("story_nll_fell" if new < old else "story_nll_rose", before=old, after=new)
    yield _advice(run, worse=bool(change.get("significant")) and after < before)


def _length(run: Run) -> Iterator[str]:
    """Whether what was gained is left among answers of equal length."""
    models: dict[str, Any] = run.get("evaluation.json").get("all", {})
    if not {"base", "tuned"} <= models.keys():
        return
    base, tuned = models["base"], models["tuned"]
    gained = tuned["accuracy"] - base["accuracy"]
    left = tuned["length_controlled_accuracy"] - base["length_controlled_accuracy"]
    sure = tuned["interval"]["length_controlled_accuracy"][0] > base["length_controlled_accuracy"]
    if sure and left >= 0.5 * gained:
        yield tr("story_not_length", accuracy=tuned["length_controlled_accuracy"])
    else:
        yield tr("story_length", accuracy=tuned["length_controlled_accuracy"])


def _advice(run: Run, worse: bool) -> str:
    seen = {name for name, _ in hints(run.records, run.get("trainer_state.json").get("max_steps", 0))}
    losses = [value for _, value in run.points(LOSS)]
    quarter = len(losses) // 4
    if worse or seen & UNLEARNING:
        return tr("story_lower")
    if seen & OVERFITTING:
        return tr("story_overfits")
    if quarter >= 2:
        third, last = fmean(losses[-2 * quarter : -quarter]), fmean(losses[-quarter:])
        return tr("story_on" if last < third - STILL_FALLING * abs(third) else "story_stop")
    return tr("story_short")
