"""Flags of the loss and of the engine that computes it."""

from __future__ import annotations

from dataclasses import dataclass

from preference.arguments.unused import NOT_ORPO, NOT_PACKED
from preference.flags.declaration import Unused, flag

LOSSES = ("orpo", "dpo", "robust", "simpo", "ipo", "cpo", "hinge")


@dataclass
class ObjectiveArguments:
    """the objective"""

    loss: str = flag(
        "orpo",
        "the objective",
        choices=LOSSES,
        identity=True,
        peers=("pref_loss", "loss_type", "rl", "rlhf_type", "stage"),
    )
    orpo_beta: float = flag(
        0.1,
        "weight of ORPO's odds-ratio term (lambda in the paper)",
        least=0,
        unused=(NOT_ORPO,),
        peers=("orpo_alpha", "orpo_lambda"),
    )
    beta: float | None = flag(
        None,
        "strength of the other losses (unset: 0.1; simpo 2.0)",
        auto=True,
        above=0,
        unused=(Unused(lambda a: a.objective.loss == "orpo", "loss=orpo takes --orpo_beta"),),
        peers=("pref_beta", "rl_beta", "dpo_beta", "simpo_beta"),
    )
    nll_scope: str = flag(
        "sequence",
        "ORPO's NLL over: sequence = prompt and answer, answer = answer tokens, answer_per_pair = mean per pair",
        choices=("sequence", "answer", "answer_per_pair"),
        unused=(Unused(lambda a: a.objective.loss != "orpo", "only loss=orpo has a choice of NLL"),),
        identity=True,
    )
    simpo_gamma: float = flag(
        1.0,
        "SimPO's target margin, in units of the loss (the paper's gamma)",
        least=0,
        unused=(Unused(lambda a: a.objective.loss != "simpo", "only loss=simpo has a target margin"),),
        identity=True,
    )
    cpo_alpha: float = flag(
        1.0,
        "weight of CPO's likelihood term",
        least=0,
        unused=(Unused(lambda a: a.objective.loss != "cpo", "only loss=cpo has a likelihood term of its own weight"),),
        identity=True,
    )
    label_smoothing: float = flag(
        0.0,
        "dpo, robust, simpo, cpo: share of labels taken to be flipped, below 0.5",
        least=0,
        below=0.5,
        unused=(Unused(lambda a: a.objective.loss in ("orpo", "ipo", "hinge"), "this loss does not smooth labels"),),
        identity=True,
        peers=("dpo_label_smoothing", "label_smoothing_factor"),
    )
    engine: str = flag(
        "packed",
        "packed = this project's; trl = TRL's trainers, the reference",
        choices=("packed", "trl"),
        identity=True,
    )
    max_tokens_per_micro_batch: int = flag(
        0,
        "memory budget: tokens of one packed row (0: follow per_device_train_batch_size)",
        least=0,
        unused=(NOT_PACKED,),
    )
    share_prompt: bool = flag(
        True,
        "compute each prompt once for both answers, and what prompts begin with alike once, where the model allows it",
        unused=(NOT_PACKED,),
    )
