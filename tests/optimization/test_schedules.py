"""Learning rates over a run: a warm-up that starts above 0, and everything else as transformers has it."""

from __future__ import annotations

import pytest
import torch
from training import make_pairs, make_trainer, same_weights, weights_of
from transformers import get_scheduler

from preference.optimization.keywords import OptimizationError, keywords
from preference.optimization.optimizers import check_optimizer, optimizer_names
from preference.optimization.schedules import check_schedule, make_schedule, schedule_names, warmup_length

STEPS = 20
OPTIONS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-6},
    "warmup_stable_decay": {"num_decay_steps": 6, "warmup_type": "1-sqrt"},
}
BY_STEP = [name for name in schedule_names() if name not in ("reduce_lr_on_plateau", "greedy")]


def rates(make, steps: int = STEPS) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    schedule, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", BY_STEP)
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_only_the_warm_up_differs_from_transformers(name, warmup):
    options = OPTIONS.get(name, {})
    ours = rates(lambda optimizer: make_schedule(name, optimizer, warmup, STEPS, options, 1e-3))
    theirs = rates(lambda optimizer: get_scheduler(name, optimizer, warmup, STEPS, dict(options)))
    assert ours[warmup:] == theirs[warmup:] and ours[0] > 0
    assert ours[:warmup] == sorted(ours[:warmup]) and max(ours) <= 1e-3
    if name == "linear" and warmup:
        assert ours[:warmup] == pytest.approx([1e-3 * (i + 1) / (warmup + 1) for i in range(warmup)])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_the_default_warm_up_leaves_the_shortest_run_its_learning_rate(steps):
    found = rates(lambda optimizer: make_schedule("cosine", optimizer, 0.1, steps, {}, 1e-3), steps)
    assert max(found) == 1e-3 and min(found[: max(1, steps - 1)]) >= 1e-4


def test_a_warm_up_longer_than_the_run_is_refused():
    assert [warmup_length(w, 40) for w in (0, 0.1, 0.99, 1, 40)] == [0, 4, 39, 1, 40]
    with pytest.raises(OptimizationError, match="warmup_steps=41 is longer than the run, which has 40 optimizer steps"):
        warmup_length(41, 40)


@pytest.mark.parametrize("engine", ["packed", "trl"])
def test_a_run_of_one_step_trains(engine, tmp_path):
    trainer = make_trainer(
        engine, tmp_path, make_pairs(4), max_steps=1, warmup_steps=0.1, lr_scheduler_type="cosine", learning_rate=1e-3
    )
    before = weights_of(trainer.model)
    trainer.train()
    assert not same_weights(before, weights_of(trainer.model))
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("warmup_stable_decay", "", "needs lr_scheduler_kwargs with num_decay_steps, such as num_decay_steps=10"),
        ("warmup_stable_decay", "num_decay_steps=19", "take 21 steps, the run has 20"),
        ("cosine_with_min_lr", "", "needs lr_scheduler_kwargs with min_lr_rate"),
        ("cosine_with_min_lr", "min_lr=1", "leaves the range from 0 to the peak learning rate 0.001"),
        ("cosine_with_min_lr", "min_lr=low", "takes min_lr as a number, at least 0; got 'low'"),
        ("cosine", '{"cycles": 2}', "lr_scheduler_type=cosine has no cycles; its lr_scheduler_kwargs: num_cycles"),
        ("polynomial", "lr_end=1", "lr_end"),
        ("polynomial", "power=nan", "takes power as a number"),
        ("warmup_stable_decay", "num_decay_steps=4,decay_type=steep", "Unknown decay type: steep"),
        ("greedy", "factor=0.5", "needs lr_scheduler_kwargs with min_lr"),
    ],
)
def test_a_schedule_that_is_not_to_be_had_says_what_it_takes(name, text, message):
    with pytest.raises(OptimizationError, match=message):
        check_schedule(name, 0.1, STEPS, keywords(text), 1e-3)


def test_every_schedule_can_be_had():
    for name in schedule_names():
        check_schedule(name, 0.1, STEPS, OPTIONS.get(name, {"min_lr": 1e-7} if name == "greedy" else {}), 1e-3)


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=1,a=2", '{"a": [1]}', '{"a": {}}', '{"a": 1', "a b=1"])
def test_keywords_that_are_written_otherwise_are_refused(text):
    with pytest.raises(OptimizationError, match="keyword"):
        keywords(text)


def test_keywords_are_typed():
    assert keywords("a=1, b=.5,c=True,d=1e-4,e=1-sqrt") == {"a": 1, "b": 0.5, "c": True, "d": 1e-4, "e": "1-sqrt"}
    assert keywords('{"a": 1, "e": "x"}') == {"a": 1, "e": "x"} and keywords(None) == {}


@pytest.mark.parametrize(
    "name, arguments, targets, message",
    [
        ("sgd", "momentum=x", None, "could not convert string to float: 'x'"),
        ("sgd", "momentum=-1", None, "Invalid momentum value: -1.0"),
        ("sgd", "momentum=0.9,rank=3", None, "optim=sgd does not use rank of optim_args"),
        ("adamw_torch_fused", "beta1=0.8", None, "does not use beta1"),
        ("galore_adamw", None, None, "needs optim_target_modules"),
        ("galore_adamw_layerwise", None, "q_proj", "within the backward pass.*: use galore_adamw"),
        ("lomo", None, None, "within the backward pass"),
        ("adamw_torch_xla", None, None, "cannot be had here: .*torch_xla"),
    ],
)
def test_an_optimizer_that_is_not_to_be_had_says_why(name, arguments, targets, message):
    with pytest.raises(OptimizationError, match=message):
        check_optimizer(name, arguments, targets)


def test_optimizers_of_torch_can_be_had():
    for name, arguments in (("sgd", "momentum=0.9,nesterov=true"), ("adamw_torch", None), ("adagrad", "lr_decay=0.1"),
                            ("rmsprop", "alpha=0.9"), ("adafactor", None)):  # fmt: skip
        assert name in optimizer_names()
        check_optimizer(name, arguments, None)
