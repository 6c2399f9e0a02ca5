"""The token budget of micro-batches on a GPU: the controller by itself, and at work over a memory that is made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_checkpoints import IDENTITY
from training import logged, make_pairs, make_trainer

from preference.engine import forward
from preference.plan.first_budget import first_budget, fitting_tokens, is_automatic
from preference.train import budget as budgets
from preference.train.budget import MOST, ROOM, Budget, BudgetError
from preference.train.resuming import resolve_start

NOT_MORE_THAN = 160  # tokens that the made-up memory takes


class PaperMeter:
    """Each token of the largest micro-batch takes 1,000 bytes; 10,000 are held."""

    def __init__(self, limit: int = NOT_MORE_THAN) -> None:
        self.limit, self.largest = limit, 0
        self.seen: list[int] = []

    def run(self, tokens: int) -> None:
        self.seen.append(tokens)
        if tokens > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.largest = max(self.largest, tokens)

    def now(self) -> float:
        return 10_000.0

    def peak(self) -> float:
        return 10_000.0 + 1000 * self.largest

    def reset(self) -> None:
        self.largest = 0

    def room(self) -> float:
        return (10_000 + 1000 * self.limit) / ROOM

    def free(self) -> None:
        pass


def test_what_is_measured_decides_within_bounds() -> None:
    budget = Budget(1000, 100)
    budget.observe(500, held=1e6, peak=1.5e6, room=2.0001e6 / ROOM)  # 1,000 bytes a token, 1e6 left
    assert (budget.tokens, budget.settled) == (1000, False)
    budget.observe(1000, held=1e6, peak=3e6, room=2.0001e6 / ROOM)
    assert budget.tokens == 500
    budget.observe(10, held=0, peak=10, room=1e9)  # no more than twice as many at a time
    assert (budget.tokens, budget.settled) == (1000, True)
    budget.observe(10, held=1e6, peak=2e6, room=1.1e6)  # nor fewer than the longest pair has
    assert budget.tokens == 100
    huge = Budget(MOST, 1)
    huge.observe(10, held=0, peak=1, room=1e12)
    assert huge.tokens == MOST


def test_what_does_not_fit_is_halved_down_to_the_longest_pair() -> None:
    budget = Budget(1000, 300, measured=2)
    budget.halve(900)
    assert (budget.tokens, budget.measured) == (450, 0)
    budget.halve(450)
    assert budget.tokens == 300
    with pytest.raises(BudgetError, match="one pair of 300 tokens does not fit .* gradient_checkpointing=true"):
        budget.halve(300)


def trainer_with(monkeypatch, folder, budget: Budget | None, meter: PaperMeter, **options):
    trainer = make_trainer("packed", folder, make_pairs(32), per_device_train_batch_size=8, max_steps=4,
                           gradient_accumulation_steps=2, learning_rate=1e-3, budget=budget, **options)  # fmt: skip
    trainer.meter = meter
    plain = forward.pair_logps

    def counted(model, batch, **rest):
        meter.run(batch["input_ids"].numel())
        return plain(model, batch, **rest)

    monkeypatch.setattr(budgets, "pair_logps", counted)
    monkeypatch.setattr("preference.train.trainer.pair_logps", counted)
    return trainer


def test_a_run_finds_its_budget_and_its_curve_is_that_of_any_cut(monkeypatch, tmp_path, capsys) -> None:
    """From far too many tokens: the first step is cut anew until it fits. The resumed run takes the budget up."""
    by_pairs = make_trainer("packed", tmp_path / "a", make_pairs(32), per_device_train_batch_size=8, max_steps=4,
                            gradient_accumulation_steps=2, learning_rate=1e-3)  # fmt: skip
    by_pairs.train()
    budget, meter = Budget(10_000, 60, coming=500.0), PaperMeter()
    found = trainer_with(monkeypatch, tmp_path / "b", budget, meter, save_strategy="steps", save_steps=2)
    resolve_start(found, "auto", IDENTITY)
    found.train()
    assert meter.seen[0] > NOT_MORE_THAN >= max(meter.seen[-6:])
    assert budget.settled and 60 <= budget.tokens <= NOT_MORE_THAN
    assert f"micro-batches have up to {budget.tokens} tokens" in capsys.readouterr().out
    for a, b in zip(logged(by_pairs, "loss", "grad_norm"), logged(found, "loss", "grad_norm"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    again, later = Budget(10_000, 60), PaperMeter()
    resumed = trainer_with(monkeypatch, tmp_path / "b", again, later, save_strategy="steps", save_steps=2)
    start = resolve_start(resumed, str(tmp_path / "b" / "checkpoint-2"), IDENTITY)
    assert again.measured == 2 and again.tokens <= NOT_MORE_THAN
    resumed.train(resume_from_checkpoint=str(start.checkpoint))
    assert again.tokens == budget.tokens and max(later.seen) <= NOT_MORE_THAN
    assert logged(resumed, "loss") == logged(found, "loss")


def test_trials_draw_no_random_numbers_and_leave_no_gradient(monkeypatch, tmp_path) -> None:
    trainer = trainer_with(monkeypatch, tmp_path, Budget(10_000, 60), PaperMeter(10_000))
    kept, fit, plain = [], budgets.fit_step, budgets.pair_logps

    def fitted(*args):
        before = torch.get_rng_state()
        result = fit(*args)
        kept.append(
            torch.equal(before, torch.get_rng_state()) and all(p.grad is None for p in trainer.model.parameters())
        )
        return result

    monkeypatch.setattr("preference.train.trainer.fit_step", fitted)
    monkeypatch.setattr(budgets, "pair_logps", lambda *args: (torch.rand(3), plain(*args))[1])
    trainer.train()
    assert kept == [True] * 3


def test_where_a_run_starts(monkeypatch) -> None:
    """The estimate at the first budget fits the room; where the longest pair does not, it is checkpointed."""
    pytest.importorskip("triton", reason="Triton is not installed: there is none for this platform")
    from test_estimate import GPU, config, flags

    from preference.losses import Objective
    from preference.plan.dry_run import Setup

    lengths = np.array([[300, 200, 100], [50, 40, 30]])
    args = flags(use_peft=False, bf16=True)
    setup = Setup("", GPU, Objective(), torch.bfloat16, lengths, config(hidden_size=64, intermediate_size=512))
    assert is_automatic(args, GPU) and not is_automatic(flags(max_tokens_per_micro_batch=0), GPU)
    estimator = setup.estimator(args)
    room = 8.5e8
    tokens, least = fitting_tokens(estimator, lengths, room, 1)
    assert least == 599 < tokens < 30 * least
    pairs = lengths[:1].repeat(tokens // least, axis=0)
    need = estimator.memory(estimator.trace(pairs, True), True).peak
    assert ROOM * room - 5e7 < need <= ROOM * room
    monkeypatch.setattr("preference.plan.first_budget.fitting_tokens", lambda *args: [][0])
    by_pairs = first_budget(args, setup, 1, room)
    assert by_pairs.budget is None and by_pairs.note.startswith("note: micro-batches go by pairs, as the step was not")
    for fits, given, want in (
        ([700], {}, (700, False)),
        ([0, 650], {}, (650, True)),
        ([0, 0], {}, (599, True)),
        ([0], {"gradient_checkpointing": False}, (599, False)),
    ):
        answers = iter(fits)
        monkeypatch.setattr(
            "preference.plan.first_budget.fitting_tokens", lambda *args, answers=answers: (next(answers), 599)
        )
        first = first_budget(flags(use_peft=False, bf16=True, **given), setup, 1, room)
        assert (first.budget.tokens, first.checkpointing) == want and next(answers, None) is None
        assert ("gradient checkpointing, which is on" in first.note) == first.checkpointing
