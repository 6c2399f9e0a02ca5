"""engine=trl: a test for each thing that TRL's trainers are guarded against. Each fails when its guard is taken out."""

from __future__ import annotations

import math
import sys
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from training import arguments, logged, lora, make_pairs, make_trainer, pairs_of, poison, same_weights, weights_of

from preference.losses import Objective
from preference.train import trl_engine
from preference.train.trl_engine import TrlError
from preference.train.watchdog import TrainingError
from tiny import tiny_model, tiny_tokenizer

BOTH = pytest.mark.parametrize("loss", ["orpo", "dpo"])


def rows_of(batch: dict, loss: str, side: str) -> list[list[int]]:
    """The unpadded rows of one side of a batch, as the model gets them."""
    if loss == "orpo":
        ids, mask = batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"]
    else:
        half = len(batch["input_ids"]) // 2
        part = slice(0, half) if side == "chosen" else slice(half, None)
        ids, mask = batch["input_ids"][part], batch["attention_mask"][part]
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


class NoCalls(type(tiny_tokenizer())):
    """A tokenizer with a BOS token that must not be asked to tokenize."""

    def __call__(self, *args, **kwargs):
        raise AssertionError("the rows were tokenized again")


def silent_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.__class__ = NoCalls
    return tokenizer


@BOTH
def test_our_ids_reach_the_model_as_they_are(loss, tmp_path):
    """No second tokenization, no BOS in front, no EOS behind, nothing cut, one prompt for both sides."""
    pairs = make_pairs(8, prompt=(3, 40), answer=(1, 30))
    trainer = trl_engine.make_trl_trainer(
        tiny_model(),
        arguments(tmp_path, per_device_train_batch_size=8, train_sampling_strategy="sequential"),
        objective=Objective(loss),
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=silent_tokenizer(),
    )
    for batch in (*trainer.get_train_dataloader(), *trainer.get_eval_dataloader()):
        first = int(batch["source"][0].split(":")[1]) - 1
        rows = [pairs[first + i] for i in range(len(batch["source"]))]
        for side in ("chosen", "rejected"):
            assert rows_of(batch, loss, side) == [row["prompt_ids"] + row[f"{side}_ids"] for row in rows]
    trainer.train()


@BOTH
def test_only_answers_are_scored(loss, tmp_path):
    pairs = pairs_of([([5, 6, 7], [8, 9], [10])])
    (batch,) = make_trainer("trl", tmp_path, pairs, loss=loss).get_train_dataloader()
    if loss == "orpo":
        assert batch["chosen_labels"].tolist() == [[-100, -100, -100, 8, 9]]
        assert batch["rejected_labels"].tolist() == [[-100, -100, -100, 10]]
    else:
        assert batch["completion_mask"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]


def test_the_loss_is_the_formula(tmp_path):
    """Against ORPO written out in double precision, on the whole batch in one micro-batch."""
    pairs = make_pairs(6)
    model = tiny_model()
    reference = tiny_model().double()
    trainer = make_trainer("trl", tmp_path, pairs, model=model, per_device_train_batch_size=6, max_steps=1)
    trainer.train()

    def logps(ids: list[int]) -> torch.Tensor:
        row = torch.tensor([ids])
        return F.log_softmax(reference(row).logits[0, :-1], -1).gather(1, row[0, 1:, None])[:, 0]

    nll, count, ratios = 0.0, 0, []
    for row in pairs:
        start = len(row["prompt_ids"]) - 1
        chosen, rejected = (logps(row["prompt_ids"] + row[f"{side}_ids"]) for side in ("chosen", "rejected"))
        nll, count = nll - chosen.sum(), count + len(chosen)
        c, r = chosen[start:].mean(), rejected[start:].mean()
        ratios.append(F.logsigmoid(c - r - torch.log1p(-c.exp()) + torch.log1p(-r.exp())))
    expected = (nll / count - 0.1 * torch.stack(ratios).mean()).item()
    assert logged(trainer, "loss")[0][0] == pytest.approx(expected, rel=1e-6)


@BOTH
def test_an_empty_answer_is_refused_by_name(loss, tmp_path):
    with pytest.raises(TrlError, match=r"1 of the training rows have an empty prompt or answer: pairs.jsonl:2"):
        make_trainer("trl", tmp_path, pairs_of([([5], [6], [7]), ([5], [], [7])]), loss=loss)


@BOTH
def test_a_row_that_is_too_long_is_refused_rather_than_cut(loss, tmp_path):
    pairs, evaluation = pairs_of([([5] * 6, [6], [7])]), pairs_of([([5] * 6, [6] * 5, [7])])
    make_trainer("trl", tmp_path, pairs, loss=loss, max_length=7)
    with pytest.raises(TrlError, match=r"evaluation rows are longer than max_length=10 tokens: pairs.jsonl:1"):
        make_trainer("trl", tmp_path, pairs, loss=loss, eval_pairs=evaluation, max_length=10)


@pytest.mark.parametrize("value", [0.0, -1e-9, -1e-7, -1e-3, -0.6931472, -50.0, -1e4])
def test_certain_answers_have_finite_gradients(value, tmp_path):
    trainer = make_trainer("trl", tmp_path, make_pairs(2))
    for certain in (0, 1):
        logps = [torch.tensor([-1.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)]
        logps[certain] = torch.tensor([value], requires_grad=True)
        losses, *rest = trainer.odds_ratio_loss(*logps)
        losses.sum().backward()
        assert all(part.isfinite().all() for part in (losses, *rest, *(x.grad for x in logps)))


def test_saturated_one_token_answers_train(tmp_path):
    """A model that is certain of its one-token answers: log-probability exactly 0, where TRL's gradient is NaN."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
        prompts = [[5, 6], [7, 8], [9, 10], [11, 12]]
        best = [int(model(torch.tensor([p])).logits[0, -1].argmax()) for p in prompts]
    trainer = make_trainer(
        "trl", tmp_path, pairs_of((p, [b], [3]) for p, b in zip(prompts, best, strict=True)), model=model
    )
    trainer.train()
    assert logged(trainer, "logps/chosen")[0][0] == 0
    assert all(p.isfinite().all() for p in model.parameters())


@BOTH
def test_dropout_stays_as_asked(loss, tmp_path):
    model = lora(tiny_model("llama", attention_dropout=0.25), dropout=0.3)
    make_trainer("trl", tmp_path, make_pairs(4), loss=loss, model=model)
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.3}
    gpt = tiny_model("gpt2")
    make_trainer("trl", tmp_path, make_pairs(4), loss=loss, model=gpt)
    assert {m.p for m in gpt.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


@BOTH
def test_every_argument_holds(loss, tmp_path):
    """TRL's configs have defaults of their own: bfloat16, gradient checkpointing, a learning rate, logging steps."""
    args = arguments(tmp_path, weight_decay=0.3, warmup_steps=5, optim="sgd", logging_steps=3)
    trainer = trl_engine.make_trl_trainer(
        tiny_model(), args, objective=Objective(loss), train_dataset=make_pairs(4), processing_class=tiny_tokenizer()
    )
    ours = {"remove_unused_columns", "logging_nan_inf_filter"}
    for field in fields(args):
        if field.init and field.name not in ours | {"accelerator_config"}:
            assert getattr(trainer.args, field.name) == getattr(args, field.name), field.name
    assert trainer.args.bf16 is False and not trainer.args.gradient_checkpointing


def test_a_model_given_by_name_is_refused(tmp_path):
    with pytest.raises(TrlError, match="takes a loaded model"):
        make_trainer("trl", tmp_path, make_pairs(4), model="some/model")


@BOTH
def test_weights_keep_their_type(loss, tmp_path):
    """DPOTrainer turns the adapter of a 4-bit model into bfloat16."""
    model = lora(tiny_model())
    model.base_model.model.is_loaded_in_4bit = True
    before = weights_of(model)
    make_trainer("trl", tmp_path, make_pairs(4), loss=loss, model=model)
    assert same_weights(before, weights_of(model))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@BOTH
def test_a_loss_that_is_not_finite_stops_the_run_and_names_rows(loss, tmp_path):
    rows = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in make_pairs(12)]
    rows[9] = (rows[9][0], [509, 4], rows[9][2])
    model = poison(tiny_model())
    options = {"loss": loss, "model": model, "train_sampling_strategy": "sequential"}
    make_trainer("trl", tmp_path, pairs_of(rows), max_steps=2, **options).train()
    before = weights_of(model)
    trainer = make_trainer("trl", tmp_path, pairs_of(rows[8:]), **options)
    with pytest.raises(TrainingError, match="loss of step 1 is not finite") as stopped:
        trainer.train()
    assert stopped.value.rows == [f"pairs.jsonl:{i}" for i in (1, 2, 3, 4)]
    assert same_weights(before, weights_of(model))
    assert math.isnan(trainer.evaluate(pairs_of(rows))["eval_loss"])  # nor is one batch filtered out of an evaluation


@BOTH
def test_several_evaluation_sets(loss, tmp_path):
    sets = {"short": make_pairs(5, 1, answer=(1, 4)), "long": make_pairs(6, 2, answer=(20, 30))}
    trainer = make_trainer(
        "trl", tmp_path, make_pairs(8), loss=loss, eval_pairs=sets, eval_strategy="steps", eval_steps=2, max_steps=2
    )
    trainer.train()
    metrics = trainer.evaluate()
    for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen"):
        assert {f"eval_short_{name}", f"eval_long_{name}"} <= metrics.keys()
        assert metrics[f"eval_short_{name}"] == pytest.approx(
            next(e[f"eval_short_{name}"] for e in trainer.state.log_history if f"eval_short_{name}" in e)
        )
    assert metrics["eval_short_logps/chosen"] != metrics["eval_long_logps/chosen"]
    assert not [name for name in metrics if name.startswith("eval_rewards")]
    single = trainer.evaluate(sets["long"])
    assert single["eval_logps/chosen"] == pytest.approx(metrics["eval_long_logps/chosen"], rel=1e-5)


@BOTH
def test_group_by_length(loss, tmp_path):
    pairs = make_pairs(16, prompt=(3, 60))
    trainer = make_trainer(
        "trl", tmp_path, pairs, loss=loss, eval_pairs=pairs, train_sampling_strategy="group_by_length"
    )
    trainer.train()
    trainer.evaluate()
    widths = [rows for batch in trainer.get_train_dataloader() for rows in [rows_of(batch, loss, "chosen")]]
    assert sum(map(len, widths)) == 16


def test_orpo_metrics_are_reduced_once_per_log(tmp_path, monkeypatch):
    trainer = make_trainer("trl", tmp_path, make_pairs(16), gradient_accumulation_steps=2, logging_steps=2, max_steps=2)
    calls = []
    reduce = trainer.accelerator.reduce

    def refuse(*args, **kwargs):
        raise AssertionError("a collective per micro-batch")

    def count(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "gather_for_metrics", refuse)
    monkeypatch.setattr(trainer.accelerator, "reduce", count)
    trainer.train()
    assert calls.count(13) == 1  # the metrics of two steps, as one tensor
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["loss"] == pytest.approx(entry["nll_loss"] - 0.1 * entry["log_odds_ratio"], rel=1e-5)
    assert entry["rewards/margins"] == pytest.approx(entry["rewards/chosen"] - entry["rewards/rejected"], rel=1e-3)


@BOTH
def test_nothing_is_reported_to_trl_unless_asked(loss, tmp_path, monkeypatch):
    import trl.trainer.base_trainer as base

    sent = []
    monkeypatch.setattr(base, "send_telemetry", lambda **kwargs: sent.append(kwargs))
    monkeypatch.delenv("CI", raising=False)
    make_trainer("trl", tmp_path, make_pairs(4), loss=loss)
    assert sent == []
    make_trainer("trl", tmp_path, make_pairs(4), loss=loss, send_usage=True)
    assert len(sent) == 1


def test_a_trl_without_orpo_is_a_clear_error(tmp_path, monkeypatch):
    trl_engine._orpo_classes.cache_clear()
    monkeypatch.setitem(sys.modules, "trl.experimental.orpo", None)
    try:
        with pytest.raises(TrlError, match="has no ORPOTrainer.*engine=packed needs none"):
            make_trainer("trl", tmp_path, make_pairs(4))
    finally:
        trl_engine._orpo_classes.cache_clear()


@pytest.mark.parametrize(
    "objective",
    [
        Objective("simpo"),
        Objective("orpo", nll_scope="answer"),
        Objective("dpo", label_smoothing=0.1),
        Objective("ipo"),
    ],
)
def test_what_trl_does_not_compute_is_refused(objective, tmp_path):
    with pytest.raises(TrlError, match="engine=packed computes all"):
        make_trainer("trl", tmp_path, make_pairs(4), loss=objective)


def test_dpo_compares_a_fresh_adapter_with_the_model_without_it(tmp_path):
    model = lora(tiny_model())
    trainer = make_trainer("trl", tmp_path, make_pairs(4), loss="dpo", model=model, max_steps=1)
    assert list(model.peft_config) == ["default"]
    trainer.train()
    assert logged(trainer, "loss")[0][0] == pytest.approx(math.log(2), abs=1e-6)
    trainer.save_model(tmp_path / "saved")
    assert not (tmp_path / "saved" / "ref").exists()


def test_dpo_compares_an_adapter_that_was_trained_with_its_beginning(tmp_path):
    model = lora(tiny_model())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.5)
    trainer = make_trainer("trl", tmp_path, make_pairs(4), loss="dpo", model=model, max_steps=1)
    trainer.train()
    assert logged(trainer, "loss")[0][0] == pytest.approx(math.log(2), abs=1e-5)


@BOTH
def test_the_model_is_given_what_it_knows(loss, tmp_path):
    """The rows' names travel with a batch, but not into the model."""
    given: set[str] = set()
    model = tiny_model()
    model.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    trainer = make_trainer(
        "trl", tmp_path, make_pairs(4), loss=loss, model=model, eval_pairs=make_pairs(4), max_steps=1
    )
    trainer.train()
    trainer.evaluate()
    assert "attention_mask" in given and "source" not in given


@BOTH
def test_evaluation_without_training_rows(loss, tmp_path):
    trainer = make_trainer("trl", tmp_path, None, loss=loss, eval_pairs=make_pairs(5))
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert trainer.train_dataset is None
