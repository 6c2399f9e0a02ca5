"""Layers compiled one by one: the same numbers, and nothing compiled again for another batch."""

from __future__ import annotations

import pytest
import torch
from test_packing import random_pairs
from training import lora
from transformers import AttentionInterface

from preference.engine import attention
from preference.engine.compiled import compile_layers
from preference.engine.forward import pair_logps
from preference.engine.masks import EngineError
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from tiny import tiny_model


@pytest.fixture(autouse=True)
def as_before():
    plain = {name: AttentionInterface()[name] for name in (attention.NAME, attention.NAME_OVER_EAGER)}
    yield
    for name, function in plain.items():
        AttentionInterface.register(name, function)
    torch._dynamo.reset()


def gradients(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    logps = pair_logps(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logps.chosen_B - 0.5 * logps.rejected_B).sum(), trained)
    return logps.chosen_B.detach(), torch.cat([x.flatten() for x in found])


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_layers_are_compiled_once_for_rows_of_any_length(adapter: bool) -> None:
    model = lora(tiny_model()) if adapter else tiny_model()
    prepare_model(model, lighten=False)
    model.train()
    batches = [pack_pairs(random_pairs(n, seed=n)) for n in (2, 3, 5, 2, 7)]
    want = [gradients(model, batch) for batch in batches]
    torch._dynamo.utils.counters.clear()
    assert compile_layers(model, backend="aot_eager") == 2
    graphs = []
    for batch, (logps, gradient) in zip(batches, want, strict=True):
        found = gradients(model, batch)
        assert torch.allclose(found[0], logps, atol=1e-4)
        assert torch.allclose(found[1], gradient, atol=1e-4)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1] <= 8


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = tiny_model()
    prepare_model(model, lighten=False)
    model.config.num_hidden_layers = 3
    with pytest.raises(EngineError, match="no list of its 3 layers to compile: torch_compile=false"):
        compile_layers(model)
