"""Every way of transformers to quantise a checkpoint: kept, or refused with the package that reads it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig
from transformers.utils.quantization_config import QuantizationMethod

import preference.models.quantized as quantized
from preference.models.quantized import DENSE, PACKAGES, QuantizationError, as_stored, check_trainable, quantizer_of

NOT_READ = {"gguf", "nvfp4", "metal", "gemma"}  # by transformers itself, or nowhere but on one kind of device
METHODS = [method.value for method in QuantizationMethod]


def stored(method, asked=None, **more):
    return as_stored("some/folder", LlamaConfig(quantization_config={"quant_method": method} | more), asked)


@pytest.mark.parametrize("method", [*METHODS, "of_tomorrow", None])
def test_each_is_kept_or_refused_by_name(method, monkeypatch):
    known = method in PACKAGES or method in DENSE
    assert known != (method in NOT_READ or method in ("of_tomorrow", None))
    monkeypatch.setattr(quantized, "_there", lambda module: False)
    if not known:
        with pytest.raises(QuantizationError, match="some/folder is quantised with .*, which is not read here"):
            stored(method)
        return
    packages = PACKAGES.get(method, ("", (), ""))[2]
    if packages:
        with pytest.raises(QuantizationError) as refused:
            stored(method)
        assert f"not installed: pip install {packages}, or take the model that is not" in str(refused.value)
    monkeypatch.setattr(quantized, "_there", lambda module: True)
    found = stored(method)
    assert found.method == method and found.dense == (method in DENSE) == (found.loading is not None)
    with pytest.raises(
        QuantizationError, match="is quantised .* already, so its weights cannot be quantised to 4 bits"
    ):
        stored(method, asked=object())


def test_weights_that_stay_quantised_are_trained_with_an_adapter_or_not_at_all():
    four = quantizer_of(LlamaConfig(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))
    check_trainable("some/folder", four, use_peft=True)
    with pytest.raises(QuantizationError, match="quantised and cannot be trained themselves: use_peft=true"):
        check_trainable("some/folder", four, use_peft=False)
    ternary = quantizer_of(LlamaConfig(quantization_config={"quant_method": "bitnet"}))
    with pytest.raises(QuantizationError, match="trains no adapter over the weights of some/folder"):
        check_trainable("some/folder", ternary, use_peft=True)
    assert stored("bitsandbytes", asked=SimpleNamespace(), load_in_4bit=True).method == "bitsandbytes"
