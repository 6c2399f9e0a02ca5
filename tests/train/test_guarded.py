"""The trainers' overrides are the ones that they list; what they delegate to works without a Trainer."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

from preference.integrity import fault, read_manifest
from preference.launch.signals import StoppedBySignal, StopSignals
from preference.losses import PairLogps
from preference.train import sharding
from preference.train.checkpoints import CheckpointError, CheckpointWriter, checkpoint_folders
from preference.train.guarded import GuardedTrainer
from preference.train.scores import MetricSums, PairScores
from preference.train.stopping import StopTogether
from preference.train.trainer import PairTrainer
from preference.train.watchdog import TrainingError, Watchdog


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("kind", [GuardedTrainer, PairTrainer])
def test_the_overrides_are_the_ones_that_are_listed(kind):
    listed = re.findall(r"^    - ([\w, ]+):", kind.__doc__, re.M)
    names = {name for line in listed for name in line.split(", ")}
    overrides = {name for name in vars(kind) if hasattr(Trainer, name) and not name.startswith("__")}
    assert names == overrides


def test_a_watchdog_without_a_trainer(accelerator):
    dog = Watchdog(accelerator)
    dog.watch(torch.tensor(1.0), ["a:1"], 1)
    dog.check(torch.tensor(0.5), 1)
    assert not dog.watched
    dog.watch(torch.tensor(1.0), ["a:1"], 2)
    dog.watch(torch.tensor(float("nan")), ["a:2"], 2)
    with pytest.raises(TrainingError, match="the loss of step 2 is not finite.*: a:2$"):
        dog.check(torch.tensor(0.5), 2)
    dog.watch(torch.tensor(1.0), ["a:3"], 3)
    with pytest.raises(TrainingError, match="the gradient of step 3 is not finite.*: a:3$"):
        dog.check(torch.tensor(float("inf")), 3)
    layer = torch.nn.Linear(2, 2)
    dog.require_finite(layer, 4)
    layer.weight.data[0, 0] = float("inf")
    with pytest.raises(TrainingError, match="the weights are not finite after step 4"):
        dog.require_finite(layer, 4)


def test_a_checkpoint_writer_without_a_trainer(accelerator, tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True, save_total_limit=1)
    writer = CheckpointWriter(args, accelerator)
    writer.run = {"run": "r"}

    def save(step: int, name: str) -> None:
        folder = tmp_path / writer.place("no, elsewhere") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / name).write_text("weights")

    for step in (1, 2):
        writer.write(step, lambda step=step: save(step, "model.safetensors"))
    [kept] = checkpoint_folders(tmp_path)
    assert kept.name == "checkpoint-2" and fault(kept) is None and read_manifest(kept)["step"] == 2
    assert writer.place("here") == "here"
    with pytest.raises(CheckpointError, match="checkpoint-3 could not be written: OSError: .*the last good .*-2"):
        writer.write(3, lambda: save(3, "notes.txt"))


def test_stopping_without_a_trainer(accelerator):
    signals = StopSignals()
    stop = StopTogether(SimpleNamespace(accelerator=accelerator), signals)
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=True)
    stop.on_pre_optimizer_step(None, None, control)
    stop.on_step_end(None, None, control)
    assert not control.should_training_stop
    signals.received = "SIGTERM"
    with pytest.raises(StoppedBySignal):
        stop.on_prediction_step(None, SimpleNamespace(global_step=0), control)
    with pytest.raises(StoppedBySignal):
        stop.start_training()
    stop.on_step_end(None, None, control)
    assert control.should_save and control.should_training_stop and not control.should_evaluate


def test_scores_without_a_trainer(accelerator):
    sums = MetricSums()
    sums.add({"loss": torch.tensor(2.0)}, 0.5)
    sums.add({"loss": torch.tensor(4.0)}, 0.5)
    sums.steps = 2
    assert sums.read(accelerator) == {"loss": 1.5} and sums.read(accelerator) == {}
    scores = PairScores(3, torch.device("cpu"))
    zeros = torch.zeros(2)
    chosen, rejected, weight = torch.tensor([-1.0, -9.0]), torch.tensor([-2.0, -9.0]), torch.tensor([1.0, 0.0])
    logps = PairLogps(chosen, rejected, zeros, zeros, zeros, zeros, weight)
    scores.add(torch.tensor([2, 0]), logps)
    assert np.array_equal(scores.read(accelerator), [[0, 0], [0, 0], [-1, -2]])


def test_sharding_without_a_trainer():
    model = torch.nn.Linear(2, 2)
    model._is_accelerate_prepared, model._original_forward = True, model.forward
    model.forward = None
    sharding.forget_preparation(model)
    assert not model._is_accelerate_prepared and model(torch.zeros(1, 2)).shape == (1, 2)
    model.all_tied_weights_keys = {"head": "embedding"}
    assert sharding.without_copies({"head": 1, "embedding": 1, "x": 2}, model) == {"embedding": 1, "x": 2}
    assert sharding.without_copies({"head": 1, "x": 2}, model) == {"head": 1, "x": 2}
