"""A base model with NaN or infinity in it is called that, by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preference.models.look import ModelError, load_weights
from tiny import tiny_model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    model.save_pretrained(tmp_path / "good")
    assert load_weights(str(tmp_path / "good"), dtype=dtype) is not None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(ModelError, match=r"1 tensors hold NaN or infinity \(model.layers.1.mlp.up_proj.weight\)"):
        load_weights(str(tmp_path / "bad"), dtype=dtype)
