"""Layers whose forward the packed engine replaces on CUDA, in torch's operators on a CPU: the numbers of PEFT's and
transformers' own.
"""

from __future__ import annotations

import pytest
import torch
from test_cpu_layers import adapted, calls, outputs, relative

from preference.engine.cuda import residual, siblings
from preference.engine.cuda.lora import Adapted, cast_adapters
from preference.engine.cuda.norm import fuse_norms
from preference.engine.cuda.side import lighten
from tiny import tiny_model


def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    steps = (siblings.Siblings, Adapted, residual.AddNorm, residual.NormBeside)
    return {step.__name__: calls(monkeypatch, step) for step in steps}


def both(**options):
    """In double precision, one with its usual layers; its norms are torch's, as transformers' compute in float32."""
    usual, light = adapted(torch.float64, **options), adapted(torch.float64, **options)
    fuse_norms(usual)
    lighten(light)
    return usual, light


def test_layers_with_adapters_are_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value (with biases) are one step, gate and up another; two layers."""
    usual, light = both()
    made = seen(monkeypatch)
    assert relative(outputs(light), outputs(usual)) < 1e-12
    assert {name: len(found) for name, found in made.items()} == {
        "Siblings": 4, "Adapted": 4, "AddNorm": 2, "NormBeside": 2,
    }  # fmt: skip


def test_under_autocast_with_adapters_cast_at_once_they_differ_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the frozen weights' bfloat16, adapters in float32, as a run holds them; then after their weights change."""
    exact, light = adapted(torch.float64), adapted(torch.bfloat16)
    for name, p in light.named_parameters():
        p.data = dict(exact.named_parameters())[name].data.to(torch.float32 if "lora" in name else torch.bfloat16)
        dict(exact.named_parameters())[name].data = p.data.double()
    lighten(light)
    for _ in range(2):
        cast_adapters(light, torch.bfloat16)
        group = light.base_model.model.model.layers[0].self_attn.q_proj.packed_group
        a = [layer.lora_A["default"].weight.packed_cast[1] for layer in group.layers]
        assert siblings.behind(a) and siblings.rows_of(a).data_ptr() == a[0].data_ptr()
        assert relative(outputs(light, autocast=True), outputs(exact)) < 0.08
        with torch.no_grad():
            for model in (light, exact):
                for name, p in model.named_parameters():
                    if "lora_A" in name:
                        p.mul_(-0.5)


@pytest.mark.parametrize("options, joined", [
    ({"rank_pattern": {"k_proj": 2, "up_proj": 3}, "alpha_pattern": {"k_proj": 4, "up_proj": 6}}, 4),
    ({"alpha_pattern": {"k_proj": 5, "up_proj": 5}}, 0),
    ({"exclude_modules": ["k_proj", "o_proj", "gate_proj", "up_proj"]}, 2),
])  # fmt: skip
def test_adapters_of_other_ranks_scales_and_places(options, joined, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, light = both(**options)
    made = seen(monkeypatch)
    assert relative(outputs(light), outputs(usual)) < 1e-12
    assert len(made["Siblings"]) == joined


def test_checkpointing_and_switched_off_adapters() -> None:
    usual, light = both()
    want = outputs(usual)
    for model in (usual, light):
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model.enable_input_require_grads()
    assert relative(outputs(light), want) < 1e-12
    with usual.disable_adapter(), light.disable_adapter(), torch.no_grad():
        ids = torch.arange(5, 25)[None]
        assert torch.allclose(usual(ids).logits, light(ids).logits, atol=1e-12)


def test_layers_that_read_different_inputs_are_set_apart() -> None:
    usual, light = both()
    ours, theirs = (m.base_model.model.model.layers[0].self_attn for m in (light, usual))
    x, y = torch.randn(2, 1, 3, ours.q_proj.in_features, dtype=torch.float64)
    for _ in range(2):
        for name, given in (("q_proj", x), ("k_proj", y), ("v_proj", x)):
            assert torch.allclose(getattr(ours, name)(given), getattr(theirs, name)(given), atol=1e-12)
    assert ours.q_proj.packed_group.apart and not ours.q_proj.packed_group.waiting


def test_trained_norms_and_all_weights_go_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, light = tiny_model("qwen2", dtype=torch.float64), tiny_model("qwen2", dtype=torch.float64)
    fuse_norms(usual)
    lighten(light)
    made = seen(monkeypatch)
    assert relative(outputs(light), outputs(usual)) < 1e-12
    assert not any(made.values())


@pytest.mark.parametrize("arch, layers", [("llama", 2), ("qwen3", 2), ("gemma2", 0), ("gpt2", 0)])
def test_which_layers_are_the_usual_ones(arch: str, layers: int) -> None:
    model = tiny_model(arch)
    fuse_norms(model)
    assert residual.fuse_residuals(model) == layers
