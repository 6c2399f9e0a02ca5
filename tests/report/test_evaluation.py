"""Figures over evaluation pairs: against hand-worked cases and against what they claim to measure."""

from __future__ import annotations

import numpy as np
import pytest

from preference.report.evaluation import analyse, mean_margins, summarise, table, wilson, without_length, worst_pairs


def test_margin_is_a_difference_of_token_means():
    sums, lengths = np.array([[-6.0, -4.0], [-1.0, -9.0]]), np.array([[3, 2], [1, 3]])
    assert mean_margins(sums, lengths).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    "right, pairs, low, high", [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)]
)
def test_wilson_interval(right, pairs, low, high):
    assert wilson(right, pairs) == pytest.approx((low, high), abs=1e-4)


def test_length_alone_explains_nothing_at_equal_length():
    """A model that only likes long answers is right where the chosen one is longer, and at chance without length."""
    rng = np.random.default_rng(0)
    longer = rng.normal(30, 20, 2000)  # chosen is mostly longer
    only_length = 0.05 * longer + rng.normal(0, 0.01, 2000)
    knows = 0.05 * longer + 1.0 + rng.normal(0, 0.01, 2000)
    assert summarise(only_length, longer)["accuracy"] > 0.9
    assert summarise(only_length, longer)["length_controlled_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert summarise(knows, longer)["length_controlled_accuracy"] == 1.0


def test_equal_lengths_leave_margins_alone():
    margins = np.array([1.0, -2.0, 3.0])
    assert without_length(margins, np.full(3, 7.0)).tolist() == margins.tolist()


def test_intervals_hold_the_figure_and_shrink_with_more_pairs():
    rng = np.random.default_rng(1)
    widths = []
    for pairs in (40, 4000):
        figures = summarise(rng.normal(0.3, 1, pairs), rng.normal(0, 5, pairs))
        for name in ("accuracy", "margin", "length_controlled_accuracy"):
            low, high = figures["interval"][name]
            assert low <= figures[name] <= high
        widths.append(figures["interval"]["margin"][1] - figures["interval"]["margin"][0])
    assert widths[1] < widths[0] / 5


def test_groups_and_models_in_one_table():
    sums = {"base": np.array([[-4.0, -2.0], [-2.0, -4.0]]), "tuned": np.array([[-1.0, -2.0], [-2.0, -4.0]])}
    lengths = np.full((2, 2), 2)
    result = analyse(sums, lengths, {"source": ["a.jsonl", "b.jsonl"], "script": ["latin", "latin"]})
    assert result["all"]["base"]["accuracy"] == 0.5 and result["all"]["tuned"]["accuracy"] == 1.0
    assert result["source"]["a.jsonl"]["base"]["pairs"] == 1 and "script" not in result
    assert table(result).count("\n") == 6 and "b.jsonl tuned" in table(result)


def test_worst_pairs_are_those_where_rejected_wins_most():
    rows = [{"source": str(i), "question": "q", "chosen": "c", "rejected": "r", "other": 0} for i in range(4)]
    found = worst_pairs(np.array([-1.0, 2.0, -3.0, 0.5]), rows)
    assert [(pair["source"], pair["margin"]) for pair in found] == [("2", -3.0), ("0", -1.0)]
    assert "other" not in found[0]
