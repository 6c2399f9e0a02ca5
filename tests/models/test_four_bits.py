"""LoRA over 4-bit weights, on a CPU: the numbers are those over the weights that the four bits stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from handed_in import dequantized, make_plain
from peft import get_peft_model
from training import logged, make_pairs, make_trainer

from preference.arguments import parse_arguments
from preference.engine.forward import pair_logps
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.models.hardware import Hardware
from preference.models.loading import adapt, load_base
from preference.models.sources import find_model
from preference.serve.loading import find_source, load_tuned_model
from preference.serve.merging import load_merged

CPU = Hardware("cpu", "CPU", 0, False)
PROBES = [([1, 5, 9, 77, 300], 2)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_plain(tmp_path_factory.mktemp("four") / "plain")


ARGS = ("--qlora", "true", "--lora_rank", "4", "--lora_alpha", "8")


def four_bit_base(plain, said):
    return load_base(find_model(str(plain)), parse_arguments(ARGS), CPU, None, said.append)


def four_bit(plain, said=None):
    base = four_bit_base(plain, [] if said is None else said)
    model = adapt(base, find_model(str(plain)), parse_arguments(ARGS), write=False, say=print)
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def same_adapter(model, adapted):
    """A LoRA over `model` with the weights of that of `adapted`."""
    twin = get_peft_model(model, copy.deepcopy(adapted.peft_config["default"]))
    weights = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    for name, p in twin.named_parameters():
        if "lora_" in name:
            p.data.copy_(weights[name])
    return twin


def gradients(model):
    prepare_model(model)
    with torch.no_grad():  # as an evaluation before training does
        model.eval()(torch.tensor([[1, 5, 9]]))
    model.train()
    logps = pair_logps(model, pack_pairs(list(make_pairs(4))))
    (logps.chosen_B - logps.rejected_B).sum().backward()
    return logps.chosen_B.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_over_the_dequantised_weights(plain):
    said = []
    model = four_bit(plain, said)
    assert "slow on a CPU" in said[0]
    assert sum(type(p).__name__ == "Params4bit" for p in model.parameters()) == 14
    logps, found = gradients(model)
    expected_logps, expected = gradients(same_adapter(dequantized(four_bit_base(plain, [])), model))
    assert torch.allclose(logps, expected_logps, rtol=1e-5) and len(found) == 28 and found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], atol=1e-5 * float(expected[name].norm()), rtol=0), name


def test_both_engines_train_it_alike_and_it_is_saved_resumed_served_and_merged(plain, tmp_path):
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_steps": 4, "save_strategy": "steps"}
    packed = make_trainer("packed", tmp_path / "packed", make_pairs(4), model=four_bit(plain), save_steps=2, **options)
    packed.train()
    trl = make_trainer("trl", tmp_path / "trl", make_pairs(4), model=four_bit(plain), save_steps=9, **options)
    trl.train()
    for ours, theirs in zip(logged(packed, "loss", "grad_norm"), logged(trl, "loss", "grad_norm"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    again = make_trainer("packed", tmp_path / "packed", make_pairs(4), model=four_bit(plain), save_steps=9, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "packed/checkpoint-2"))
    assert logged(again, "loss", "grad_norm") == logged(packed, "loss", "grad_norm")

    packed.save_model(str(tmp_path / "saved"))
    source = find_source(str(tmp_path / "saved"), base=str(plain))
    served = load_tuned_model(source, torch.float32, "cpu")
    with torch.no_grad():
        logits = served(torch.tensor([PROBES[0][0]])).logits[0, 1:]
    merged, exact, difference = load_merged(source, PROBES)
    assert difference is not None and torch.allclose(exact.float(), logits, atol=1e-4)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
