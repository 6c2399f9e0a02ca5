"""Reference log-probabilities: the adapter switched off, or computed once and kept under a key of all they hang on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from training import logged, lora, make_pairs, make_trainer

from preference.engine.forward import pair_logps
from preference.engine.packing import pack_pairs
from preference.engine.probe import prepare_model
from preference.train.reference import data_fingerprint, is_fresh_adapter, weights_fingerprint
from preference.train.watchdog import TrainingError
from tiny import tiny_model


def direct(model, pairs) -> np.ndarray:
    prepare_model(model)
    with torch.no_grad():
        logps = pair_logps(model.eval(), pack_pairs(list(pairs)))
    return torch.stack([logps.chosen_B, logps.rejected_B], 1).numpy()


def test_precomputed_numbers_are_the_models(tmp_path):
    pairs = make_pairs(11)
    trainer = make_trainer("packed", tmp_path, pairs, loss="dpo", per_device_eval_batch_size=3)
    np.testing.assert_allclose(trainer.references.of(pairs), direct(tiny_model(), pairs), rtol=1e-5)


def test_both_ways_train_alike(tmp_path):
    histories = []
    for how in ("adapter", "precompute"):
        options = {"loss": "dpo", "model": lora(tiny_model()), "reference": how, "max_steps": 6}
        trainer = make_trainer("packed", tmp_path, make_pairs(12), **options)
        trainer.train()
        histories.append(logged(trainer, "loss", "grad_norm"))
    assert histories[0][0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert histories[0][-1][0] < histories[0][0][0] - 0.001
    for live, stored in zip(*histories, strict=True):
        assert live == pytest.approx(stored, rel=1e-4)


def test_the_adapter_is_asked_without_dropout_and_left_as_it_was(tmp_path):
    model = lora(tiny_model("llama", attention_dropout=0.5), dropout=0.5)
    pairs = make_pairs(4)
    trainer = make_trainer("packed", tmp_path, pairs, loss="dpo", model=model, max_steps=1)
    seen = []
    import preference.train.trainer as module

    share = module.objective_share

    def watch(objective, logps, totals, reference, coupled):
        seen.append((torch.stack(reference, 1), model.training, [p.requires_grad for p in model.parameters()]))
        return share(objective, logps, totals, reference, coupled)

    before = [p.requires_grad for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "objective_share", watch)
        trainer.train()
    ((values, training, trainable),) = seen
    expected = np.sort(direct(tiny_model(), pairs), axis=0)
    np.testing.assert_allclose(np.sort(values.numpy(), axis=0), expected, rtol=1e-5)
    assert training and trainable == before


@pytest.mark.parametrize("init", ["pissa", "trained"])
def test_an_adapter_that_is_not_fresh_is_its_own_reference(init, tmp_path):
    from peft import LoraConfig, get_peft_model

    if init == "pissa":
        model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa"))
    else:
        model = lora(tiny_model())
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.5)
    assert not is_fresh_adapter(model) and is_fresh_adapter(lora(tiny_model())) and not is_fresh_adapter(tiny_model())
    trainer = make_trainer("packed", tmp_path, make_pairs(8), loss="dpo", model=model, max_steps=1)
    assert not trainer.references.live
    trainer.train()
    assert logged(trainer, "loss")[0][0] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(ValueError, match="reference=adapter needs a LoRA adapter that adds nothing yet"):
        make_trainer("packed", tmp_path, make_pairs(8), loss="dpo", model=tiny_model(), reference="adapter")


def test_the_cache_is_used_and_keyed_by_weights_data_and_precision(tmp_path):
    pairs, cache = make_pairs(8), tmp_path / "cache"

    def run(pairs=pairs, seed=0, **options):
        trainer = make_trainer(
            "packed",
            tmp_path,
            pairs,
            loss="dpo",
            model=tiny_model("llama", seed),
            cache_dir=cache,
            max_steps=1,
            **options,
        )
        calls, compute = [], trainer.references.compute
        trainer.references.compute = lambda dataset: calls.append(1) or compute(dataset)
        trainer.train()
        return len(calls)

    assert run() == 1
    (file,) = cache.iterdir()
    assert run() == 0
    assert run(seed=1) == 1
    assert run(pairs=make_pairs(8, seed=5)) == 1
    assert run(bf16=True) == 1
    assert len(list(cache.iterdir())) == 4
    file.write_bytes(file.read_bytes()[:-8])  # cut short
    assert run() == 1
    assert run() == 0


def test_a_set_that_comes_after_training_is_refused_unless_it_is_known(tmp_path):
    known, new = make_pairs(5, 1), make_pairs(5, 2)
    trainer = make_trainer("packed", tmp_path, make_pairs(8), loss="dpo", eval_pairs=known, max_steps=1)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(known)
    with pytest.raises(TrainingError, match="not there before training"):
        trainer.evaluate(new)


def test_evaluation_alone_needs_no_training(tmp_path):
    trainer = make_trainer("packed", tmp_path, None, loss="dpo", eval_pairs=make_pairs(5))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_fingerprints_see_every_change():
    base = weights_fingerprint(tiny_model())
    assert base == weights_fingerprint(tiny_model())
    for change in ("value", "swap", "dtype"):
        model = tiny_model()
        weight = model.lm_head.weight
        with torch.no_grad():
            if change == "value":
                weight[3, 5] += 1e-7
            elif change == "swap":
                weight[[0, 1]] = weight[[1, 0]]
            else:
                model = model.bfloat16()
        assert weights_fingerprint(model) != base
    pairs = make_pairs(6)
    prints = {
        data_fingerprint(p)
        for p in (pairs, pairs.select([0, 1, 2]), pairs.select([1, 0, 2, 3, 4, 5]), make_pairs(6, 9))
    }
    assert len(prints) == 4
    assert data_fingerprint(pairs) == data_fingerprint(make_pairs(6))
