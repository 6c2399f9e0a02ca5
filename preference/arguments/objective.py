"""Flags of the loss and of the engine that computes it."""

from __future__ import annotations

from dataclasses import dataclass

from preference.arguments.unused import NOT_ORPO, NOT_PACKED
from preference.flags.declaration import Unused, flag
from preference.losses.objective import F_DIVERGENCES, NLL_SCOPES
from preference.losses.schedule import RAMPS, STAGES
from preference.losses.specs import LOSSES, has_beta, parse_loss, reads

WITH_STAGES = Unused(lambda a: a.objective.orpo_stages == "joint", "orpo_stages=joint has no stage of its own")


def _unread(constant: str) -> Unused:
    return Unused(lambda a: not reads(a.objective.loss, constant), f"only {_readers(constant)} read it")


def _readers(constant: str) -> str:
    return ", ".join(name for name, spec in LOSSES.items() if constant in spec.reads)


def _is_loss(text: str) -> object:
    return parse_loss(text)


@dataclass
class ObjectiveArguments:
    """the objective"""

    loss: str = flag(
        "orpo",
        f"the objective, or a weighted sum as in dpo:0.8,bco_pair:0.2: {', '.join(LOSSES)}",
        check=_is_loss,
        identity=True,
        peers=("pref_loss", "loss_type", "rl", "rlhf_type", "stage"),
    )
    orpo_beta: float | None = flag(
        None,
        "weight of ORPO's odds-ratio term, lambda in the paper (unset: 1 below 0.5 B parameters, else 0.1)",
        auto=True,
        least=0,
        most=1000,
        unused=(NOT_ORPO,),
        peers=("orpo_alpha", "orpo_lambda"),
    )
    orpo_temperature: float = flag(
        1.0,
        "multiplies ORPO's log odds inside the sigmoid: higher leaves pairs that are right already alone",
        above=0,
        most=1000,
        unused=(_unread("orpo_temperature"),),
        identity=True,
    )
    orpo_stages: str = flag(
        "joint",
        "joint = likelihood and odds ratio together; sft,align = likelihood alone first, then the odds ratio",
        choices=STAGES,
        unused=(NOT_ORPO,),
        identity=True,
    )
    sft_share: float = flag(
        0.5, "share of the steps in the first of two stages", above=0, below=1, unused=(WITH_STAGES,), identity=True
    )
    align_nll: float = flag(
        0.0, "weight of the likelihood in the second of two stages", least=0, unused=(WITH_STAGES,), identity=True
    )
    orpo_beta_schedule: str = flag(
        "constant",
        "constant, or linear = orpo_beta is reached at the end of the run",
        choices=RAMPS,
        unused=(NOT_ORPO,),
        identity=True,
    )
    beta: float | None = flag(
        None,
        "strength of the other losses (unset: 0.1; simpo, alphapo, cpo_simpo 2; sigmoid_norm 5; nca_pair 0.01)",
        auto=True,
        above=0,
        most=1000,
        unused=(
            Unused(lambda a: a.objective.loss == "orpo", "loss=orpo takes --orpo_beta"),
            Unused(lambda a: not has_beta(a.objective.loss), "this loss has no constant"),
        ),
        peers=("dpo_beta", "simpo_beta"),
    )
    nll_scope: str | None = flag(
        None,
        "NLL over: sequence = prompt and answer (unset with orpo), answer = answer tokens (unset with others), "
        "answer_per_pair = mean per pair (unset with rpo)",
        choices=NLL_SCOPES,
        auto=True,
        unused=(Unused(lambda a: not a.nll_weight, "this loss has no likelihood term; nll_weight adds one"),),
        identity=True,
    )
    nll_weight: float | None = flag(
        None,
        "weight of the chosen answers' NLL beside any loss (unset: 1 for orpo, rpo, sft, slic, rrhf, cpo; others 0)",
        auto=True,
        least=0,
        most=1000,
        identity=True,
        peers=("rpo_alpha", "pref_ftx", "sft_weight", "sft_loss_weight"),
    )
    simpo_gamma: float = flag(
        1.0,
        "SimPO's target margin, in units of the loss (the paper's gamma)",
        least=0,
        unused=(_unread("simpo_gamma"),),
        identity=True,
    )
    cpo_alpha: float = flag(
        1.0,
        "weight of CPO's likelihood term",
        least=0,
        unused=(
            _unread("cpo_alpha"),
            Unused(lambda a: a.objective.nll_weight is not None, "nll_weight says it already"),
        ),
        identity=True,
    )
    label_smoothing: float = flag(
        0.0,
        "share of labels taken to be flipped, below 0.5",
        least=0,
        below=0.5,
        unused=(_unread("label_smoothing"),),
        identity=True,
        peers=("dpo_label_smoothing", "label_smoothing_factor"),
    )
    score_margin: float = flag(
        0.0,
        "ask for a margin of that times a pair's score_margin column (ODPO), in units of the loss",
        least=0,
        unused=(_unread("score_margin"),),
        identity=True,
    )
    alphapo_alpha: float = flag(
        0.25,
        "AlphaPO's shape of the reward; 0 is SimPO",
        least=-10,
        most=10,
        unused=(_unread("alphapo_alpha"),),
        identity=True,
    )
    discopop_tau: float = flag(
        0.05, "DiscoPOP's temperature", above=0, unused=(_unread("discopop_tau"),), identity=True
    )
    dpop_lambda: float = flag(
        50.0,
        "DPO-Positive's penalty on a chosen answer that loses probability",
        least=0,
        unused=(_unread("dpop_lambda"),),
        identity=True,
    )
    length_penalty: float = flag(
        0.01,
        "rdpo: what each token that the chosen answer is longer by costs",
        least=0,
        unused=(_unread("length_penalty"),),
        identity=True,
    )
    ld_alpha: float = flag(
        1.0,
        "LD-DPO: weight of the tokens beyond the shorter answer's length",
        least=0,
        most=1,
        unused=(_unread("ld_alpha"),),
        identity=True,
    )
    kto_desirable_weight: float = flag(
        1.0,
        "KTO: weight of good answers; the paper keeps weight x count of good and bad ones within 1 to 1.33",
        above=0,
        unused=(_unread("kto_desirable_weight"),),
        identity=True,
        peers=("desirable_weight", "kto_chosen_weight"),
    )
    kto_undesirable_weight: float = flag(
        1.0,
        "KTO: weight of bad answers",
        above=0,
        unused=(_unread("kto_undesirable_weight"),),
        identity=True,
        peers=("undesirable_weight", "kto_rejected_weight"),
    )
    f_divergence: str = flag(
        "reverse_kl",
        "the divergence behind DPO and kin",
        choices=F_DIVERGENCES,
        unused=(_unread("f_divergence"),),
        identity=True,
        peers=("f_divergence_type",),
    )
    f_alpha: float = flag(
        0.5,
        "alpha of f_divergence=alpha_divergence",
        least=-10,
        most=10,
        unused=(Unused(lambda a: a.objective.f_divergence != "alpha_divergence", "alpha_divergence alone has it"),),
        identity=True,
        peers=("f_alpha_divergence_coef",),
    )
    engine: str = flag(
        "packed",
        "packed = this project's; trl = TRL's trainers, the reference",
        choices=("packed", "trl"),
        identity=True,
    )
    max_tokens_per_micro_batch: int = flag(
        0,
        "memory budget: tokens of one packed row (0: follow per_device_train_batch_size; not given, on an NVIDIA GPU: "
        "as many as its memory has room for, measured in the first steps)",
        least=0,
        unused=(NOT_PACKED,),
    )
    share_prompt: bool = flag(
        True,
        "compute each prompt once for both answers, and what prompts begin with alike once, where the model allows it",
        unused=(NOT_PACKED,),
    )
    attn_implementation: str = flag(
        "auto",
        "kernel of the packed attention on an NVIDIA GPU: varlen is torch's fastest, flex takes capped scores and "
        "older cards, sdpa takes everything; auto = for each layer the first of them that can",
        choices=("auto", "varlen", "flex", "sdpa"),
        topic="hardware",
        unused=(NOT_PACKED,),
        peers=("attention", "attn_impl", "flash_attn"),
    )
