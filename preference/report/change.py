"""What training changed in the judgement of single pairs: paired differences with 95% intervals."""

from __future__ import annotations

from typing import Any

import numpy as np

RESAMPLES, RESAMPLED = 1000, 5000  # above so many pairs a normal distribution does as well


def interval_of_mean(values_N: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% interval of a mean: from a bootstrap, or from the standard error where there are many values."""
    n = len(values_N)
    if n > RESAMPLED:
        half = 1.96 * float(values_N.std(ddof=1)) / n**0.5
        return float(values_N.mean()) - half, float(values_N.mean()) + half
    draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    low, high = np.percentile(values_N[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def paired_changes(
    before_N2: np.ndarray, after_N2: np.ndarray, lengths_N2: np.ndarray, per_token: bool = True
) -> dict[str, dict[str, Any]]:
    """Change of each metric over the same N pairs, its interval, and whether that leaves out 0. JSON-ready.

    Args:
        before_N2, after_N2: (chosen, rejected) sums of log-probabilities. lengths_N2: their tokens.
        per_token: whether the log-probabilities are shown per token, or per answer.
    """
    old, new = (np.asarray(sums, dtype=np.float64) / lengths_N2 for sums in (before_N2, after_N2))

    def judged(means_N2: np.ndarray) -> np.ndarray:
        return (np.sign(means_N2[:, 0] - means_N2[:, 1]) + 1) / 2  # a tie is half a pair

    def odds(means_N2: np.ndarray) -> np.ndarray:
        means_N2 = np.minimum(means_N2, -1e-12)
        return means_N2 - np.log(-np.expm1(means_N2))

    differences = {
        "preference/accuracies": judged(new) - judged(old),
        "preference/margins": (new[:, 0] - new[:, 1]) - (old[:, 0] - old[:, 1]),
        "log_odds_chosen": np.diff(odds(old))[:, 0] - np.diff(odds(new))[:, 0],
    }
    shown_N2 = new - old if per_token else np.asarray(after_N2, dtype=np.float64) - before_N2
    differences |= {"logps/chosen": shown_N2[:, 0], "logps/rejected": shown_N2[:, 1]}
    found = {}
    for name, values_N in differences.items():
        low, high = interval_of_mean(values_N)
        found[name] = {
            "change": float(values_N.mean()),
            "interval": [low, high],
            "significant": bool(low > 0 or high < 0),
        }
    return found
