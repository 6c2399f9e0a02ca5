"""float16 with a gradient scaler: which runs take it, what is held in it, and what an overflow does."""

from __future__ import annotations

import math
import re

import pytest
import torch
from handed_in import make_plain
from training import arguments, logged, lora, make_pairs, make_trainer, same_weights, spoil_gradient, weights_of
from transformers import TrainerCallback

from preference.arguments import parse_arguments
from preference.flags.declaration import ArgumentError
from preference.models.hardware import Hardware, half_type, type_name
from preference.models.loading import adapt, load_base
from preference.models.sources import find_model
from preference.models.vocabulary import add_rows
from preference.report.tables import greedy_answers
from preference.train.watchdog import TrainingError
from tiny import tiny_model, tiny_tokenizer

T4 = Hardware("cuda", "Tesla T4", 15 * 2**30, bf16=False, fp16=True)
TOO_HIGH = 2.0**30  # a scale at which the gradients of the tiny model overflow


def test_it_is_taken_where_a_gpu_has_no_bfloat16_and_where_it_is_asked_for(tmp_path):
    a100, cpu = Hardware("cuda", "A100", 0, bf16=True), Hardware("cpu", "CPU", 0, bf16=False)
    for hardware, bf16, fp16, expected in (
        (T4, None, None, torch.float16), (T4, None, False, None), (T4, True, None, torch.bfloat16),
        (a100, None, None, torch.bfloat16), (a100, None, True, torch.float16), (a100, False, None, None),
        (cpu, None, None, None), (cpu, None, True, torch.float16),
    ):  # fmt: skip
        found = half_type(arguments(tmp_path, **hardware.precision(bf16, fp16)))
        assert found is expected, (hardware, bf16, fp16)
    assert type_name(torch.float16) == "float16" and type_name(None) == "float32" and str(T4).endswith("float16")
    with pytest.raises(ArgumentError, match="bf16=true and fp16=true"):
        parse_arguments(["--bf16", "true", "--fp16", "true"])


def test_frozen_weights_are_held_in_it_and_trained_ones_are_not(tmp_path):
    """Also whole layers and rows of new tokens, which peft would train in the type of the base."""
    args = parse_arguments(["--modules_to_save", "norm", "--add_tokens", "<a>"])
    source, tokenizer = (
        find_model(str(make_plain(tmp_path / "plain", vocab_size=len(tiny_tokenizer())))),
        tiny_tokenizer(),
    )
    tokenizer.add_tokens(["<a>"])
    base = load_base(source, args, T4, torch.float16)
    model = adapt(base, source, args, write=False, say=print, grow=lambda lm: add_rows(lm, tokenizer, ["<a>"]))
    types = {p.requires_grad: set() for p in model.parameters()}
    for p in model.parameters():
        types[p.requires_grad].add(p.dtype)
    assert types == {False: {torch.float16}, True: {torch.float32}}
    trained = " ".join(name for name, p in model.named_parameters() if p.requires_grad)
    assert all(part in trained for part in ("lora_B", "modules_to_save", "trainable_tokens"))
    assert greedy_answers(model, tokenizer, [[5, 6, 7]], [0], 4)  # without a trainer's autocast


def test_four_bit_weights_compute_in_it(tmp_path):
    args = parse_arguments(["--qlora", "true"])
    cpu = Hardware("cpu", "CPU", 0, False)
    model = load_base(find_model(str(make_plain(tmp_path / "plain"))), args, cpu, torch.float16)
    assert model.model.layers[0].mlp.up_proj.compute_dtype is torch.float16


@pytest.mark.parametrize("engine, loss", [("packed", "orpo"), ("packed", "dpo"), ("trl", "orpo"), ("trl", "dpo")])
def test_it_trains_as_float32_does(engine, loss, tmp_path):
    """Products are float16, as the weights under an adapter are; losses and log-probabilities are not rounded to it."""
    found = {}
    for half in (False, True):
        trainer = make_trainer(
            engine, tmp_path, make_pairs(8), eval_pairs=make_pairs(4, 1), model=lora(tiny_model()), loss=loss, fp16=half
        )
        first = trainer.evaluate()["eval_loss"]
        trainer.train()
        found[half] = [(first, 0.0), *logged(trainer, "loss", "grad_norm")]
    assert trainer.accelerator.scaler.get_scale() == 65536 and trainer.watchdog.skipped == 0
    assert found[True] != found[False]
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    if loss == "dpo":
        assert found[True][0][0] == pytest.approx(math.log(2), abs=1e-6)


def test_what_leaves_a_forward_is_float32(tmp_path):
    seen = []
    model = lora(tiny_model())
    trainer = make_trainer("packed", tmp_path, make_pairs(4), model=model, fp16=True, max_steps=1)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logps = trainer._logps

    def keep(*given):
        found = logps(*given)
        seen.append(found.chosen_B.dtype)
        return found

    trainer._logps = keep
    trainer.train()
    assert seen == [torch.float16, torch.float32] and layer.base_layer.weight.dtype is torch.float16


class Steps(TrainerCallback):
    """Weights and optimizer before each step, and the learning rate after it."""

    def __init__(self, model):
        self.model, self.weights, self.moments, self.rates = model, [], [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.weights.append(weights_of(self.model))
        self.moments.append([float(v.double().sum()) for s in optimizer.state.values() for v in s.values()])

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


@pytest.mark.parametrize("engine, optim", [("packed", "adamw_torch_fused"), ("trl", "adamw_torch")])
def test_an_overflow_skips_the_step_and_halves_the_scale(engine, optim, tmp_path, caplog):
    """Weights and optimizer stay as they are. The learning rate moves on as transformers has it: an optimizer that
    skips by itself (fused) counts as having stepped.
    """
    model = lora(tiny_model())
    options = {"optim": optim, "max_steps": 14, "lr_scheduler_type": "linear", "logging_steps": 14}
    trainer = make_trainer(engine, tmp_path, make_pairs(4), model=model, fp16=True, **options)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=TOO_HIGH)
    seen = Steps(model)
    trainer.add_callback(seen)
    trainer.train()
    skipped = [int(number) for number in re.findall(r"step (\d+) is skipped: its gradient overflows", caplog.text)]
    assert skipped[0] == 1 and f"overflows float16 at a scale of {TOO_HIGH:g}, which is now halved" in caplog.text
    assert 1 < len(skipped) == trainer.watchdog.skipped < 13
    assert trainer.accelerator.scaler.get_scale() == TOO_HIGH / 2 ** len(skipped)
    for step, (before, after) in enumerate(zip(seen.weights, seen.weights[1:], strict=False), 1):
        assert same_weights(before, after) == (step in skipped), step
        moments = [any(seen.moments[i]) and seen.moments[i] for i in (step - 1, step)]
        assert (moments[0] == moments[1]) == (step in skipped), step
        stays = step in skipped and optim == "adamw_torch"
        assert (seen.rates[step - 1] == (1e-2 if step == 1 else seen.rates[step - 2])) == stays, step


def test_it_resumes_to_the_bit_with_its_scale(tmp_path):
    options = {"fp16": True, "max_steps": 16, "save_strategy": "steps", "save_steps": 10, "learning_rate": 1e-3}

    def trained(checkpoint=None):
        model = lora(tiny_model())
        trainer = make_trainer("packed", tmp_path, make_pairs(4), model=model, **options)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=TOO_HIGH, growth_interval=4)
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights_of(model), trainer.accelerator.scaler.state_dict(), trainer.watchdog.skipped

    weights, scale, skipped = trained()
    assert (tmp_path / "checkpoint-10/scaler.pt").is_file() and skipped
    again, scale_again, skipped_again = trained(str(tmp_path / "checkpoint-10"))
    assert same_weights(weights, again) and scale == scale_again and skipped_again < skipped


def test_an_overflow_at_the_lowest_scale_stops(tmp_path):
    """As a gradient that is too large by itself does in every precision; so does a run that skipped every step."""

    def spoiled(engine, steps):
        model = tiny_model()
        spoil_gradient(model)
        before = weights_of(model)
        trainer = make_trainer(engine, tmp_path, make_pairs(4), model=model, fp16=True, max_steps=steps)
        with pytest.raises(TrainingError) as stopped:
            trainer.train()
        assert same_weights(before, weights_of(model))
        return str(stopped.value)

    assert (
        "gradient of step 17 is not finite" in (said := spoiled("packed", 20))
        and "fp16=false computes without it" in said
    )
    assert "nothing was learned: the gradient of each of the 3 steps overflows float16" in spoiled("trl", 3)
