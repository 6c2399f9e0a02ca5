"""Merging and rounding: the exported model answers as the adapted one, and what cannot be merged is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exported import adapted, export, logits
from peft import LoraModel, PeftModel
from transformers import AutoModelForCausalLM
from tuned import make_run

from preference.models.hardware import Hardware
from preference.serve import merging
from preference.serve.loading import LoadingError, Source, find_source, load_template, load_tokenizer
from preference.serve.merging import Probes, cast, load_merged, probes
from tiny import tiny_model


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_the_merged_model_answers_as_the_adapted_one(
    base: Path, tmp_path: Path, lora: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run(tmp_path / "run", base, **lora)
    export(monkeypatch, folder, "--output", tmp_path / "out")
    expected = adapted(folder, base)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (found - expected).abs().max() < 1e-5
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1


def test_weights_are_merged_in_float32_and_then_rounded(
    run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(monkeypatch, run, "--output", tmp_path / "out", "--dtype", "bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run).merge_and_unload()
    for name, weight in exact.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight.bfloat16()), name
    expected, rounded = adapted(run, base).log_softmax(-1), logits(found.float()).log_softmax(-1)
    assert (expected.exp() * (expected - rounded)).sum(-1).mean() < 1e-3


def questions_of(source: Source) -> Probes:
    tokenizer = load_tokenizer(source)
    return probes(load_template(source, tokenizer)[0], tokenizer)


def test_what_merging_and_rounding_change_is_measured(run: Path) -> None:
    source = find_source(str(run))
    questions = questions_of(source)
    model, exact, merged = load_merged(source, questions)
    assert merged.computed_in == "float64" and 0 < merged.logits < 1e-5
    assert cast(model, torch.float32, questions, exact) is None
    rounding, computing = cast(model, torch.bfloat16, questions, exact)
    assert 1e-4 < rounding.logits < 0.5 and 1e-8 < rounding.kl < 1e-3
    assert 1e-4 < computing.logits < 0.5 and rounding.rms < 2 * computing.rms
    assert cast(model.float(), torch.bfloat16, questions, exact) is None  # it is rounded once


def test_float64_is_computed_in_throughout() -> None:
    model, questions = tiny_model(head_dim=10), [(list(range(3, 40)), 5)]
    first = [merging.logits_of(model, questions, dtype) for dtype in (torch.float64, torch.float32)]
    order = torch.randperm(32)
    for weight in model.parameters():  # the same model with its channels in another order, so that sums round otherwise
        for dim, size in enumerate(weight.shape):
            weight.data = weight.data.index_select(dim, order) if size == 32 else weight.data
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    second = [merging.logits_of(model, questions, dtype) for dtype in (torch.float64, torch.float32)]
    exact, rounded = ((one - two).abs().max() for one, two in zip(first, second, strict=True))
    assert exact < 1e-14 and rounded > 1e-8
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_float32_is_used_where_float64_cannot_be(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = [(list(range(3, 40)), 5)]
    assert merging.exact_logits(tiny_model(), questions).dtype == torch.float64
    assert merging.exact_logits(tiny_model("mixtral"), questions).dtype == torch.float32
    assert "measured in float32 (Expected" in capsys.readouterr().out
    monkeypatch.setattr(merging, "detect", lambda **_: Hardware("cpu", "CPU", 500_000, False))
    assert merging.exact_logits(tiny_model(), questions).dtype == torch.float32
    assert "measured in float32 (too little memory)" in capsys.readouterr().out


@pytest.mark.parametrize("change", [0, 1 + 1e-5])
def test_a_merge_that_changes_answers_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, change: float) -> None:
    merge = LoraModel.merge_and_unload

    def wrong(self: LoraModel, **options: object) -> object:
        if not change:
            return self.unload()
        model = merge(self, **options)
        model.model.layers[0].mlp.up_proj.weight.data *= change  # little enough for two float32 forwards to hide it
        return model

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    source = find_source(str(run))
    with pytest.raises(LoadingError, match="answers otherwise"):
        load_merged(source, questions_of(source))


def test_weights_that_a_type_cannot_hold_are_refused(run: Path) -> None:
    source = find_source(str(run))
    questions = questions_of(source)
    model, exact, _ = load_merged(source, questions)
    model.model.layers[0].input_layernorm.weight.data[0] = 1e5  # float16 ends at 65,504
    with pytest.raises(LoadingError, match="rounded to float16 answer otherwise .*--dtype float32"):
        cast(model, torch.float16, questions, exact)


def test_quantized_weights_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "gptq"}
    monkeypatch.setattr(merging, "load_tuned_model", lambda *_: model)
    with pytest.raises(LoadingError, match="unquantized"):
        load_merged(find_source(str(run)), [])
