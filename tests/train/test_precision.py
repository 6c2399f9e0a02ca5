"""bfloat16 under every strategy: products are rounded to it, log-probabilities, losses and summed gradients are not."""

from __future__ import annotations

import math

import pytest
from ranks import train_one
from test_invariance import on_ranks

BASE = {
    "pairs": [4, 0, [3, 24], [600, 800]], "eval_pairs": [2, 1, [3, 24], [600, 800]],
    "bf16": True, "max_steps": 2, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0,
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
}  # fmt: skip
FULL, ADAPTER, ORPO = ({"loss": "dpo", "adapter": False}, {"loss": "dpo", "adapter": True}, {"loss": "orpo"})
FSDP = {"strategy": "fsdp", "evaluate_before": True}
# How two ranks run it; under FSDP2 an evaluation before training shards the model, and else training does.
RUNS = [FULL, ORPO | FSDP, FULL | FSDP, ADAPTER | FSDP, ADAPTER | {"strategy": "fsdp"}]


def logged(answer: dict, name: str) -> list[float]:
    return [entry[name] for entry in answer["log"] if "loss" in entry and name in entry]


@pytest.mark.slow
def test_answers_of_800_tokens_on_two_ranks_as_on_one(tmp_path):
    """Full and LoRA, with and without a reference (LoRA's is asked live), DDP and FSDP2."""
    plain = {str(v): train_one(tmp_path / "one", BASE | v | {"gradient_accumulation_steps": 4})
             for v in (FULL, ORPO, ADAPTER)}  # fmt: skip
    runs = [BASE | run | {"gradient_accumulation_steps": 2} for run in RUNS]
    for run, answer, other in zip(RUNS, *on_ranks(2, runs, tmp_path / "ranks"), strict=True):
        one = plain[str({name: run[name] for name in ("loss", "adapter") if name in run})]
        assert answer["log"][0] == other["log"][0]
        for name, near in {"loss": 5e-3, "logps/chosen": 2e-3, "logps/rejected": 2e-3, "grad_norm": 2e-2}.items():
            assert logged(answer, name) == pytest.approx(logged(one, name), rel=near), (run, name)
        if run["loss"] == "dpo":
            assert logged(answer, "loss")[0] == pytest.approx(math.log(2), abs=5e-3)
        assert answer["metrics"]["eval_loss"] == pytest.approx(one["metrics"]["eval_loss"], rel=5e-3)
