"""The gradient's norm and clipping by it, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training import make_pairs, make_trainer

from preference.train.gradients import clip, exact_norm


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
    return made


def test_the_norm_of_a_large_tensor_is_exact_and_that_of_its_parts_too():
    """torch's own is off by more than 1e-4 here, which is why there is another."""
    [large] = parameters((8192, 1024))
    expected = large.grad.double().norm().item()
    assert exact_norm([large]).item() == pytest.approx(expected, rel=1e-6)
    assert abs(large.grad.norm().item() / expected - 1) > 1e-5
    squares = []
    for half in large.grad.chunk(2):
        part = nn.Parameter(torch.zeros_like(half))
        part.grad = half
        squares.append(exact_norm([part], lambda square: square).double().square())
    both = exact_norm([part], lambda square: sum(squares))
    assert both.item() == pytest.approx(expected, rel=1e-6)


def test_clipping_is_torchs():
    for largest in (0.01, 10.0):
        ours, theirs = parameters((3, 4), (70_000,)), parameters((3, 4), (70_000,))
        norm = exact_norm(ours)
        clip(ours, norm, largest)
        assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs, largest).item(), rel=1e-5)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=0)
    assert exact_norm([nn.Parameter(torch.zeros(2))]).item() == 0


def test_the_trainer_logs_and_clips_by_it(tmp_path, monkeypatch):
    from preference.train import trainer as module

    seen = []
    monkeypatch.setattr(module, "clip", lambda parameters, norm, largest: seen.append((norm.item(), largest)))
    trainer = make_trainer("packed", tmp_path, make_pairs(8), max_grad_norm=0.5, max_steps=2)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert seen == [(norm, 0.5) for norm in logged] and len(seen) == 2
