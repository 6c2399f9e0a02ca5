"""The objectives against TRL's own code: its trainers' loss functions, on random log-probabilities, no model at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from preference.losses import Objective, PairLogps, Totals, couple, objective_share

PAIRS, WIDTH = 1000, 12
F64 = torch.float64

# our objective -> TRL's loss_type and the fields of its config that differ from their defaults
DPO = [
    (Objective("dpo"), "sigmoid", {}),
    (Objective("hinge"), "hinge", {}),
    (Objective("ipo"), "ipo", {}),
    (Objective("exo_pair", label_smoothing=0.1), "exo_pair", {"label_smoothing": 0.1}),
    (Objective("exo_pair"), "exo_pair", {"label_smoothing": 1e-3}),
    (Objective("nca_pair", 0.1), "nca_pair", {}),
    (Objective("robust", label_smoothing=0.2), "robust", {"label_smoothing": 0.2}),
    (Objective("bco_pair"), "bco_pair", {}),
    (Objective("sppo_hard"), "sppo_hard", {}),
    (Objective("aot"), "aot", {}),
    (Objective("aot", label_smoothing=0.2), "aot", {"label_smoothing": 0.2}),
    (Objective("aot_unpaired", label_smoothing=0.2), "aot_unpaired", {"label_smoothing": 0.2}),
    (Objective("apo_zero"), "apo_zero", {}),
    (Objective("apo_down"), "apo_down", {}),
    (Objective("discopop", 0.1), "discopop", {}),
    (Objective("sft"), "sft", {}),
    (Objective("sigmoid_norm", 0.1), "sigmoid_norm", {}),
    (Objective("dpo", ld_alpha=0.4), "sigmoid", {"ld_alpha": 0.4}),
    (Objective("dpo:0.8,bco_pair:0.2"), "sigmoid,bco_pair", {"loss_weights": [0.8, 0.2]}),
    *(
        (Objective(ours, f_divergence=f), theirs, {"f_divergence_type": f})
        for f in ("forward_kl", "js_divergence", "alpha_divergence")
        for ours, theirs in (("dpo", "sigmoid"), ("ipo", "ipo"))
    ),
]


class TokenLogps:
    """Random log-probabilities of answers of 1 to WIDTH tokens, and the sums that we and TRL read of them."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        draw = torch.Generator().manual_seed(0)
        self.lengths = torch.randint(1, WIDTH + 1, (2, PAIRS), generator=draw)
        self.mask = torch.arange(WIDTH) < self.lengths[..., None]
        self.values = -torch.rand(2, PAIRS, WIDTH, generator=draw, dtype=dtype) * 3 - 1e-3
        self.reference = self.values + 0.5 * torch.randn(2, PAIRS, WIDTH, generator=draw, dtype=dtype)
        self.values.requires_grad_()

    def sums(self, values: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        shared = torch.arange(WIDTH) < self.lengths.min(0).values[:, None]
        return (values * self.mask * torch.where(shared, 1.0, alpha)).sum(-1)

    def pairs(self) -> PairLogps:
        chosen, rejected = self.sums(self.values)
        tails = self.sums(self.values) - self.sums(self.values, 0.0)
        none, one = torch.zeros(PAIRS).to(chosen), torch.ones(PAIRS).to(chosen)
        lengths = self.lengths.to(chosen)
        return PairLogps(chosen, rejected, none, lengths[0], lengths[1], none, one, *tails)

    def ours(self, o: Objective) -> torch.Tensor:
        pairs = self.pairs()
        reference = tuple(self.sums(self.reference, o.ld_alpha)) if o.needs_reference else None
        coupled = couple(o, (pairs.chosen_B, pairs.rejected_B), reference) if o.needs_batch else None
        totals = Totals(PAIRS, float(self.lengths[0].sum()))
        return objective_share(o, pairs, totals, reference, coupled)[0]


def assert_same(tokens: TokenLogps, ours: torch.Tensor, theirs: torch.Tensor, rel: float = 1e-6) -> None:
    """Value and gradient."""
    assert ours.item() == pytest.approx(theirs.item(), rel=rel)
    mine, other = (torch.autograd.grad(loss, tokens.values, retain_graph=True)[0] for loss in (ours, theirs))
    assert torch.allclose(mine, other, rtol=max(rel, 1e-6), atol=rel * other.abs().max().item())


class Device:
    device = torch.device("cpu")

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather


def dpo_trainer(o: Objective, loss_type: str, changes: dict) -> SimpleNamespace:
    """What DPOTrainer._compute_loss reads of its trainer."""
    from collections import defaultdict

    names = loss_type.split(",")
    fields = {
        "loss_types": names, "loss_weights": [1.0] * len(names), "beta": o.beta, "label_smoothing": 0.0,
        "ld_alpha": None, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
        "args": SimpleNamespace(discopop_tau=0.05), "model": SimpleNamespace(training=True), "accelerator": Device(),
        "aux_loss_enabled": False, "precompute_ref_logps": True, "use_weighting": False, "_tp_size": 1,
        "_total_train_tokens": 0, "_metrics": {"train": defaultdict(list)},
    }  # fmt: skip
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize(
    "objective, loss_type, changes", DPO, ids=lambda case: case.loss if isinstance(case, Objective) else str(case)
)
def test_as_dpo_trainer(objective: Objective, loss_type: str, changes: dict) -> None:
    from trl import DPOTrainer

    tokens = TokenLogps(torch.float32 if objective.f_divergence == "alpha_divergence" else F64)  # TRL has no float64
    per_token = (tokens.values * tokens.mask).flatten(0, 1)
    blank = torch.zeros_like(per_token)
    # a prompt of one token stands before each answer
    mask = torch.cat([torch.zeros(2 * PAIRS, 1), tokens.mask.flatten(0, 1)], dim=1).long()
    ld_alpha = changes.get("ld_alpha", 1.0)
    ref_chosen, ref_rejected = tokens.sums(tokens.reference, ld_alpha)
    inputs = {
        "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected,
    }  # fmt: skip
    outputs = SimpleNamespace(log_probs=per_token, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    trainer = dpo_trainer(objective, loss_type, changes)
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    assert_same(tokens, tokens.ours(objective), theirs)


@pytest.mark.parametrize("loss_type, alpha", [("sigmoid", 0.0), ("simpo", 0.0), ("simpo", 0.25)])
def test_as_cpo_trainer(loss_type: str, alpha: float) -> None:
    """TRL's simpo reads means where its cpo reads sums; alpha bends the reward of either, here SimPO's alone."""
    from trl.experimental.cpo import CPOTrainer

    tokens = TokenLogps()
    pairs = tokens.pairs()
    trainer = SimpleNamespace(
        alpha=alpha, beta=2.0, simpo_gamma=0.5, label_smoothing=0.1, loss_type=loss_type, accelerator=Device()
    )
    per_token = loss_type == "simpo"
    sides = (pairs.chosen_B, pairs.chosen_len_B), (pairs.rejected_B, pairs.rejected_len_B)
    theirs, *_ = CPOTrainer.cpo_loss(trainer, *(side / length if per_token else side for side, length in sides))
    loss = "cpo" if not per_token else "alphapo" if alpha else "simpo"
    constants = {"alphapo_alpha": alpha} if alpha else {}
    ours = Objective(loss, 2.0, simpo_gamma=0.5, label_smoothing=0.1, nll_weight=0.0, **constants)
    assert_same(tokens, tokens.ours(ours), theirs.mean())


def test_as_orpo_trainer() -> None:
    """TRL takes float32 there."""
    from trl.experimental.orpo import ORPOTrainer

    tokens = TokenLogps()
    pairs = tokens.pairs()
    trainer = SimpleNamespace(beta=0.3, accelerator=Device())
    sides = pairs.chosen_B / pairs.chosen_len_B, pairs.rejected_B / pairs.rejected_len_B
    ratios, *_ = ORPOTrainer.odds_ratio_loss(trainer, *sides)
    assert_same(tokens, tokens.ours(Objective("orpo", 0.3, nll_weight=0.0)), -ratios.mean(), 1e-5)


def test_as_kto_trainer() -> None:
    """Given the same estimate of the KL divergence: ours is the batch's mean log-ratio, TRL's of shuffled answers."""
    import torch.nn.functional as F

    from preference.losses.referenced import kto_answer

    draw = torch.Generator().manual_seed(1)
    reward, z = torch.randn(1000, generator=draw, dtype=F64), torch.tensor(0.3, dtype=F64)
    assert torch.allclose(kto_answer(reward, True, z), 1 - F.sigmoid(reward - z))
    assert torch.allclose(kto_answer(reward, False, z), 1 - F.sigmoid(z - reward))
    tokens = TokenLogps()
    pairs, reference = tokens.pairs(), tokens.sums(tokens.reference)
    chosen, rejected = pairs.chosen_B - reference[0], pairs.rejected_B - reference[1]
    z_chosen, z_rejected = (side.mean().clamp(min=0).detach() for side in (rejected, chosen))
    losses = 1 - F.sigmoid(0.1 * (chosen - z_chosen)), 1 - F.sigmoid(0.1 * (z_rejected - rejected))
    assert_same(tokens, tokens.ours(Objective("kto")), torch.cat(losses).mean())
