"""The packed engine against TRL's trainers and against plain double precision, on whole batches.

Loss and gradients of one optimizer step with the whole batch in one micro-batch: TRL's loss depends on how a batch is
cut, the packed engine's does not (tests/engine/test_invariance.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from test_packing import random_pairs
from training import arguments, pairs_of

from preference.engine.forward import pair_logps
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.losses import LOSSES, NLL_SCOPES, Objective, Totals, couple, objective_share
from preference.train.trl_engine import make_trl_trainer
from tiny import tiny_model, tiny_tokenizer

ARCHS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2", "mixtral"]
WINDOWS = {"mistral": 7, "gemma2": 6, "gemma3_text": 6}


def double(arch: str, seed: int = 0, dtype: torch.dtype = torch.float64):
    options = dict(sliding_window=WINDOWS[arch]) if arch in WINDOWS else {}
    if arch == "mixtral":  # the grouped product of its experts has no double precision
        options["experts_implementation"] = "eager"
    return tiny_model(arch, seed, dtype, **options)


def rows() -> list[dict]:
    """Pairs of several lengths, with one-token prompts and answers, and two pairs with one prompt."""
    pairs = random_pairs(6)
    pairs[1]["prompt_ids"], pairs[2]["chosen_ids"], pairs[3]["rejected_ids"] = [7], [8], [9]
    pairs[5]["prompt_ids"] = pairs[4]["prompt_ids"]
    return pairs


def packed_loss(model, objective, pairs, reference=None, share_prompt: bool = True, coupled=None):
    how = prepare_model(model, share_prompt=share_prompt)
    assert how.share_prompt == share_prompt
    batch = pack_pairs(pairs, share_prompt=share_prompt, prompt_logps=objective.needs_prompt)
    totals = Totals.of(objective, [(len(p["prompt_ids"]), len(p["chosen_ids"])) for p in pairs])
    return objective_share(objective, pair_logps(model, batch), totals, reference, coupled)


def gradients(loss, model) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten().double() for g in found])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def reference_logps(model, pairs):
    with torch.no_grad():
        logps = pair_logps(model, pack_pairs(pairs, prompt_logps=False))
    return logps.chosen_B, logps.rejected_B


@pytest.mark.parametrize("loss", ["orpo", "dpo"])
@pytest.mark.parametrize("arch", ARCHS)
def test_against_trl(arch: str, loss: str, tmp_path) -> None:
    pairs, objective = rows(), Objective(loss, beta=0.25)
    data = pairs_of((p["prompt_ids"], p["chosen_ids"], p["rejected_ids"]) for p in pairs)
    # In double precision Gemma 2's own attention turns the padding of TRL's rows, and with it the loss, into NaN.
    dtype = torch.float32 if arch == "gemma2" else torch.float64
    policy, start = double(arch, 1, dtype), double(arch, 0, dtype)
    trl_model = double(arch, 0, dtype)  # DPO's reference is a copy of it; then it becomes the policy
    options = arguments(tmp_path, per_device_train_batch_size=len(pairs), train_sampling_strategy="sequential")
    trainer = make_trl_trainer(
        trl_model, options, objective=objective, train_dataset=data, processing_class=tiny_tokenizer()
    )
    trl_model.load_state_dict(policy.state_dict())
    (batch,) = trainer.get_train_dataloader()
    trl_model.eval()  # no dropout
    want = trainer.compute_loss(trl_model, trainer._prepare_inputs(batch))
    reference = None
    if loss == "dpo":
        prepare_model(start)
        reference = reference_logps(start, pairs)
    got, metrics = packed_loss(policy, objective, pairs, reference)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert relative(gradients(got, policy), gradients(want, trl_model)) < 1e-5
    assert metrics["loss"].item() / len(pairs) == pytest.approx(got.item(), rel=1e-6)


def plain_loss(model, objective: Objective, pairs, reference) -> torch.Tensor:
    """The objective from one forward per sequence, straight from the formulas."""
    sums = []
    for pair in pairs:
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            cut = len(pair["prompt_ids"]) - 1
            sums.append((logps[:cut].sum(), logps[cut:].sum(), len(pair[side])))
    pair_terms, nll, tokens = [], 0.0, 0
    for i, pair in enumerate(pairs):
        (prompt, c, n), (_, r, m) = sums[2 * i], sums[2 * i + 1]
        if objective.loss == "orpo":
            odds = [torch.exp(x) / (1 - torch.exp(x)) for x in (c / n, r / m)]
            pair_terms.append(objective.beta * torch.log(1 + odds[1] / odds[0]))
            if objective.nll_scope == "sequence":
                nll, tokens = nll - prompt - c, tokens + len(pair["prompt_ids"]) - 1 + n
            elif objective.nll_scope == "answer":
                nll, tokens = nll - c, tokens + n
            else:
                nll, tokens = nll - c / n, tokens + 1
        else:
            margin = objective.beta * (c - reference[0][i] - r + reference[1][i])
            pair_terms.append(torch.log(1 + torch.exp(-margin)))
    return torch.stack(pair_terms).mean() + (nll / tokens if tokens else 0)


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize(
    "objective",
    [*(Objective(nll_scope=scope, beta=0.5) for scope in NLL_SCOPES), Objective("dpo", beta=0.3)],
    ids=lambda o: f"{o.loss}-{o.nll_scope}",
)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text"])
def test_against_plain_double_precision(arch: str, objective: Objective, share_prompt: bool) -> None:
    model, pairs = double(arch), rows()
    draw = torch.Generator().manual_seed(0)
    reference = tuple(-60 * torch.rand(2, len(pairs), generator=draw, dtype=torch.float64))
    reference = reference if objective.needs_reference else None
    want = plain_loss(model, objective, pairs, reference)
    want_gradient = gradients(want, model)
    got, _ = packed_loss(model, objective, pairs, reference, share_prompt)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    # RMSNorm rounds to float32 on the way, also in the gradient of a prompt that stands once or twice.
    assert relative(gradients(got, model), want_gradient) < 1e-6


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_single_precision_is_close_to_double(arch: str) -> None:
    pairs, objective = rows(), Objective(beta=0.5)
    results = []
    for dtype in (torch.float32, torch.float64):
        model = double(arch, 0, dtype)
        loss, _ = packed_loss(model, objective, pairs)
        results.append((loss.item(), gradients(loss, model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert relative(results[0][1], results[1][1]) < 1e-5


@pytest.mark.parametrize("objective", [Objective(), Objective("dpo"), Objective(nll_scope="answer")], ids=str)
@pytest.mark.parametrize("cut", [[1] * 6, [2] * 3, [5, 1]], ids=str)
def test_micro_batches_add_up(objective: Objective, cut: list[int]) -> None:
    """Loss and gradient of micro-batches, shuffled and with a zero-weight pair among them, sum to the whole batch's."""
    model, pairs = tiny_model("llama"), rows()
    reference = (torch.full((6,), -30.0), torch.full((6,), -31.0)) if objective.needs_reference else None
    whole, metrics = packed_loss(model, objective, pairs, reference)
    want = gradients(whole, model)
    totals = Totals.of(objective, [(len(p["prompt_ids"]), len(p["chosen_ids"])) for p in pairs])
    got, total, sums = torch.zeros_like(want), 0.0, dict.fromkeys(metrics, 0.0)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    for part in order.split(cut):
        padded = [pairs[i] for i in part] + [dict(prompt_ids=[3], chosen_ids=[4], rejected_ids=[5], weight=0.0)]
        index = [*part.tolist(), 0]
        some = None if reference is None else tuple(x[index] for x in reference)
        logps = pair_logps(model, pack_pairs(padded, prompt_logps=objective.needs_prompt))
        share, part_metrics = objective_share(objective, logps, totals, some)
        got += gradients(share, model)
        total += share.item()
        sums = {name: sums[name] + value.item() for name, value in part_metrics.items()}
    assert total == pytest.approx(whole.item(), rel=1e-6)
    assert relative(got, want) < 1e-5
    assert sums == pytest.approx({name: value.item() for name, value in metrics.items()}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_saturated_and_one_token_pairs_train(loss: str) -> None:
    """A model so sure that log-probabilities are exactly 0 or far below, and identical answers: all finite."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    prepare_model(model)
    objective = Objective(loss)
    ids = torch.tensor([[5, 6, 7]])
    sure = int(model(input_ids=ids).logits[0, -1].argmax())
    pairs = [
        dict(prompt_ids=[5, 6, 7], chosen_ids=[sure], rejected_ids=[sure]),
        dict(prompt_ids=[5, 6, 7], chosen_ids=[sure], rejected_ids=[(sure + 1) % 512]),
        dict(prompt_ids=[5, 6, 7], chosen_ids=[(sure + 1) % 512], rejected_ids=[sure]),
        dict(prompt_ids=[9], chosen_ids=[9], rejected_ids=[9]),
    ]
    reference = (torch.zeros(4), torch.zeros(4)) if objective.needs_reference else None
    logps = pair_logps(model, pack_pairs(pairs))
    assert logps.chosen_B[0] == 0 and logps.rejected_B[2] == 0
    coupled = couple(objective, (logps.chosen_B, logps.rejected_B), reference) if objective.needs_batch else None
    value, metrics = packed_loss(model, objective, pairs, reference, coupled=coupled)
    assert torch.isfinite(gradients(value, model)).all()
    assert math.isfinite(value.item()) and all(torch.isfinite(x) for x in metrics.values())
