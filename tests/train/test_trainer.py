"""PairTrainer: what it logs, evaluates, saves and resumes; and what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from training import arguments, logged, lora, make_pairs, make_trainer, pairs_of, same_weights, weights_of
from transformers import TrainerCallback

from preference.engine.forward import pair_logps
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.losses import LOSSES, Objective, Totals, objective_share
from preference.losses.schedule import Schedule
from preference.train.trainer import PairTrainer
from tiny import tiny_model

METRICS = ("nll_loss", "log_odds_ratio", "log_odds_chosen", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
           "rewards/margins", "logps/chosen", "logps/rejected")  # fmt: skip


def direct_metrics(model, pairs, objective: Objective) -> dict[str, float]:
    """Loss and metrics of `pairs` as one batch, without any trainer."""
    prepare_model(model)
    model.eval()
    rows = list(pairs)
    with torch.no_grad():
        logps = pair_logps(model, pack_pairs(rows))
        totals = Totals.of(objective, [(len(row["prompt_ids"]), len(row["chosen_ids"])) for row in rows])
        _, sums = objective_share(objective, logps, totals)
    return {name: float(value) / len(rows) for name, value in sums.items()}


def test_a_step_logs_the_objective_of_its_global_batch(tmp_path):
    pairs = make_pairs(16)
    expected = direct_metrics(tiny_model(), pairs, Objective("orpo"))
    trainer = make_trainer("packed", tmp_path, pairs, gradient_accumulation_steps=4, max_steps=1)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert {"loss", *METRICS} <= entry.keys()
    for name, value in expected.items():
        assert entry[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_log_over_several_steps_is_the_mean_of_their_objectives(tmp_path):
    one = make_trainer("packed", tmp_path, make_pairs(24), max_steps=4, logging_steps=1)
    two = make_trainer("packed", tmp_path, make_pairs(24), max_steps=4, logging_steps=2)
    one.train()
    two.train()
    names = ("loss", *METRICS)
    single, double = logged(one, *names), logged(two, *names)
    for i, values in enumerate(double):
        means = [(a + b) / 2 for a, b in zip(single[2 * i], single[2 * i + 1], strict=True)]
        assert values == pytest.approx(means, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("options", [{}, {"per_device_eval_batch_size": 1}, {"max_tokens_per_micro_batch": 60}])
def test_evaluation_is_exact_for_any_batch_size(options, tmp_path):
    sets = {"a": make_pairs(7, 1), "b": make_pairs(11, 2, answer=(20, 40))}
    trainer = make_trainer("packed", tmp_path, None, eval_pairs=sets, **options)
    metrics = trainer.evaluate()
    for name, pairs in sets.items():
        for metric, value in direct_metrics(tiny_model(), pairs, Objective("orpo")).items():
            assert metrics[f"eval_{name}_{metric}"] == pytest.approx(value, rel=1e-5, abs=1e-6), metric
    assert metrics["eval_a_samples_per_second"] > 0
    alone = trainer.evaluate(sets["b"])
    assert alone["eval_loss"] == metrics["eval_b_loss"]


def two_styles(count: int, seed: int) -> Dataset:
    """Pairs whose chosen and rejected answers come from different words, so that what is learned holds for others."""
    draw = np.random.default_rng(seed)
    words = lambda low: draw.integers(low, low + 60, draw.integers(2, 9)).tolist()  # noqa: E731
    return pairs_of((words(300), words(100), words(200)) for _ in range(count))


@pytest.mark.parametrize("adapter", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("loss", [*sorted(LOSSES), "dpo:0.8,bco_pair:0.2"])
def test_every_loss_improves_on_other_pairs(loss, adapter, tmp_path):
    """Before, a model that is its own reference shows ties, half of them won."""
    held_out, model = two_styles(8, 1), lora(tiny_model()) if adapter else tiny_model()
    objective = Objective(loss, dpop_lambda=1.0 if adapter else 50.0)  # 50 is more than random weights can bear there
    steps = {"max_steps": 6, "learning_rate": 3e-2 if adapter else 1e-2}
    pairs = two_styles(24, 0)
    trainer = make_trainer("packed", tmp_path, pairs, loss=objective, model=model, eval_pairs=held_out, **steps)
    before = trainer.evaluate()
    if trainer.objective.needs_reference:
        assert (before["eval_rewards/margins"], before["eval_rewards/accuracies"]) == (0, 0.5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert all(math.isfinite(value) for value in after.values())


@pytest.mark.parametrize("loss", ["kto", "aot", "aot_unpaired"])
def test_losses_that_need_their_batch_do_not_depend_on_how_it_is_cut(loss, tmp_path):
    """Micro-batches of 8, of 2, and by tokens, against the whole batch; training steps and evaluation."""

    def found(**options):
        pairs, model = make_pairs(24), lora(tiny_model())
        trainer = make_trainer(
            "packed", tmp_path, pairs, loss=loss, model=model, eval_pairs=make_pairs(7, 1), **options
        )
        trainer.train()
        return [*logged(trainer, "loss", "grad_norm"), (trainer.evaluate()["eval_loss"], 0)]

    whole = found(per_device_train_batch_size=8, per_device_eval_batch_size=8)
    for cut in (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 3},
        {"per_device_train_batch_size": 8, "max_tokens_per_micro_batch": 64},
    ):
        for a, b in zip(whole, found(**cut), strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_a_run_in_stages_learns_likelihood_first(tmp_path):
    """Its first half is a run without odds ratio to the bit, its second is not; evaluations have the last objective."""
    plain = make_trainer("packed", tmp_path, make_pairs(24), loss=Objective(beta=0.0), max_steps=4)
    schedule = Schedule(Objective(), "sft,align", 0.5, "linear", 0.1)
    staged = make_trainer(
        "packed", tmp_path, make_pairs(24), schedule=schedule, eval_pairs=make_pairs(5, 1), max_steps=4
    )
    for trainer in (plain, staged):
        trainer.train()
    a, b = (logged(trainer, "loss") for trainer in (plain, staged))
    assert a[:2] == b[:2] and a[2] != b[2]
    last = make_trainer(
        "packed", tmp_path, None, loss=Objective(nll_weight=0.1), model=staged.model, eval_pairs=make_pairs(5, 1)
    )
    assert staged.evaluate()["eval_loss"] == pytest.approx(last.evaluate()["eval_loss"])


def test_the_numbers_that_a_dataset_brings_for_its_pairs(tmp_path):
    """A weight scales a pair's part of the loss; a margin is asked for on top; a tail weighs what is longer."""
    pairs = make_pairs(4)
    columns = pairs.add_column("pair_weight", [2.0, 0.0, 1.0, 1.0]).add_column("score_margin", [0.5, 0.0, 0.0, -0.5])

    def loss(pairs, objective):
        return make_trainer("packed", tmp_path, None, loss=objective, eval_pairs=pairs).evaluate()["eval_loss"]

    single = [loss(pairs.select([i]), Objective("simpo")) for i in range(4)]
    assert loss(columns, Objective("simpo")) == pytest.approx((2 * single[0] + single[2] + single[3]) / 4, rel=1e-5)
    asked = loss(columns.select([0]), Objective("simpo", score_margin=2.0))
    assert asked == pytest.approx(2 * loss(pairs.select([0]), Objective("simpo", simpo_gamma=2.0)), rel=1e-5)
    assert loss(pairs, Objective("dpo", ld_alpha=0.0)) == pytest.approx(math.log(2), rel=1e-6)


class Order(TrainerCallback):
    """Notes which rows each optimizer step is made of."""

    def __init__(self):
        self.rows: list[list[str]] = []

    def attach(self, trainer):
        step = trainer.training_step

        def watch(model, inputs, *rest):
            self.rows.append([row for rows in inputs["source"] for row in rows])
            return step(model, inputs, *rest)

        trainer.training_step = watch
        return self


@pytest.mark.parametrize("workers, adapter", [(0, True), (2, False)])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(workers, adapter, tmp_path):
    """Dropout, data order, optimizer, schedule: 40 pairs in steps of 16 are 3 steps an epoch; 8 steps, saved at 4."""

    def build(output, **changes):
        model = lora(tiny_model(), dropout=0.2) if adapter else tiny_model("llama", attention_dropout=0.2)
        options = {"gradient_accumulation_steps": 4, "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
        options |= {"lr_scheduler_type": "cosine", "dataloader_num_workers": workers} | changes
        return make_trainer("packed", output, make_pairs(40), model=model, **options)

    whole = build(tmp_path / "whole")
    order = Order().attach(whole)
    whole.train()
    resumed = build(tmp_path / "resumed")
    again = Order().attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.rows == order.rows[4:]
    assert len(set(map(tuple, order.rows))) == 8
    assert same_weights(weights_of(whole.model), weights_of(resumed.model))
    names = ("step", "loss", "grad_norm", "learning_rate", *METRICS)
    assert logged(resumed, *names) == logged(whole, *names)
    dropout_matters = build(tmp_path / "other", data_seed=7)
    dropout_matters.args.seed = 8
    torch.manual_seed(1)
    dropout_matters.train()
    assert logged(dropout_matters, "loss") != logged(whole, "loss")


def test_a_resumed_dpo_run_keeps_its_reference(tmp_path):
    """The reference is the model before training, not the checkpoint; also where it is computed anew."""

    def build(output):
        options = {"loss": "dpo", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        return make_trainer("packed", output, make_pairs(24), eval_pairs=make_pairs(6, 1), **options)

    whole = build(tmp_path / "whole")
    whole.train()
    resumed = build(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert same_weights(weights_of(whole.model), weights_of(resumed.model))
    assert whole.evaluate()["eval_rewards/margins"] == resumed.evaluate()["eval_rewards/margins"] != 0


def test_every_epoch_takes_every_pair_once(tmp_path):
    trainer = make_trainer(
        "packed", tmp_path, make_pairs(22), max_steps=-1, num_train_epochs=2, max_tokens_per_micro_batch=90
    )
    order = Order().attach(trainer)
    trainer.train()
    assert [len(rows) for rows in order.rows] == [4, 4, 4, 4, 4, 2] * 2
    first, second = ([row for rows in order.rows[i : i + 6] for row in rows] for i in (0, 6))
    assert sorted(first) == sorted(second) == sorted(make_pairs(22)["source"])
    assert first != second
    assert trainer.state.epoch == 2


def test_the_users_arguments_are_not_changed_and_the_global_batch_is_theirs(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=3)
    trainer = PairTrainer(tiny_model(), args, objective=Objective(), train_dataset=make_pairs(30))
    assert args.gradient_accumulation_steps == 3
    assert trainer.args.gradient_accumulation_steps == 1
    assert trainer.get_total_train_batch_size(args) == 12
    assert len(trainer.get_train_dataloader()) == 3


def test_tokens_and_operations_are_counted_as_computed(tmp_path):
    pairs = make_pairs(8)
    trainer = make_trainer(
        "packed", tmp_path, pairs, per_device_train_batch_size=8, max_steps=1, include_num_input_tokens_seen="all"
    )
    trainer.train()
    tokens = sum(len(p["prompt_ids"]) - 1 + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
    assert trainer.state.num_input_tokens_seen == tokens
    assert trainer.state.total_flos == 6 * tokens * tiny_model().num_parameters(exclude_embeddings=True)


def test_a_checkpoint_loads_in_plain_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make_trainer("packed", tmp_path, make_pairs(8), save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert same_weights(weights_of(trainer.model), weights_of(loaded))
    assert "packed" not in json.dumps(json.loads((tmp_path / "checkpoint-2" / "config.json").read_text()))


@pytest.mark.parametrize("adapter", [False, True])
def test_bf16_autocast_trains_float32_weights(adapter, tmp_path):
    model = lora(tiny_model()) if adapter else tiny_model()
    trainer = make_trainer("packed", tmp_path, make_pairs(16), model=model, bf16=True, max_steps=10)
    trainer.train()
    losses = [values[0] for values in logged(trainer, "loss")]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    exact = make_trainer("packed", tmp_path, make_pairs(16), max_steps=1)
    exact.train()
    difference = abs(losses[0] - logged(exact, "loss")[0][0])
    assert 0 < difference < 0.02  # it is bfloat16, and no worse than that


@pytest.mark.parametrize("adapter", [False, True])
def test_activation_checkpointing_changes_nothing(adapter, tmp_path):
    histories = []
    for checkpointing in (False, True):
        model = lora(tiny_model()) if adapter else tiny_model()
        trainer = make_trainer("packed", tmp_path, make_pairs(16), model=model, gradient_checkpointing=checkpointing)
        trainer.train()
        histories.append(logged(trainer, "loss", "grad_norm"))
    for plain, recomputed in zip(*histories, strict=True):
        assert recomputed == pytest.approx(plain, rel=1e-6)


# ---- safety: finite or refused


def train_finite(tmp_path, pairs, loss="orpo", model=None, **options) -> list[tuple[float, ...]]:
    trainer = make_trainer("packed", tmp_path, pairs, loss=loss, model=model, eval_pairs=pairs, **options)
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    metrics = trainer.evaluate()
    assert all(math.isfinite(value) for value in metrics.values())
    values = logged(trainer, "loss", "grad_norm")
    assert all(math.isfinite(value) for step in values for value in step)
    return values


KINDS = (
    "orpo",
    "dpo",
    "ipo",
    "simpo",
    "cpo",
    "kto",
    "aot_unpaired",
    "sppo_hard",
    "discopop",
    "chipo",
    "alphapo",
    "rpo",
)


@pytest.mark.parametrize("loss", KINDS)
def test_one_token_answers(loss, tmp_path):
    train_finite(tmp_path, make_pairs(8, answer=(1, 1)), loss)


@pytest.mark.parametrize("loss", KINDS)
def test_saturated_log_probabilities(loss, tmp_path):
    """A model that is certain of its answers: log-probabilities of exactly 0 and of -1e5."""
    model = tiny_model()
    prepare_model(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
        prompts = [[i, i + 1] for i in range(5, 21, 2)]
        best = [int(model(torch.tensor([p])).logits[0, -1].argmax()) for p in prompts]
    pairs = pairs_of(
        (p, [b], [3, 4]) if i % 2 else (p, [3, 4], [b]) for i, (p, b) in enumerate(zip(prompts, best, strict=True))
    )
    train_finite(tmp_path, pairs, loss, model)


def test_identical_prompts_and_a_prompt_of_one_token(tmp_path):
    train_finite(tmp_path, pairs_of(([5, 6, 7], [8 + i], [40 + i, 3]) for i in range(8)))
    train_finite(tmp_path, pairs_of(([5], [8 + i], [40 + i, 3]) for i in range(8)))


def test_a_row_longer_than_the_budget(tmp_path):
    pairs = pairs_of([([5] * 300, [6] * 50, [7] * 20), *(([5, 6], [7 + i], [30 + i]) for i in range(7))])
    train_finite(tmp_path, pairs, max_tokens_per_micro_batch=64)


def test_an_empty_answer_is_refused_by_name(tmp_path):
    pairs = pairs_of([([5], [6], [7]), ([5], [], [7])])
    with pytest.raises(ValueError, match=r"pairs.jsonl:2.*chosen answer has no tokens"):
        make_trainer("packed", tmp_path, pairs).train()


@pytest.mark.parametrize(
    "changes",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        {"torch_empty_cache_steps": 2},
        {"auto_find_batch_size": True},
    ],
)
def test_arguments_without_effect_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* has no place in the packed engine"):
        make_trainer("packed", tmp_path, make_pairs(4), **changes)


def test_a_budget_of_tokens_counts_a_system_prompt_once(tmp_path) -> None:
    system = list(range(100, 140))
    pairs = pairs_of(([*system, n, 9], [n, 4], [n, 5, 6]) for n in range(8))
    trainer = make_trainer(
        "packed", tmp_path, pairs, per_device_train_batch_size=8, max_tokens_per_micro_batch=40 + 8 * 6
    )
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader(pairs)):
        (item,) = loader
        (batch,) = item["micro_batches"]
        assert batch["input_ids"].numel() == item["num_tokens"] == 40 + 8 * 6
