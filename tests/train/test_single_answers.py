"""KTO on rows of one answer with a label, in both engines, and what stands beside them: no stand-in, no accuracy."""

from __future__ import annotations

import math

import pytest
from training import arguments, logged, lora, make_pairs, make_trainer, single_answers

from preference.losses import Objective
from preference.tokens.mismatched import partners
from preference.train.trl_engine import TrlError
from tiny import tiny_model

SHOWN = ("loss", "grad_norm", "kl", "logps/chosen", "logps/rejected", "rewards/margins")


def train(engine, folder, objective, rows, **options):
    model = lora(tiny_model())
    trainer = make_trainer(engine, folder, rows, loss=objective, model=model, eval_pairs=single_answers(7, 1),
                           learning_rate=3e-2, per_device_eval_batch_size=7, **options)  # fmt: skip
    trainer.train()
    found = trainer.evaluate()
    return logged(trainer, *SHOWN), {name: found[f"eval_{name}"] for name in SHOWN if name != "grad_norm"}


def test_the_two_engines_agree_and_a_step_does_not_depend_on_how_it_is_cut(tmp_path):
    """TRL's own trainer, with the whole batch in a micro-batch; here also in micro-batches of 2 and by tokens."""
    objective = Objective("kto", 0.4, kto_desirable_weight=0.7, kto_undesirable_weight=1.3)
    rows = single_answers(12)
    whole, evaluated = train("trl", tmp_path, objective, rows, per_device_train_batch_size=12, max_steps=4,
                             train_sampling_strategy="sequential")  # fmt: skip
    assert any(kl > 0 for _, _, kl, *_ in whole)
    for cut in (
        {"per_device_train_batch_size": 12},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6},
        {"per_device_train_batch_size": 12, "max_tokens_per_micro_batch": 64},
    ):
        steps, found = train("packed", tmp_path, objective, rows, max_steps=4, **cut)
        for ours, theirs in zip(steps, whole, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-5)
        assert found == pytest.approx(evaluated, rel=2e-3, abs=2e-5)


def test_each_answer_stands_once_beside_another_prompt():
    assert sorted(partners(list("abcdef"))) == list(range(6))
    prompts = ["a", "a", "b", "c", "c", "d"]
    assert all(prompts[i] != prompts[j] for i, j in enumerate(partners(prompts)))
    assert sorted(partners(prompts)) == list(range(6))
    assert sorted(partners(["a"] * 3)) == [0, 1, 2] and partners(["a"]) == [0] and partners([]) == []


def test_a_side_without_rows_has_no_metric(tmp_path):
    rows = single_answers(6).remove_columns("desirable").add_column("desirable", [1.0] * 6)
    trainer = make_trainer("packed", tmp_path, rows, loss="kto", eval_pairs=rows, max_steps=1)
    trainer.train()
    found = trainer.evaluate()
    assert (
        "eval_rewards/chosen" in found and "eval_rewards/rejected" not in found and "eval_rewards/margins" not in found
    )
    assert not any("accuracies" in name or "nll" in name for name in found)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    "engine, objective, said",
    [
        ("packed", Objective("dpo"), "loss=kto"),
        ("packed", Objective("kto", nll_weight=0.5), "nll_weight"),
        ("packed", Objective("kto", ld_alpha=0.5), "ld_alpha"),
        ("packed", Objective("dpo:0.5,kto:0.5"), "loss=kto"),
        ("trl", Objective("dpo"), "loss=kto"),
    ],
)
def test_what_compares_two_answers_refuses_rows_of_one(engine, objective, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        make_trainer(engine, tmp_path, single_answers(6), loss=objective, max_steps=1).train()


def test_trl_takes_no_pairs_and_no_micro_batch_of_one(tmp_path):
    with pytest.raises(TrlError, match="--unpaired"):
        make_trainer("trl", tmp_path, make_pairs(6), loss="kto")
    with pytest.raises(TrlError, match="per_device_train_batch_size=2"):
        make_trainer("trl", tmp_path, single_answers(6), loss="kto", per_device_train_batch_size=1)
    assert arguments(tmp_path).train_sampling_strategy == "random"
