"""Which layers get an adapter, and which none, where experts are stacked in one tensor."""

from __future__ import annotations

import pytest
from test_adapters import MIXTURES
from transformers import AutoModelForCausalLM, Gemma3Config

from preference.arguments import parse_arguments
from preference.models.adapters import add_adapter
from preference.models.folder import ModelError
from preference.models.targets import beside_the_language, find_targets, left_out
from tiny import tiny_model


def adapted(arch, *words):
    """(names of what is trained, what is left out) of a tiny mixture with an adapter."""
    args = parse_arguments(list(words)).model
    model = tiny_model(arch, **MIXTURES[arch])
    targets = find_targets(model, args)
    model = add_adapter(model, args, 0)
    return [name for name, p in model.named_parameters() if p.requires_grad], left_out(model, targets)


@pytest.mark.parametrize("names, experts", [("experts", 0), ("gate_up_proj,down_proj", 0), ("gate_up_proj", 4),
                                            ("model.layers.1.mlp.experts", 4), ("q_proj", 8)])  # fmt: skip
def test_exclude_modules_reaches_stacked_experts(names, experts):
    trained, left = adapted("qwen3_moe", "--exclude_modules", names)
    assert len([name for name in trained if "experts" in name]) == experts and not left
    assert any("q_proj" in name for name in trained) == (names != "q_proj") and any("v_proj" in n for n in trained)
    if experts == 4 and "layers.1" in names:
        assert all("layers.0" in name for name in trained if "experts" in name)


def test_what_stacked_experts_cannot_have_is_refused():
    for words, match in (
        (["--exclude_modules", "up_proj"], "gate_proj and up_proj of the experts are one tensor, gate_up_proj"),
        (["--exclude_modules", "w1"], "the model has no w1; its linear layers are down_proj, gate_up_proj, k_proj"),
        (["--exclude_modules", "mlp"], "no layer that target_modules=all names is mlp"),
        (["--target_modules", "q_proj", "--exclude_modules", "v_proj"], "no layer that target_modules=q_proj names is"),
        (["--target_modules", "mlp"], "target_modules: the model has no mlp; its linear layers are "),
        (["--target_modules", "q_norm"], "target_modules q_norm cannot be had: Target module .* is not supported"),
        (["--lora_dropout", "0.1"], "lora_dropout: the experts .* lora_dropout=0, or exclude_modules=experts"),
        (["--use_dora", "true"], "use_dora: the experts of this model are stacked"),
        (["--init_lora_weights", "pissa"], "pissa begins in linear layers, and .*experts.* is none: leave it out"),
    ):
        with pytest.raises(ModelError, match=match):
            adapted("qwen3_moe", *words)
    adapted("qwen3_moe", "--lora_dropout", "0.1", "--init_lora_weights", "pissa", "--exclude_modules", "experts")


def test_both_halves_of_a_tensor_of_experts_name_it():
    for arch in ("qwen2_moe", "qwen3_moe"):
        trained, _ = adapted(arch, "--exclude_modules", "up_proj,gate_proj")
        assert any("experts" in name or "down_proj" in name for name in trained)
        assert not any("up_proj" in name for name in trained) and len([n for n in trained if "experts" in n]) in (0, 4)


def test_what_peft_leaves_out_is_told():
    _, left = adapted("qwen2_moe")
    assert left == [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]


def test_what_no_text_goes_through_gets_no_adapter():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = sizes | {"vocab_size": 512, "head_dim": 8, "num_key_value_heads": 2}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model, args = AutoModelForCausalLM.from_config(config), parse_arguments([]).model
    assert len(beside_the_language(model)) > 5 and not beside_the_language(tiny_model())
    trained = [name for name, p in add_adapter(model, args, 0).named_parameters() if p.requires_grad]
    assert len(trained) == 14 and all("language_model.layers" in name for name in trained)
