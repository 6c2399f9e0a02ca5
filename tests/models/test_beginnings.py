"""PiSSA and OLoRA: peft's training, over the weights as they were handed in."""

from __future__ import annotations

import math

import pytest
import torch
from handed_in import make_plain
from peft import LoraConfig, PeftModel, get_peft_model
from training import logged, make_pairs, make_trainer, same_weights, weights_of
from transformers import AutoModelForCausalLM

from preference.arguments import parse_arguments
from preference.flags.declaration import ArgumentError
from preference.models.adapters import add_adapter
from preference.models.folder import ModelError
from preference.models.hardware import Hardware
from preference.models.loading import adapt, load_base
from preference.models.sources import find_model
from preference.serve.loading import find_source, load_tuned_model
from preference.serve.merging import load_merged
from preference.train.held import HeldHalves
from tiny import tiny_model

CPU = Hardware("cpu", "CPU", 0, False)
IDS = torch.tensor([[1, 5, 9, 77, 300]])
WORDS = ["--lora_rank", "4", "--lora_alpha", "8"]
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_plain(tmp_path_factory.mktemp("begin") / "plain")


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def begun(plain, *words):
    args, source = parse_arguments([*WORDS, *words]), find_model(str(plain))
    return adapt(load_base(source, args, CPU), source, args, write=False, say=print)


def trained(engine, folder, model, held=True, **options):
    trainer = make_trainer(engine, folder, make_pairs(8), model=model, **SGD | options)
    if held:
        trainer.hold(HeldHalves(model))
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind, engine, words", [("pissa", "packed", ()), ("pissa", "trl", ()),
                                                 ("olora", "packed", ("--use_rslora", "true"))])  # fmt: skip
def test_it_trains_as_peft_does_and_lies_over_the_base_that_was_handed_in(plain, tmp_path, kind, engine, words):
    """peft takes its part out of the weights; the same steps there give the same function."""
    start = logits(AutoModelForCausalLM.from_pretrained(plain))
    model = begun(plain, "--init_lora_weights", kind, *words)
    assert torch.allclose(logits(model), start, atol=1e-5)
    trainer = trained(engine, tmp_path / "run", model)
    theirs = AutoModelForCausalLM.from_pretrained(plain)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=kind,
                        use_rslora=bool(words))  # fmt: skip
    other = trained(engine, tmp_path / "peft", get_peft_model(theirs, config), held=False)
    for ours, expected in zip(logged(trainer, "loss", "grad_norm"), logged(other, "loss", "grad_norm"), strict=True):
        assert ours == pytest.approx(expected, rel=1e-4)
    tuned = logits(model)
    assert torch.allclose(tuned, logits(other.model), atol=1e-4) and not torch.allclose(tuned, start, atol=1e-2)

    trainer.save_model(str(tmp_path / "saved"))
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "saved")
    assert torch.allclose(logits(read), tuned, atol=1e-5)
    source = find_source(str(tmp_path / "saved"), base=str(plain))
    assert torch.allclose(logits(load_tuned_model(source, torch.float32, "cpu")), tuned, atol=1e-5)
    merged = load_merged(source, [(IDS[0].tolist(), 2)])[0]
    assert torch.allclose(logits(merged).float(), tuned, atol=1e-4)


def test_half_of_it_stays_and_it_resumes_to_the_bit(plain, tmp_path):
    """Under AdamW with weight decay, whose moments and decay do not ask for a gradient."""
    options = {"optim": "adamw_torch_fused", "weight_decay": 0.1, "learning_rate": 1e-3, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, "loss": "dpo"}
    model = begun(plain, "--init_lora_weights", "pissa_niter_16")
    before = weights_of(model)
    trainer = trained("packed", tmp_path, model, **options)
    assert logged(trainer, "loss")[0][0] == pytest.approx(math.log(2), abs=1e-6)
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            assert torch.equal(weight[4:], before[name][4:]) and not torch.equal(weight[:4], before[name][:4])
        if "lora_B" in name:
            assert torch.equal(weight[:, 4:], before[name][:, 4:]) and not torch.equal(weight, before[name])
    again = begun(plain, "--init_lora_weights", "pissa_niter_16")
    trainer = make_trainer("packed", tmp_path, make_pairs(8), model=again, **SGD | options)
    trainer.hold(HeldHalves(again))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_weights(weights_of(model), weights_of(again))


def test_over_4_bit_weights_and_an_adapter_goes_on_as_any_other(plain, tmp_path):
    four = begun(plain, "--qlora", "true", "--init_lora_weights", "pissa")
    with torch.no_grad(), four.disable_adapter():
        bare = four.eval()(IDS).logits
    assert torch.allclose(logits(four), bare, atol=1e-5)
    assert any(bool(p.any()) for n, p in four.named_parameters() if "lora_B" in n)
    four.save_pretrained(tmp_path / "saved")
    for words in (["--init_lora_weights", "olora"], ["--exclude_modules", "up_proj"]):
        args, source = parse_arguments(words), find_model(str(tmp_path / "saved"), base_given=False)
        with pytest.raises(ModelError, match=f"{words[0]} has no effect on the adapter"):
            adapt(load_base(source, args, CPU), source, args, write=False, say=print)


def test_what_there_is_not_is_refused_with_the_reason():
    for kind, why in (("loftq", "wrong over the whole weights"), ("eva", "activations"), ("lora_ga", "gradients")):
        with pytest.raises(ArgumentError, match=f"init_lora_weights '{kind}': .*{why}.*pissa"):
            parse_arguments(["--init_lora_weights", kind])
    with pytest.raises(ArgumentError, match="one of default, gaussian"):
        parse_arguments(["--init_lora_weights", "pizza"])
    with pytest.raises(ArgumentError, match="strategy=ddp or fsdp"):
        parse_arguments(["--init_lora_weights", "pissa", "--strategy", "zero2"])
    words = ["--init_lora_weights", "pissa", "--lora_rank", "64"]
    with pytest.raises(ModelError, match="lora_rank=16 or less"):
        add_adapter(tiny_model(), parse_arguments(words).model, 0)
