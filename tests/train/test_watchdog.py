"""The watchdog, on both engines: a run stops before harm is done, names the rows, and the good checkpoints stay."""

from __future__ import annotations

import logging
import multiprocessing
import re
import time

import pytest
import torch
from training import make_pairs, make_trainer, pairs_of, poison, same_weights, spoil_gradient, weights_of

from preference.engine import batching
from preference.train import stalls, trl_collators
from preference.train.watchdog import SHOWN, SpikeMeter, TrainingError, name_rows
from tiny import tiny_model

ENGINES = pytest.mark.parametrize("engine", ["packed", "trl"])


def pairs_with_poison(count: int, at: int):
    rows = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in make_pairs(count)]
    rows[at] = (rows[at][0], rows[at][1], [509, *rows[at][2]])
    return pairs_of(rows)


@ENGINES
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(engine, tmp_path):
    """12 pairs in order, steps of 4 in micro-batches of 2; row 10 spoils step 3, and step 2 was saved."""
    model = poison(tiny_model())
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "train_sampling_strategy": "sequential",
    }
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "model": model}
    trainer = make_trainer(engine, tmp_path, pairs_with_poison(12, 9), **options)
    with pytest.raises(
        TrainingError, match="the loss of step 3 is not finite. Stopped before the optimizer step"
    ) as stopped:
        trainer.train()
    rows = stopped.value.rows
    assert "pairs.jsonl:10" in rows and len(rows) == 2 and str(stopped.value).endswith(", ".join(rows))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    saved = type(tiny_model()).from_pretrained(tmp_path / "checkpoint-2")
    assert same_weights(weights_of(model), weights_of(saved))


@pytest.mark.parametrize("save_steps", [2, 1])
def test_a_bad_step_that_is_read_a_step_later_was_not_taken(save_steps, tmp_path, monkeypatch):
    """As on CUDA: the fused optimizer skips step 3 by itself, and it is named at step 4, or before step 3 is saved."""
    model = poison(tiny_model())
    trainer = make_trainer(
        "packed", tmp_path, pairs_with_poison(20, 9), model=model, save_strategy="steps", save_steps=save_steps,
        train_sampling_strategy="sequential", logging_steps=100, optim="adamw_torch_fused", weight_decay=0.1,
    )  # fmt: skip
    trainer.watchdog.later = True
    judged = []
    judge = trainer.watchdog._judge
    monkeypatch.setattr(
        trainer.watchdog,
        "_judge",
        lambda facts, step: judged.append((step, trainer.state.global_step)) or judge(facts, step),
    )
    with pytest.raises(TrainingError, match="the loss of step 3 is not finite") as stopped:
        trainer.train()
    assert "pairs.jsonl:10" in stopped.value.rows and len(stopped.value.rows) == 4
    assert judged == [(1, 1), (2, 2), (3, 3)]
    assert checkpoint_steps(tmp_path) == ([2] if save_steps == 2 else [1, 2])
    saved = type(tiny_model()).from_pretrained(tmp_path / "checkpoint-2")
    assert same_weights(weights_of(model), weights_of(saved))
    assert {float(state["step"]) for state in trainer.optimizer.optimizer.state.values()} == {2.0}


def checkpoint_steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


@ENGINES
def test_a_gradient_that_is_not_finite_stops_and_names_the_step(engine, tmp_path):
    """The loss is finite, its gradient is not."""

    model = tiny_model()
    spoil_gradient(model)
    before = weights_of(model)
    trainer = make_trainer(engine, tmp_path, make_pairs(8), model=model)
    with pytest.raises(TrainingError, match="the gradient of step 1 is not finite") as stopped:
        trainer.train()
    assert len(stopped.value.rows) == 4
    assert same_weights(before, weights_of(model))


@ENGINES
def test_it_also_watches_where_gradients_are_not_clipped(engine, tmp_path):
    trainer = make_trainer(engine, tmp_path, pairs_with_poison(4, 1), model=poison(tiny_model()), max_grad_norm=0.0)
    with pytest.raises(TrainingError, match="loss of step 1"):
        trainer.train()


@ENGINES
def test_weights_that_are_not_finite_are_never_saved(engine, tmp_path):
    """A learning rate of infinity: loss and gradient of step 1 are finite, the weights after it are not."""
    trainer = make_trainer(
        engine, tmp_path, make_pairs(8), learning_rate=float("inf"), save_strategy="steps", save_steps=1, max_steps=1
    )
    with pytest.raises(TrainingError, match="the weights are not finite after step 1; nothing was written"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_last_steps_weights_are_checked_too(tmp_path):
    trainer = make_trainer("packed", tmp_path, make_pairs(8), learning_rate=float("inf"), max_steps=1)
    with pytest.raises(TrainingError, match="the weights are not finite"):
        trainer.train()


@ENGINES
def test_one_host_sync_a_step(engine, tmp_path, monkeypatch):
    """Counted as reductions that end on the host; logging and saving have their own."""
    trainer = make_trainer(
        engine, tmp_path, make_pairs(16), max_steps=4, logging_steps=4, gradient_accumulation_steps=2
    )
    calls = []
    reduce = trainer.accelerator.reduce
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda x, *rest: calls.append(x.numel()) or reduce(x, *rest))
    trainer.train()
    assert calls.count(5) == 4


def test_spikes_are_told_from_noise():
    meter = SpikeMeter()
    generator = torch.Generator().manual_seed(0)
    falling = [5 - 0.02 * i + 0.1 * float(torch.randn((), generator=generator)) for i in range(150)]
    assert not any(meter(value) for value in falling)
    assert meter(4.5)
    assert meter(4.5)  # it did not become the new normal
    assert not meter(2.1)
    assert not any(SpikeMeter()(value) for value in (1.0, 50.0, 1.0))  # too early to tell


@ENGINES
def test_a_spike_is_reported_with_its_rows(engine, tmp_path, caplog):
    model = tiny_model()
    trainer = make_trainer(engine, tmp_path, make_pairs(100), model=model, max_steps=25, learning_rate=1e-5)
    step = trainer.training_step

    def spoil(*args):
        if trainer.state.global_step == 24:
            with torch.no_grad():
                model.lm_head.weight.mul_(100)
        return step(*args)

    trainer.training_step = spoil
    with caplog.at_level(logging.WARNING, "preference.train.watchdog"):
        trainer.train()
    (message,) = [record.getMessage() for record in caplog.records if record.name == "preference.train.watchdog"]
    assert message.startswith("step 25: the loss is ")
    assert message.count("pairs.jsonl:") == 4


@ENGINES
def test_a_data_worker_that_stands_still_is_reported(engine, tmp_path, monkeypatch, caplog):
    """It waits for a file that is written when the warning is there; then training continues to its end."""
    reported = tmp_path / "reported"

    class Watch(logging.Handler):
        def emit(self, record):
            reported.touch()

    module, name = (batching, "pack_pairs") if engine == "packed" else (trl_collators, "_pad")
    prepare = getattr(module, name)

    def stands_still(*args, **kwargs):
        while multiprocessing.parent_process() and not reported.exists():
            time.sleep(0.01)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(module, name, stands_still)
    monkeypatch.setattr(stalls, "STALL_SECONDS", 0.2)
    watch = Watch()
    stalls.logger.addHandler(watch)
    trainer = make_trainer(engine, tmp_path, make_pairs(8), max_steps=2, dataloader_num_workers=1)
    try:
        trainer.train()
    finally:
        stalls.logger.removeHandler(watch)
    assert trainer.state.global_step == 2
    first = next(record.getMessage() for record in caplog.records if record.name == "preference.train.stalls")
    words = r"rank 0 has waited 0.2 s for the rows of step 1; its data workers: process \d+ (waiting|computing)"
    assert re.fullmatch(words, first)


def test_long_lists_of_rows_are_cut_in_the_message():
    assert name_rows(["a:1", "b:2"]) == "a:1, b:2"
    assert name_rows([f"a:{i}" for i in range(SHOWN + 5)]).endswith(" and 5 more")
    assert name_rows([]) == "unknown"
