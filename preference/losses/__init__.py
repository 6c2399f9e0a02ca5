"""Preference objectives: pure functions of summed log-probabilities and lengths.

    specs       every loss by name: its paper, its constants, whether it compares with a reference model
    objective   a loss with its constants, and the counts of a global batch; needs no torch
    answers     what a loss reads: log-probabilities, log-ratios, scores of B pairs
    referenced, reference_free      the formulas
    coupling    what a pair has to know of the other pairs of its global batch (kto, aot)
    share       a micro-batch's share of the loss of its global batch
    schedule    how the objective changes in the course of a run
    defaults    the learning rate for each loss, with its source

Names are loaded when they are first asked for, so that reading flags does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preference.losses.answers import PairLogps, log1mexp
    from preference.losses.coupling import couple
    from preference.losses.objective import NLL_SCOPES, Objective, Totals
    from preference.losses.share import FORMULAS, objective_share
    from preference.losses.specs import LOSSES

__all__ = [
    "FORMULAS", "LOSSES", "NLL_SCOPES", "Objective", "PairLogps", "Totals", "couple", "log1mexp", "objective_share",
]  # fmt: skip

_HOMES = {
    "FORMULAS": "share", "LOSSES": "specs", "NLL_SCOPES": "objective", "Objective": "objective", "PairLogps": "answers",
    "Totals": "objective", "couple": "coupling", "log1mexp": "answers", "objective_share": "share",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
