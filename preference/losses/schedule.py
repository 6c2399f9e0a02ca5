"""How the objective changes in the course of a run: a stage of likelihood first, a preference term that grows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from preference.losses.objective import Objective

STAGES = ("joint", "sft,align")
RAMPS = ("constant", "linear")


@dataclass(frozen=True)
class Schedule:
    """The objective of each step of a run.

    Attributes:
        objective: that of a run in one stage; its `nll_scope` holds throughout.
        stages: "joint": likelihood and preference term together, all along. "sft,align": the likelihood of the chosen
            answers alone for the first `sft_share` of the steps, then the preference term with `align_nll` times the
            likelihood (Gorbatovski et al. 2025, arXiv 2502.01237: ORPO in two stages).
        ramp: "constant", or "linear": the weight of the preference term grows from 0 to beta over its stage.
        align_nll: weight of the likelihood in the second stage.

    Raises:
        ValueError: a stage, ramp or share that does not exist, or a loss that has no stages.
    """

    objective: Objective
    stages: str = "joint"
    sft_share: float = 0.5
    ramp: str = "constant"
    align_nll: float = 0.0

    def __post_init__(self) -> None:
        if self.stages not in STAGES or self.ramp not in RAMPS:
            raise ValueError(f"stages are {' or '.join(STAGES)}, ramps {' or '.join(RAMPS)}; got {self}")
        if not 0 < self.sft_share < 1:
            raise ValueError(f"sft_share lies between 0 and 1; got {self.sft_share}")
        if not self.constant and self.objective.loss != "orpo":
            raise ValueError(f"stages and ramps are those of loss=orpo; got loss={self.objective.loss}")

    @property
    def constant(self) -> bool:
        return self.stages == "joint" and self.ramp == "constant"

    @cached_property
    def last(self) -> Objective:
        """The objective that a run ends with, which all evaluations measure."""
        return self.at(1.0)

    def at(self, progress: float) -> Objective:
        """The objective at a share of all steps, from 0 at the first one on."""
        if self.constant:
            return self.objective
        begin = self.sft_share if self.stages == "sft,align" else 0.0
        if progress < begin:
            return self.objective.weighing(beta=0.0, nll_weight=1.0)
        grown = (progress - begin) / (1 - begin) if self.ramp == "linear" else 1.0
        nll = self.align_nll if self.stages == "sft,align" else self.objective.nll_weight
        return self.objective.weighing(beta=(self.objective.beta or 0.0) * grown, nll_weight=nll)
