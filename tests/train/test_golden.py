"""Loss curves of ten steps, kept as small files: a change in numerics has to be meant.

`python tests/train/test_golden.py` writes the files anew. Tolerance 1e-4 relative: on another machine or torch, kernels
sum in another order, and ten steps of AdamW at a high learning rate enlarge that to some 1e-6; a change of formula
moves the curves by far more.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("golden")
NAMES = ("loss", "grad_norm", "rewards/margins")
CURVES = [
    (engine, loss, arch) for engine in ("packed", "trl") for loss in ("orpo", "dpo") for arch in ("llama", "qwen2")
]


def curve(engine: str, loss: str, arch: str, output: Path) -> dict[str, list[float]]:
    """Ten steps of 8 pairs, in one micro-batch, where both engines mean the same."""
    from training import logged, make_pairs, make_trainer

    from tiny import tiny_model

    trainer = make_trainer(
        engine,
        output,
        make_pairs(24),
        loss=loss,
        model=tiny_model(arch),
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        max_steps=10,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=2,
    )
    trainer.train()
    return dict(zip(NAMES, map(list, zip(*logged(trainer, *NAMES), strict=True)), strict=True))


@pytest.mark.parametrize("engine, loss, arch", CURVES)
def test_the_curve_is_the_golden_one(engine, loss, arch, tmp_path):
    expected = json.loads((GOLDEN / f"{loss}_{arch}_{engine}.json").read_text())
    actual = curve(engine, loss, arch, tmp_path)
    for name in NAMES:
        assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("loss", ["orpo", "dpo"])
def test_both_engines_learn_the_same(loss, arch):
    """On whole batches in one micro-batch the two engines' golden curves are one."""
    packed, trl = (json.loads((GOLDEN / f"{loss}_{arch}_{engine}.json").read_text()) for engine in ("packed", "trl"))
    assert packed["loss"][-1] < packed["loss"][0]
    for name in NAMES:
        assert packed[name] == pytest.approx(trl[name], rel=1e-4, abs=1e-5), name


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    GOLDEN.mkdir(exist_ok=True)
    for names in CURVES:
        with tempfile.TemporaryDirectory() as folder:
            values = curve(*names, Path(folder))
        engine_, loss_, arch_ = names
        text = json.dumps({name: [round(v, 8) for v in numbers] for name, numbers in values.items()}, indent=1)
        (GOLDEN / f"{loss_}_{arch_}_{engine_}.json").write_text(text + "\n")
