"""strategy=fsdp on two CPU processes: the losses of one, and a checkpoint that plain transformers and peft load."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from architectures import build
from launched import alone, launch, wait_for_step, workers
from peft import PeftModel
from safetensors.torch import load_file
from test_signals import EXIT_STOPPED, folder  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM, PretrainedConfig

from preference.engine import forward
from preference.integrity import fault
from preference.train.checkpoints import checkpoint_folders
from preference.train.sharding import StrategyError, layer_classes, strategy_options


def losses(output: Path) -> list[tuple[float, float]]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]


def done(process, output: Path) -> None:
    assert process.wait(200) == 0, output.with_suffix(".log").read_text()[-4000:]


WORDS = {
    "true": ["--max_steps", "4", "--optim", "adamw_torch", "--sample_tokens", "4", "--save_steps", "2"],
    "false": ["--max_steps", "24", "--optim", "adamw_torch", "--sample_tokens", "4", "--save_steps", "4"],
}


def settings_with(folder: Path, use_peft: str) -> dict[str, str]:  # noqa: F811
    """With evaluation and sample answers before and after, two micro-batches a step, and Adam's state saved."""
    return {
        "use_peft": use_peft, "do_eval": "true", "validation_file_dir": str(folder / "rows.jsonl"),
        "learning_rate": "1e-3",
    } | ({"lora_dropout": "0"} if use_peft == "true" else {})  # fmt: skip


def start(folder: Path, output: Path, use_peft: str):  # noqa: F811
    return launch(folder, output, *WORDS[use_peft], strategy="fsdp", **settings_with(folder, use_peft))


@pytest.fixture(scope="module")
def shared(folder):  # noqa: F811
    """shared(use_peft): the folder of an undisturbed run on two processes."""

    @functools.cache
    def run(use_peft: str) -> Path:
        output = folder / f"shared-{use_peft}"
        done(start(folder, output, use_peft), output)
        return output

    return run


@pytest.mark.slow
@pytest.mark.parametrize("use_peft", ["false", "true"])
def test_shared_out_weights_train_as_whole_ones_do(folder, shared, tmp_path, use_peft):  # noqa: F811
    one, two = tmp_path / "alone", shared(use_peft)
    alone(folder, one, *WORDS[use_peft], **settings_with(folder, use_peft) | {"gradient_accumulation_steps": "4"})
    assert len(losses(one)) == len(losses(two)) == int(WORDS[use_peft][1])
    for step, (a, b) in enumerate(zip(losses(one), losses(two), strict=True), 1):
        assert b == pytest.approx(a, rel=1e-6 if step <= 4 else 1e-5)  # Adam turns rounding into steps
    evaluations = [json.loads((output / "all_results.json").read_text()) for output in (one, two)]
    for name in ("base_eval_loss", "eval_loss"):
        assert evaluations[1][name] == pytest.approx(evaluations[0][name], rel=1e-6 if use_peft == "true" else 1e-5)
    samples = [json.loads((output / "samples.json").read_text()) for output in (one, two)]
    assert samples[0] == samples[1]
    name = "adapter_model.safetensors" if use_peft == "true" else "model.safetensors"
    expected, actual = load_file(one / name), load_file(two / name)
    assert expected.keys() == actual.keys()
    near = {"true": 1e-5, "false": 1e-4}[use_peft]  # after 4 steps of at most 1e-3 each, and after 24
    assert all((expected[key] - actual[key]).abs().max() < near for key in expected)
    [checkpoint, *_] = checkpoint_folders(two)
    assert fault(checkpoint) is None and checkpoint.name == f"checkpoint-{WORDS[use_peft][1]}"

    def load(path: Path) -> torch.nn.Module:
        if use_peft == "false":
            return AutoModelForCausalLM.from_pretrained(path)
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), path)

    ids = torch.tensor([[1, 5, 9]])
    logits = [load(path)(ids).logits for path in (one, two, checkpoint)]
    assert torch.allclose(logits[1], logits[0], atol=10 * near) and torch.equal(logits[1], logits[2])


@pytest.mark.slow
def test_one_rank_of_a_sharded_run_gets_a_signal_and_all_stop_and_it_resumes(folder, shared, tmp_path):  # noqa: F811
    """Losses of the steps after the stop are those of an undisturbed run; Adam's state was gathered and dealt again."""
    parts = tmp_path / "parts"
    process = start(folder, parts, "false")
    wait_for_step(parts, process, 5)
    os.kill(workers(process.pid)[1], signal.SIGUSR1)
    code, log = process.wait(60), parts.with_suffix(".log")
    assert code == EXIT_STOPPED, log.read_text()[-3000:]
    [checkpoint, *_] = checkpoint_folders(parts)
    assert fault(checkpoint) is None and not (parts / "model.safetensors").exists()
    done(start(folder, parts, "false"), parts)
    assert f"resuming from {checkpoint}" in log.read_text() and "Traceback" not in log.read_text()
    assert losses(parts) == losses(shared("false"))


def test_the_head_is_called_where_it_closes_a_group(monkeypatch):
    """torch before 2.13 ends a group of modules with the forward of its last one; the packed head reads the weight."""

    class Sharded(torch.nn.Linear):
        pass

    monkeypatch.setattr(forward, "FSDPModule", Sharded)
    shapes, found = [], []
    for kind in (torch.nn.Linear, Sharded):
        layer = kind(4, 7, bias=False)
        torch.nn.init.eye_(layer.weight)
        layer.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
        forward._score(layer, torch.eye(4, 4)[:3], torch.tensor([0, 5, 2]), PretrainedConfig()).sum().backward()
        found.append(layer.weight.grad)
    assert shapes == [(0, 7)] and torch.equal(*found)


def test_what_cannot_be_had_is_refused():
    with pytest.raises(StrategyError, match="NPROC=2 strategy=fsdp"):
        strategy_options("fsdp", 1)
    assert strategy_options("ddp", 1) == {}
    assert strategy_options("fsdp", 2)["fsdp_config"]["version"] == 2


def test_parameters_that_are_dealt_out_are_counted_whole():
    """As ZeRO-3 leaves them: the learning rate and the disk space depend on the count."""
    from preference.models.parameters import count_parameters
    from preference.train.checkpoints import SMALL_FILES, checkpoint_bytes

    model = torch.nn.Linear(3, 4, bias=False)
    assert count_parameters(model) == (12, 12)
    model.weight.data, model.weight.ds_numel = torch.empty(0), 12
    assert count_parameters(model) == (12, 12)
    assert checkpoint_bytes(model, "adamw_torch") == (48, 48 + 96 + SMALL_FILES)


def test_deepspeed_is_asked_for_where_it_is_missing(monkeypatch):
    from preference.train import sharding

    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StrategyError, match="pip install deepspeed, or strategy=fsdp"):
        strategy_options("zero3", 2)
    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: name)
    for strategy in ("zero2", "zero3", "zero3_offload"):
        config = json.loads(Path(strategy_options(strategy, 2)["deepspeed"]).read_text())
        assert config["zero_optimization"]["stage"] == int(strategy[4])


def test_layers_that_a_model_does_not_have_are_not_looked_for() -> None:
    assert "Qwen3_5VisionBlock" in build("qwen3_5_text")._no_split_modules
    assert layer_classes(build("qwen3_5_text")) == ["Qwen3_5DecoderLayer"]
    assert layer_classes(build("llama")) == ["LlamaDecoderLayer"]
