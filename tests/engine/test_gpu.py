"""On a CUDA device: the kernels that a CPU never runs, against double precision on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_exact import double, gradients, plain_loss, relative, rows
from test_packing import dense_attention, related_pairs
from training import logged, lora, make_pairs, make_trainer

from preference.engine import attention
from preference.engine.cuda import attention as cuda
from preference.engine.forward import pair_logps
from preference.engine.masks import PackedMask
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.losses import Objective, Totals, objective_share
from tiny import tiny_model

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def moved(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in batch.items()}


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.01), (torch.float16, 0.002), (torch.float32, 1e-5)])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("heads, key_heads", [(4, 4), (4, 2)])
def test_attention(monkeypatch: pytest.MonkeyPatch, heads, key_heads, window, dtype, bound) -> None:
    """Values and gradients; in 16 bits they come from the varlen kernel, in float32 from FlexAttention."""
    calls = []
    for name, kernel in list(cuda.WAYS.items()):
        monkeypatch.setitem(
            cuda.WAYS, name, lambda *args, name=name, kernel=kernel: calls.append(name) or kernel(*args)
        )
    batch = pack_pairs(related_pairs(5))
    torch.manual_seed(0)
    shapes = [(1, h, batch["input_ids"].shape[1], 16) for h in (heads, key_heads, key_heads)]
    exact = [torch.randn(shape).to(dtype).double().requires_grad_() for shape in shapes]
    inputs = [x.detach().to(DEVICE, dtype).requires_grad_() for x in exact]
    found = attention.packed_attention(torch.nn.Module(), *inputs, PackedMask(moved(batch), window))
    want = dense_attention(*exact, batch, window, None)
    grad = torch.randn(want.shape).to(dtype)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, grad.to(DEVICE))),
        (want, *torch.autograd.grad(want, exact, grad.double())),
        strict=True,
    )
    for a, b in pairs:
        assert relative(a.detach().double().cpu(), b.detach()) < bound
    assert calls == ["flex" if dtype == torch.float32 else "varlen"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2"])
def test_a_step(arch: str, bf16: bool) -> None:
    """Loss and gradients of a batch against one plain forward per sequence in double precision."""
    exact, pairs, objective = double(arch), rows(), Objective(beta=0.5)
    want = plain_loss(exact, objective, pairs, None)
    want_gradients = gradients(want, exact)
    model = double(arch, dtype=torch.float32).to(DEVICE)
    assert prepare_model(model).share_prompt
    totals = Totals.of(objective, [(len(p["prompt_ids"]), len(p["chosen_ids"])) for p in pairs])
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        logps = pair_logps(model, moved(pack_pairs(pairs, prompt_logps=objective.needs_prompt)))
    loss, _ = objective_share(objective, logps, totals, None)
    assert loss.item() == pytest.approx(want.item(), rel=1e-2 if bf16 else 1e-6)
    assert relative(gradients(loss, model).cpu(), want_gradients) < (0.05 if bf16 else 1e-5)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2"])
def test_a_step_with_adapters_in_bfloat16(arch: str) -> None:
    """Layers that run as one step, their adapters cast at once, against the same in double precision on the CPU."""
    found = []
    pairs = rows()
    for device, dtype in (("cpu", torch.float64), (DEVICE, torch.float32)):
        model = lora(double(arch, dtype=dtype))
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = (0.1 * torch.randn(parameter.shape)).to(dtype)
        model = model.to(device)
        half = torch.bfloat16 if dtype == torch.float32 else None
        assert prepare_model(model, autocast=half).share_prompt
        batch = {name: x.to(device) if torch.is_tensor(x) else x for name, x in pack_pairs(pairs).items()}
        with torch.autocast(device, half, enabled=half is not None):
            logps = pair_logps(model, batch)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found_here = torch.autograd.grad((logps.chosen_B - 0.5 * logps.rejected_B).sum(), trained)
        found.append(torch.cat([gradient.flatten().double().cpu() for gradient in found_here]))
    assert relative(found[1], found[0]) < 0.05


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss", ["orpo", "dpo"])
def test_training_is_that_of_the_cpu(loss: str, adapter: bool, tmp_path) -> None:
    """Three steps in float32, the GPU's batch cut otherwise."""
    runs = []
    for use_cpu, pairs, accumulation in ((True, 16, 1), (False, 4, 4)):
        model = lora(tiny_model()) if adapter else tiny_model()
        trainer = make_trainer(
            "packed", tmp_path, make_pairs(16), loss=loss, model=model, use_cpu=use_cpu, optim="sgd",
            learning_rate=0.1, max_grad_norm=0.0, per_device_train_batch_size=pairs,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        runs.append(logged(trainer, "loss", "grad_norm"))
    assert len(runs[0]) == 3
    for here, there in zip(*runs, strict=True):
        assert there == pytest.approx(here, rel=1e-5)
