"""The same 16 pairs give the same loss, gradient norm and metrics however they are cut, and on however many ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import train_one
from training import logged, lora, make_pairs, make_trainer

from tiny import tiny_model

NAMES = ("loss", "grad_norm")
METRICS = ("nll_loss", "log_odds_ratio", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
METRICS += ("kl",)
# SGD: Adam divides a gradient that is zero but for rounding by its own size, and so turns rounding into steps.
STEPS = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
CUTS = {
    "16x1": {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    "8x2": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "4x4": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "1x16": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    "tokens": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_tokens_per_micro_batch": 70},
    "two answers, two prompts": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "share_prompt": False,
    },
}


def close(actual, expected, strict: int = len(NAMES)) -> None:
    """The first `strict` numbers of a tuple within 1e-6; metrics near zero are held to the rounding of their parts."""
    assert len(actual) == len(expected)
    for got, wanted in zip(actual, expected, strict=True):
        assert got[:strict] == pytest.approx(wanted[:strict], rel=1e-6)
        assert got[strict:] == pytest.approx(wanted[strict:], rel=1e-6, abs=2e-6)


def run(tmp_path, cut: dict, loss="orpo", adapter=False, pairs=None) -> list[tuple[float, ...]]:
    model = lora(tiny_model()) if adapter else tiny_model()
    pairs = make_pairs(16) if pairs is None else pairs
    trainer = make_trainer("packed", tmp_path, pairs, loss=loss, model=model, **STEPS, **cut)
    trainer.train()
    return logged(trainer, *NAMES, *(name for name in METRICS if name in trainer.state.log_history[0]))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss", ["orpo", "dpo"])
def test_however_a_batch_is_cut(loss, adapter, tmp_path):
    expected = run(tmp_path, CUTS["16x1"], loss, adapter)
    assert expected[0][0] != expected[-1][0]
    for cut in CUTS.values():
        close(run(tmp_path, cut, loss, adapter), expected)


def test_in_whatever_order_the_pairs_come(tmp_path):
    """Shuffled within the batch: other micro-batches of the same pairs."""
    pairs = make_pairs(16)
    expected = run(tmp_path, CUTS["4x4"], pairs=pairs)
    for seed in (1, 2):
        close(run(tmp_path, CUTS["4x4"], pairs=pairs.shuffle(seed=seed)), expected)


def test_trl_by_contrast_depends_on_the_cut(tmp_path):
    """Why the packed engine exists; and proof that this test could fail."""
    norms = []
    for cut in ("16x1", "4x4"):
        trainer = make_trainer("trl", tmp_path, make_pairs(16), **STEPS, **CUTS[cut])
        trainer.train()
        norms.append(logged(trainer, "grad_norm")[0][0])
    assert abs(norms[0] - norms[1]) > 1e-3 * norms[0]


def on_ranks(world: int, runs: list[dict], folder: Path) -> list[list[dict]]:
    """What each rank answered for each run."""
    folder.mkdir()
    (folder / "in.json").write_text(json.dumps(runs))
    script = [sys.executable, str(Path(__file__).parents[1] / "ranks.py"), str(world)]
    words = [str(folder / "in.json"), str(folder / "out.json")]
    done = subprocess.run([*script, *words], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


BASE = STEPS | {"pairs": [19, 0], "eval_pairs": [7, 1], "evaluate_before": True, "per_device_train_batch_size": 2}
VARIANTS = [
    {"loss": loss, "adapter": adapter, **tokens}
    for loss in ("orpo", "dpo")
    for adapter in (False, True)
    for tokens in ({}, {"max_tokens_per_micro_batch": 80})
]
VARIANTS[2] |= {"arch": "qwen3_5_text"}  # ORPO, LoRA, by pairs: of a model whose layers carry a state
VARIANTS += [{"loss": "kto", "adapter": True}, {"loss": "aot", "adapter": False}]  # they know their whole batch
VARIANTS += [{"loss": "kto", "adapter": False, "single_answers": True, "learning_rate": 1.0}]  # so that kl is not 0


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return [train_one(folder, BASE | variant | {"gradient_accumulation_steps": 4}) for variant in VARIANTS]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_on_one_rank_and_on_more(on_one_rank, tmp_path, world):
    """8 pairs a step as 1 x 4, 2 x 2 and 4 x 1 micro-batches, cut by pairs or by tokens; 3 pairs are left for the last.

    Full and LoRA, also of a model whose layers carry a state, ORPO, DPO, and those that depend on their whole batch,
    KTO of single answers (DDP alone) too, DDP and (by pairs) FSDP2; an evaluation before and one after.
    """
    accumulation = {"gradient_accumulation_steps": 4 // world}
    ddp = [BASE | variant | accumulation for variant in VARIANTS]
    by_pairs = [i for i, v in enumerate(VARIANTS) if not v.keys() & {"max_tokens_per_micro_batch", "single_answers"}]
    fsdp = [ddp[i] | {"strategy": "fsdp"} for i in by_pairs]
    ranks = on_ranks(world, ddp + fsdp, tmp_path / "ranks")
    assert len(ranks) == world
    for alone, *others in zip(on_one_rank + [on_one_rank[i] for i in by_pairs], *ranks, strict=True):
        expected = [entry for entry in alone["log"] if "loss" in entry]
        assert len(expected) == 3
        names = [*NAMES, *(name for name in expected[0] if name in METRICS)]
        metrics = ["eval_loss", *(name for name in alone["metrics"] if name.removeprefix("eval_") in METRICS)]
        assert len(metrics) >= 5
        for rank in others:
            actual = [entry for entry in rank["log"] if "loss" in entry]
            shown = [[tuple(e[n] for n in names if n in e) for e in entries] for entries in (actual, expected)]
            close(*shown)  # a step may have no bad answers to show
            close([[rank["metrics"][n] for n in metrics]], [[alone["metrics"][n] for n in metrics]], strict=1)


@pytest.mark.slow
def test_two_ranks_stop_together_and_name_the_rows_of_the_one(tmp_path):
    """Row 6 of 8 spoils one rank's second micro-batch; both ranks stop, with the same message, and none hangs.

    So they do where accelerate leaves the model out of DDP, as it does after an evaluation unless we see to it.
    """
    apart = {"pairs": [8, 0], "eval_pairs": [4, 1], "evaluate_before": "and leave it so"}
    base = {"pairs": [8, 0], "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "poisoned_row": 5}
    *spoiled, apart = zip(*on_ranks(2, [base, base | {"engine": "trl"}, apart], tmp_path / "two"), strict=True)
    for first, second in spoiled:
        assert first == second and first["step"] == 0
        assert "pairs.jsonl:6" in first["rows"] and len(first["rows"]) == 2
        assert "the loss of step 1 is not finite" in first["stopped"]
    for answer in apart:
        assert "the ranks have different gradients" in answer["stopped"]
