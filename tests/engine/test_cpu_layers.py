"""Layers whose forward the packed engine replaces on a CPU: the same numbers, less work and memory."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import build
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.activations import ACT2FN

from preference.engine.cpu.gated_norm import _GatedNorm, save_memory_in_gated_norms
from preference.engine.cpu.norm import _RMSNorm, save_memory_in_norms
from preference.engine.layers.gated import _Gated, save_memory_in_gated_layers
from preference.engine.layers.linear import cast_once, save_memory_in_linear_layers
from preference.engine.layers.lora import _Adapted, hold_frozen, join_adapters
from preference.engine.probe import prepare_model
from tiny import tiny_model


def adapted(dtype: torch.dtype = torch.float32, **options):
    """A tiny Qwen2 (its query, key and value have biases) with adapters that do something."""
    model = get_peft_model(tiny_model("qwen2", dtype=dtype), LoraConfig(target_modules="all-linear", r=4, **options))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def outputs(model, autocast: bool = False) -> list[torch.Tensor]:
    """Logits, then the gradients of everything trained."""
    ids = torch.arange(5, 25)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids, use_cache=False).logits.double()
    grads = torch.autograd.grad(logits.square().sum(), [p for p in model.parameters() if p.requires_grad])
    return [logits, *grads]


def relative(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(((x - y).norm() / y.norm().clamp(min=1e-9)).item() for x, y in zip(a, b, strict=True))


def calls(monkeypatch, function) -> list[int]:
    """A list that grows whenever `function`, a class of torch.autograd.Function, is applied."""
    made, apply = [], function.apply
    monkeypatch.setattr(function, "apply", lambda *args: made.append(1) or apply(*args))
    return made


# ---- adapters


def test_a_joined_adapter_is_pefts(monkeypatch) -> None:
    usual, joined = adapted(torch.float64), adapted(torch.float64)
    made = calls(monkeypatch, _Adapted)
    assert join_adapters(joined) == 14
    assert relative(outputs(joined), outputs(usual)) < 1e-12 and len(made) == 14


def test_under_autocast_it_differs_by_rounding() -> None:
    exact, usual, joined = adapted(), adapted(), adapted()
    join_adapters(joined)
    runs = [outputs(exact), outputs(usual, autocast=True), outputs(joined, autocast=True)]
    want, theirs, ours = (torch.cat([x.detach().double().flatten() for x in run]) for run in runs)
    assert 0 < (ours - want).norm() < 1.1 * (theirs - want).norm()


@pytest.mark.parametrize("how", ["dropout", "dora", "disabled", "merged", "two adapters"])
def test_what_is_more_than_one_plain_adapter_goes_pefts_way(how: str, monkeypatch) -> None:
    options = {"dropout": dict(lora_dropout=0.5), "dora": dict(use_dora=True)}.get(how, {})
    usual = adapted(**options)
    joined = copy.deepcopy(usual)
    join_adapters(joined)
    made = calls(monkeypatch, _Adapted)
    found = []
    for model in (joined, usual):
        model.train()
        if how == "disabled":
            model.base_model.disable_adapter_layers()
        if how == "merged":
            model.merge_adapter()
        if how == "two adapters":
            torch.manual_seed(2)
            model.add_adapter("other", LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
            model.base_model.set_adapter(["default", "other"])
        torch.manual_seed(3)
        found.append(model(torch.arange(5, 25)[None]).logits)
    assert torch.equal(*found) and not made


def test_held_weights_change_no_bit_under_autocast() -> None:
    usual, held = adapted(), adapted()
    for model in (usual, held):
        join_adapters(model)
    linear = sum(m.base_layer.weight.nbytes for m in held.modules() if hasattr(m, "base_layer"))
    assert hold_frozen(held, torch.bfloat16) == linear / 2
    assert held.get_base_model().lm_head.weight.dtype == torch.float32
    pairs = zip(outputs(held, autocast=True), outputs(usual, autocast=True), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_dora_which_takes_norms_of_weights_keeps_them() -> None:
    model = adapted(use_dora=True)
    assert hold_frozen(model, torch.bfloat16) == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_held_weights_generate_with_and_without_the_adapter() -> None:
    model = adapted()
    join_adapters(model)
    plain = model(torch.arange(5, 25)[None]).logits
    hold_frozen(model, torch.bfloat16)
    rounded = model(torch.arange(5, 25)[None]).logits
    assert rounded.dtype == torch.float32 and 0 < float((rounded - plain).norm() / plain.norm()) < 0.02
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer(torch.randn(2, layer.in_features)).dtype == torch.float32
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] > 3
    with model.disable_adapter():
        untuned = model(torch.arange(5, 25)[None]).logits
    base = tiny_model("qwen2")(torch.arange(5, 25)[None]).logits
    assert 0 < float((untuned - base).norm() / base.norm()) < 0.02


# ---- linear layers


def test_linear_layers_under_autocast_are_the_same_to_the_bit() -> None:
    usual, shared = tiny_model("qwen2"), tiny_model("qwen2")
    save_memory_in_linear_layers(shared)
    names = ["logits", *(name for name, _ in usual.named_parameters())]
    for name, a, b in zip(names, outputs(shared, autocast=True), outputs(usual, autocast=True), strict=True):
        # the gradient of a bias is summed in float32 here, in bfloat16 there
        assert torch.allclose(a, b, rtol=0.1, atol=0.01) if name.endswith("bias") else torch.equal(a, b), name
    assert "forward" in vars(shared.model.layers[0].mlp.up_proj) and "forward" not in vars(shared.lm_head)


def test_a_cast_is_shared_until_its_source_changes_or_goes() -> None:
    x = torch.randn(4)
    first = cast_once(x, torch.bfloat16)
    assert cast_once(x, torch.bfloat16) is first and torch.equal(first, x.to(torch.bfloat16))
    x.add_(1)
    assert torch.equal(cast_once(x, torch.bfloat16), x.to(torch.bfloat16))
    assert cast_once(x, torch.float16).dtype == torch.float16
    del x
    assert not len(cast_once.result)


# ---- gated layers


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["all weights", "adapter", "adapter with dropout"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gated_layers_are_the_same_to_the_bit_and_keep_less(how, autocast, checkpointing) -> None:
    options = dict(lora_dropout=0.5) if how == "adapter with dropout" else {}
    usual = tiny_model("qwen2") if how == "all weights" else adapted(**options)
    light = copy.deepcopy(usual)
    found, kept = [], []
    for model in (usual, light):
        join_adapters(model)
        save_memory_in_linear_layers(model.get_base_model() if hasattr(model, "get_base_model") else model)
        if model is light:
            assert save_memory_in_gated_layers(model) == 2
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(0)
        found.append(outputs(model, autocast))
        kept.append(inner_tensors_kept(model, autocast))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept == ([0, 0] if checkpointing else {"adapter with dropout": [10, 8]}.get(how, [8, 4]))


def inner_tensors_kept(model, autocast: bool) -> int:
    """Different tensors of the inner width of the feed-forward layers that a forward leaves for the backward."""
    inner, kept = model.config.intermediate_size, {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.dim() > 1 and x.shape[-1] == inner and x.shape[-2] == 20:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        model(torch.arange(5, 25)[None], use_cache=False).logits.sum()
    return len(kept)


@pytest.mark.parametrize("arch, found", [("llama", 2), ("qwen3", 2), ("gemma2", 2), ("gpt2", 0), ("phi3", 0)])
def test_other_feed_forward_layers_are_left_alone(arch: str, found: int, monkeypatch) -> None:
    usual, light = tiny_model(arch), tiny_model(arch)
    made = calls(monkeypatch, _Gated)
    assert save_memory_in_gated_layers(light) == found
    made.clear()
    assert relative(outputs(light), outputs(usual)) < 1e-6 and len(made) == found


def test_a_feed_forward_layer_with_a_part_more_is_left_alone() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.dropout = nn.Dropout(0.1)  # which a class may use or not
    assert save_memory_in_gated_layers(model) == 1


# ---- norms


def test_the_norm_has_its_formulas_gradient() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,)))
    for offset in (0.0, 1.0):
        want = (weight + offset) * x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()
        assert torch.allclose(_RMSNorm.apply(x, weight, 0.1, offset), want)
        assert torch.autograd.gradcheck(lambda x, w, offset=offset: _RMSNorm.apply(x, w, 0.1, offset), (x, weight))


@pytest.mark.parametrize("arch, found", [("llama", 5), ("qwen3", 9), ("gemma2", 9), ("gpt2", 0)])
def test_norms_that_do_something_else_are_left_alone(arch: str, found: int, monkeypatch) -> None:
    usual, light = tiny_model(arch), tiny_model(arch)
    made = calls(monkeypatch, _RMSNorm)
    assert save_memory_in_norms(light) == found
    made.clear()
    assert relative(outputs(light), outputs(usual)) < 1e-5 and len(made) == found


def test_a_norm_with_a_gate_has_its_formulas_gradient() -> None:
    torch.manual_seed(0)
    x, gate, weight = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((7, 5), (7, 5), (5,)))
    for name in ("silu", "sigmoid"):
        act = ACT2FN[name]
        want = weight * x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt() * act(gate)
        assert torch.allclose(_GatedNorm.apply(x, gate, weight, 0.1, act), want)
        assert torch.autograd.gradcheck(lambda *args, act=act: _GatedNorm.apply(*args, 0.1, act), (x, gate, weight))


@pytest.mark.parametrize("arch, found", [("qwen3_5_text", True), ("mamba2", False)])
def test_norms_with_another_gate_are_left_alone(arch: str, found: bool, monkeypatch) -> None:
    """Mamba 2's norm has its gate in front."""
    usual, light = build(arch), build(arch)
    made = calls(monkeypatch, _GatedNorm)
    norms = save_memory_in_gated_norms(light)
    made.clear()
    assert relative(outputs(light), outputs(usual)) < 1e-3  # the smallest gradients are differences of float32
    assert len(made) == norms and (norms > 0) == found


def test_the_engine_uses_all_of_them(monkeypatch) -> None:
    model = adapted()
    prepare_model(model)
    made = [calls(monkeypatch, function) for function in (_Adapted, _RMSNorm, _Gated)]
    outputs(model, autocast=True)
    assert [len(x) for x in made] == [14, 5, 2]
